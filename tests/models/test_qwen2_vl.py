"""The Qwen2-VL family against transformers' own forward, and its positions against the pretraining rule."""

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.models import Grid, get_family, known_families
from tempo_fast.models.load import Bundle, load_bundle


def positions_by_rule(tokens: list[int], pad: int, grids: list[Grid], merge: int) -> list[list[int]]:
    """Token by token, as the model was pretrained: text resumes after the largest position so far."""
    t_axis: list[int] = []
    h_axis: list[int] = []
    w_axis: list[int] = []
    slots: list[tuple[int, int, int]] = []
    for grid in grids:
        slots += [(t, h, w) for t in range(grid.t) for h in range(grid.h // merge) for w in range(grid.w // merge)]
    taken, start, ends = 0, 0, []
    for grid in grids:
        taken += grid.t * grid.h * grid.w // merge**2
        ends.append(taken)
    seen = 0
    for token in tokens:
        top = max([*t_axis, *h_axis, *w_axis], default=-1)
        if token != pad:
            for axis in (t_axis, h_axis, w_axis):
                axis.append(top + 1)
            continue
        if seen == 0 or seen in ends:
            start = top + 1
        t, h, w = slots[seen]
        t_axis.append(start + t)
        h_axis.append(start + h)
        w_axis.append(start + w)
        seen += 1
    return [t_axis, h_axis, w_axis]


@pytest.mark.parametrize("grids", [[], [Grid(1, 2, 2)], [Grid(7, 4, 4)], [Grid(3, 4, 6), Grid(9, 2, 4)]])
def test_prompt_positions(tiny: Bundle, grids: list[Grid]) -> None:
    prompt = tiny.family.build_prompt(tiny.tokenizer, tiny.config, "What happens?", grids)
    merge = tiny.geometry.merge
    assert int(prompt.visual.sum()) == sum(tiny.geometry.tokens(g) for g in grids)
    pad = tiny.config.video_token_id
    assert prompt.position_ids.tolist() == positions_by_rule(prompt.input_ids.tolist(), pad, grids, merge)
    assert prompt.next_position == int(prompt.position_ids.max()) + 1


def test_answer_ends_the_turn(tiny: Bundle) -> None:
    ids = tiny.family.answer_ids(tiny.tokenizer, "A red circle.")
    assert tiny.tokenizer.decode(ids[:-1]) == "A red circle."
    assert ids[-1] == tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_hidden_states_are_transformers_own(tiny: Bundle) -> None:
    torch.manual_seed(0)
    grids = [Grid(2, 4, 4), Grid(3, 2, 4)]
    prompt = tiny.family.build_prompt(tiny.tokenizer, tiny.config, "What happens?", grids)
    patches = sum(g.t * g.h * g.w for g in grids)
    pixels = torch.randn(patches, 3 * tiny.geometry.temporal * tiny.geometry.patch**2)
    with torch.no_grad():
        features = tiny.family.encode_vision(tiny.model, pixels, grids)
        ours = tiny.family.hidden_states(
            tiny.model, prompt.input_ids[None], prompt.position_ids[:, None], None, prompt.visual[None], features
        )
        theirs = tiny.model.model(
            input_ids=prompt.input_ids[None],
            pixel_values_videos=pixels,
            video_grid_thw=torch.tensor(grids),
            position_ids=prompt.position_ids[:, None],
        ).last_hidden_state
    assert features.shape == (int(prompt.visual.sum()), theirs.shape[-1])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert tiny.family.head(tiny.model)(ours).shape[-1] == tiny.config.text_config.vocab_size


def test_cached_forwards_are_the_forward_in_pieces(tiny: Bundle) -> None:
    torch.manual_seed(1)
    grid = Grid(3, 2, 4)
    prompt = tiny.family.build_prompt(tiny.tokenizer, tiny.config, "What happens?", [grid])
    features = torch.randn(tiny.geometry.tokens(grid), 64)
    ids, positions, visual = prompt.input_ids[None], prompt.position_ids[:, None], prompt.visual[None]
    cuts = [0, int(prompt.visual.nonzero().max()) + 1, ids.shape[1] - 2, ids.shape[1]]
    with torch.no_grad():
        whole = tiny.family.hidden_states(tiny.model, ids, positions, None, visual, features)
        cache, pieces = tiny.family.new_cache(tiny.model), []
        for a, b in zip(cuts, cuts[1:], strict=False):
            mine = features if a == 0 else None
            mask = torch.ones(1, b, dtype=torch.long) if a else None
            part = (ids[:, a:b], positions[:, :, a:b], mask, visual[:, a:b], mine, cache)
            pieces.append(tiny.family.hidden_states(tiny.model, *part))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_lora_targets_are_language_linears_alone(tiny: Bundle) -> None:
    import re

    names = [n for n, m in tiny.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hit = [n for n in names if re.fullmatch(tiny.family.lora_targets, n)]
    assert hit and all("language_model.layers" in n for n in hit)
    assert len(hit) == 7 * tiny.config.text_config.num_hidden_layers
    vision = [n for n in names if re.fullmatch(tiny.family.vision_lora_targets, n)]
    assert len(vision) == 4 * tiny.config.vision_config.depth


def test_unknown_architecture_gets_the_list() -> None:
    with pytest.raises(InputError, match=f"'llama' is not supported; known: {', '.join(known_families())}"):
        get_family("llama")


@pytest.mark.parametrize("config", ['{"model_type": "no_such_thing"}', "{}"])
def test_unknown_architecture_of_a_checkpoint_gets_the_list(tmp_path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match="is not supported; known: .*qwen3_vl"):
        load_bundle(str(tmp_path))


def test_not_a_checkpoint(tmp_path) -> None:
    with pytest.raises(InputError, match="no config.json"):
        load_bundle(str(tmp_path))
