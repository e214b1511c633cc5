"""Qwen2.5-VL and Qwen3-VL against transformers: processors (as kept by hf_qwen.py), positions, forward."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tempo_fast.config import VideoConfig
from tempo_fast.models import Grid, get_family
from tempo_fast.models.family import Timing
from tempo_fast.models.qwen3_vl import patch_seconds
from tempo_fast.trees.layout import prompt_of
from tempo_fast.video.reader import VideoReader

spec = importlib.util.spec_from_file_location("hf_qwen", Path(__file__).with_name("hf_qwen.py"))
assert spec is not None and spec.loader is not None
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

# a patch that ends a second before the next, one frame in the last patch; a slow video; one frame
TIMES = [Timing((0.0, 0.5, 1.5, 2.0, 2.5), 1.9), Timing(tuple(3.0 * i for i in range(8)), 1 / 3), Timing((0.0,), 1.0)]
GRIDS = [Grid(3, 4, 8), Grid(4, 6, 4), Grid(1, 4, 4)]


@pytest.fixture(scope="module")
def kept() -> dict[str, Tensor]:
    return load_file(hf.KEPT)


def plans_of(bundle: Any, case: int, folder: Path) -> tuple[list[Any], list[Any]]:
    """Lossless files of a case, planned as the processor was told; and their readers."""
    plans, readers = [], []
    for i, video in enumerate(hf.CASES[case]):
        path = folder / f"{i}.mkv"
        hf.pixels.write_lossless(path, video.frames(), video.rate)
        least, most = (hf.LEAST, hf.MOST) if bundle.geometry.patch == 16 else (28 * 28, 28 * 28 * 8)
        config = VideoConfig(
            backend="pyav", sampling=video.rule, fps=video.fps, min_frames=2, min_pixels=least, max_pixels=most
        )
        readers.append(VideoReader(config, bundle.geometry))
        plans.append(readers[-1].plan(path))
        assert list(plans[-1].indices) == video.indices()
    return plans, readers


def without_wrapper(ids: list[int], start: int, end: int, pad: int) -> list[int]:
    """Without the vision start and end that stand at no placeholder."""
    around = [None, *ids, None]
    return [
        t
        for before, t, after in zip(around, ids, around[2:], strict=False)
        if (t != start or after == pad) and (t != end or before == pad)
    ]


@pytest.mark.parametrize("case", range(len(hf.CASES)))
def test_prompts_equal_the_hugging_face_processor(successor: Any, kept: Any, tmp_path: Path, case: int) -> None:
    name, config = successor.family.name, successor.config
    theirs = {key: kept[f"{name}.{case}.{key}"] for key in ("ids", "grids")}
    plans, readers = plans_of(successor, case, tmp_path)
    assert [list(p.grid) for p in plans] == theirs["grids"].tolist()
    prompt = prompt_of(successor.family, successor.tokenizer, config, hf.TEXT, plans)
    ids = theirs["ids"].tolist()
    if name == "qwen3_vl":
        # the released processor replaced the template's wrapper, transformers 5.10 leaves it around the patches
        n = len(ids)
        ids = without_wrapper(ids, config.vision_start_token_id, config.vision_end_token_id, config.video_token_id)
        assert len(ids) == n - 2 * len(plans)
        text = successor.tokenizer.decode(prompt.input_ids)
        assert len(re.findall(r"<\d+\.\d seconds><\|vision_start\|>", text)) == sum(p.grid.t for p in plans)
        pixels = torch.cat([r.pixels(p) for r, p in zip(readers, plans, strict=True)])
        values = kept[f"{name}.{case}.table"][kept[f"{name}.{case}.codes"].long()]
        assert (pixels - values).abs().max() < 1e-6
    else:
        seconds = [successor.geometry.temporal / p.fps for p in plans]
        assert seconds == pytest.approx(kept[f"{name}.{case}.seconds"].tolist(), rel=1e-6)
    assert prompt.input_ids.tolist() == ids
    assert prompt.visual.tolist() == [t == config.video_token_id for t in ids]


@pytest.mark.parametrize("which", [[0], [1], [2], [1, 0, 2]])
def test_positions_of_videos_are_transformers_own(successor: Any, which: list[int]) -> None:
    grids, times = [GRIDS[i] for i in which], [TIMES[i] for i in which]
    prompt = successor.family.build_prompt(successor.tokenizer, successor.config, "What happens?", grids, times)
    more: dict[str, Any] = {}
    if successor.family.name == "qwen2_5_vl":
        more["second_per_grid_ts"] = torch.tensor([successor.geometry.temporal / t.fps for t in times])
    theirs = successor.model.model.get_rope_index(
        prompt.input_ids[None],
        mm_token_type_ids=2 * prompt.visual[None].int(),
        video_grid_thw=torch.tensor(grids),
        **more,
    )[0][:, 0]
    ours, seen = prompt.position_ids, prompt.visual
    if successor.family.name == "qwen3_vl":  # every patch is wider than long: the pretraining rule and theirs agree
        assert torch.equal(ours, theirs)
    place = 0
    for grid in grids:
        n = successor.geometry.tokens(grid)
        mine, other = ours[:, seen][:, place : place + n], theirs[:, seen][:, place : place + n]
        assert torch.equal(mine - mine.min(1).values[:, None], other - other.min(1).values[:, None])
        assert len(set(mine.min(1).values.tolist())) == 1 or successor.family.name == "qwen3_vl"
        place += n
    # text resumes after the largest position on any axis, and runs on by one on all
    top = torch.cat([torch.tensor([-1]), ours.max(0).values.cummax(0).values])
    starts = ~seen | (seen & ~torch.cat([torch.tensor([False]), seen[:-1]]))
    assert torch.equal(ours[:, starts], (top[:-1] + 1)[starts].expand(3, -1))
    assert prompt.next_position == int(ours.max()) + 1


def test_time_moves_positions_or_words(successor: Any) -> None:
    """Twice as fast: half the temporal step (rounded down in the end), or other timestamps at the same positions."""
    family, grid = successor.family, Grid(4, 4, 4)
    slow, fast = (Timing(tuple(i / fps for i in range(8)), fps) for fps in (1.5, 3.0))
    one, two = (
        family.build_prompt(successor.tokenizer, successor.config, "So?", [grid], [time]) for time in (slow, fast)
    )
    if family.name == "qwen3_vl":
        assert one.input_ids.tolist() != two.input_ids.tolist()
        text = successor.tokenizer.decode(one.input_ids)
        assert re.findall(r"<([\d.]+) seconds>", text) == ["0.3", "1.7", "3.0", "4.3"]
        return
    assert torch.equal(one.input_ids, two.input_ids)
    rate = successor.config.vision_config.tokens_per_second
    for prompt, time in ((one, slow), (two, fast)):
        steps = prompt.position_ids[0, prompt.visual].unflatten(0, (4, -1))[:, 0]
        assert (steps - steps[0]).tolist() == [int(i * rate * 2 / time.fps) for i in range(4)]


def test_a_family_that_tells_time_asks_for_it(successor: Any) -> None:
    family = successor.family
    assert len(family.build_prompt(successor.tokenizer, successor.config, "Hello.", []).input_ids) > 5
    with pytest.raises(ValueError, match="0 times of frames for 1 videos"):
        family.build_prompt(successor.tokenizer, successor.config, "So?", [Grid(1, 4, 4)])
    with pytest.raises(ValueError, match="1 times of frames for 2 videos"):
        family.build_prompt(successor.tokenizer, successor.config, "So?", [Grid(1, 4, 4)] * 2, TIMES[:1])
    if family.name == "qwen3_vl":
        with pytest.raises(ValueError, match="times of 5 frames for 1 temporal patches"):
            family.build_prompt(successor.tokenizer, successor.config, "So?", [Grid(1, 4, 4)], TIMES[:1])


def test_the_time_of_a_patch_is_its_middle() -> None:
    assert patch_seconds([0.0, 1.0, 2.5, 3.0], 2) == [0.5, 2.75]
    assert patch_seconds([0.0, 1.0, 2.5], 2) == [0.5, 2.5]
    assert patch_seconds([4.0], 2) == [4.0]
    assert patch_seconds([0.0, 1.0, 2.0, 4.0], 3) == [1.0, 4.0]


def test_hidden_states_are_transformers_own(successor: Any) -> None:
    """Pixels to hidden states, a padded row beside a longer one with another video, against the model's own forward."""
    torch.manual_seed(0)
    family, model, geometry = successor.family, successor.model, successor.geometry
    prompts = [
        family.build_prompt(successor.tokenizer, successor.config, text, grids, times)
        for text, grids, times in (("What happens?", GRIDS[:2], TIMES[:2]), ("So?", GRIDS[2:], TIMES[2:]))
    ]
    rows = sum(g.t * g.h * g.w for g in GRIDS)
    pixels = torch.randn(rows, 3 * geometry.temporal * geometry.patch**2)
    length = max(len(p.input_ids) for p in prompts)
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    positions, visual = torch.zeros(3, 2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.bool)
    for i, p in enumerate(prompts):
        n = len(p.input_ids)
        ids[i, :n], positions[:, i, :n], visual[i, :n], mask[i, :n] = p.input_ids, p.position_ids, p.visual, 1
    with torch.no_grad():
        features = family.encode_vision(model, pixels, GRIDS)
        ours = family.hidden_states(model, ids, positions, mask, visual, features)
        theirs = model.model(
            input_ids=ids,
            attention_mask=mask,
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor(GRIDS),
            position_ids=positions,
        ).last_hidden_state
    assert len(features) == int(visual.sum())
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("successor", ["qwen3_vl"], indirect=True)
def test_deeper_features_reach_their_own_tokens_alone(successor: Any) -> None:
    """Noise in the channels that DeepStack adds moves nothing before the token it belongs to, and moves that one."""
    family, model = successor.family, successor.model
    prompt = family.build_prompt(successor.tokenizer, successor.config, "So?", [Grid(3, 4, 4)], [TIMES[0]])
    torch.manual_seed(0)
    features = torch.randn(12, 3 * 64)
    args = prompt.input_ids[None], prompt.position_ids[:, None], None, prompt.visual[None]
    with torch.no_grad():
        before = family.hidden_states(model, *args, features)
        for layer in (1, 2):
            moved = features.clone()
            moved[3, layer * 64 : (layer + 1) * 64] += 1.0
            changed = (family.hidden_states(model, *args, moved) != before).any(-1)[0]
            assert int(changed.nonzero()[0]) == int(prompt.visual.nonzero()[3])
        entered = family.embed(model, prompt.input_ids[None], prompt.visual[None], features)
    assert torch.equal(entered[0, prompt.visual], features[:, :64])


def test_lora_targets_are_language_linears_alone(successor: Any) -> None:
    names = [n for n, m in successor.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hit = [n for n in names if re.fullmatch(successor.family.lora_targets, n)]
    assert hit and all("language_model.layers" in n for n in hit)
    assert len(hit) == 7 * successor.config.text_config.num_hidden_layers
    vision = [n for n in names if re.fullmatch(successor.family.vision_lora_targets, n)]
    blocks = [n for n in names if "visual.blocks" in n]
    assert vision == blocks and len(blocks) >= 4 * successor.config.vision_config.depth


def test_a_family_is_known_by_its_architecture(successor: Any) -> None:
    assert successor.family is get_family(successor.config.model_type)
    assert type(successor.model).__name__ == successor.family.model_class
