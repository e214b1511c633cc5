"""The families that see whole frames, against transformers' own forwards, processors' texts and published numbers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from frame_models import CHATML, VICUNA, FramesPlan, FramesReader, llama_tokenizer, write_checkpoint

from tempo_fast.errors import InputError
from tempo_fast.models import Grid, get_family
from tempo_fast.models.load import Bundle, load_bundle
from tempo_fast.trees.layout import align_spans


def make_prompt(bundle: Bundle, counts: list[int]) -> tuple[Any, torch.Tensor, list[Grid]]:
    """A prompt about videos of so many frames, and their pixels."""
    plans = [FramesPlan(f"v{i}", n, bundle.geometry) for i, n in enumerate(counts)]
    grids = [p.grid for p in plans]
    pixels = [FramesReader().pixels(p) for p in plans]
    prompt = bundle.family.build_prompt(bundle.tokenizer, bundle.config, "What happens?", grids)
    return prompt, torch.cat(pixels), grids


def test_hidden_states_are_transformers_own(frames: Bundle) -> None:
    # transformers takes the videos of one call with equal numbers of frames alone
    prompt, pixels, grids = make_prompt(frames, [3, 3])
    side = frames.geometry.side
    if frames.family.name == "internvl":
        given = {"pixel_values": pixels.view(-1, 3, side, side)}
    else:
        given = {"pixel_values_videos": pixels.view(2, 3, 3, side, side)}
    with torch.no_grad():
        features = frames.family.encode_vision(frames.model, pixels, grids)
        ours = frames.family.hidden_states(
            frames.model, prompt.input_ids[None], prompt.position_ids[:, None], None, prompt.visual[None], features
        )
        theirs = frames.model.model(input_ids=prompt.input_ids[None], **given).last_hidden_state
    assert features.shape == (int(prompt.visual.sum()), theirs.shape[-1]) and features.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert frames.family.head(frames.model)(ours).shape[-1] == frames.config.get_text_config().vocab_size


def test_videos_of_one_call_do_not_mix(frames: Bundle) -> None:
    _, pixels, grids = make_prompt(frames, [1, 4])
    with torch.no_grad():
        both = frames.family.encode_vision(frames.model, pixels, grids)
        alone = [
            frames.family.encode_vision(frames.model, p, [g])
            for p, g in zip(pixels.split([g.t for g in grids]), grids, strict=True)
        ]
    assert [len(f) for f in alone] == [frames.geometry.tokens(g) for g in grids]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_positions_count_tokens(frames: Bundle) -> None:
    prompt, _, _ = make_prompt(frames, [2, 1])
    assert torch.equal(prompt.position_ids, torch.arange(len(prompt.input_ids)).expand(3, -1))
    assert prompt.next_position == len(prompt.input_ids)
    assert torch.equal(frames.family.model_positions(prompt.position_ids[:, None]), prompt.position_ids[:1])


def test_cached_forwards_are_the_forward_in_pieces(frames: Bundle) -> None:
    prompt, pixels, grids = make_prompt(frames, [2])
    family, model = frames.family, frames.model
    ids, positions, visual = prompt.input_ids[None], prompt.position_ids[:, None], prompt.visual[None]
    # the first cut ends the video, before its newline where it has one
    cuts = [0, int(prompt.visual.nonzero().max()) + 1, ids.shape[1] - 2, ids.shape[1]]
    with torch.no_grad():
        features = family.encode_vision(model, pixels, grids)
        whole = family.hidden_states(model, ids, positions, None, visual, features)
        cache, pieces = family.new_cache(model), []
        for a, b in zip(cuts, cuts[1:], strict=False):
            mine = features if a == 0 else None
            mask = torch.ones(1, b, dtype=torch.long) if a else None
            part = (ids[:, a:b], positions[:, :, a:b], mask, visual[:, a:b], mine, cache)
            pieces.append(family.hidden_states(model, *part))
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_lora_targets(frames: Bundle) -> None:
    names = [n for n, m in frames.model.named_modules() if isinstance(m, torch.nn.Linear)]
    hit = [n for n in names if re.fullmatch(frames.family.lora_targets, n)]
    assert len(hit) == 7 * frames.config.get_text_config().num_hidden_layers
    assert all("language_model.layers" in n for n in hit)
    vision = [n for n in names if re.fullmatch(frames.family.vision_lora_targets, n)]
    assert len(vision) == 6 * frames.config.vision_config.num_hidden_layers
    assert all("vision_tower" in n for n in vision)


def test_the_tower_is_one_object_with_all_that_makes_features(frames: Bundle) -> None:
    model = copy.deepcopy(frames.model)
    tower = frames.family.vision_tower(model)
    assert tower is frames.family.vision_tower(model) is not frames.family.vision_tower(frames.model)
    _, pixels, grids = make_prompt(frames, [2])
    model.requires_grad_(True)
    frames.family.encode_vision(model, pixels, grids).sum().backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    own = {id(p) for p in tower.parameters()}
    assert moved and {n for n, p in model.named_parameters() if id(p) in own} >= moved
    assert not any("language_model" in n or "lm_head" in n for n, p in model.named_parameters() if id(p) in own)


def test_the_smallest_video_can_be_encoded(frames: Bundle) -> None:
    grid, shape = frames.geometry.smallest()
    with torch.no_grad():
        features = frames.family.encode_vision(frames.model, torch.zeros(shape), [grid])
    assert len(features) == frames.geometry.frame_tokens


@pytest.mark.parametrize(
    "kind, name, side, tokens, sampling",
    [("InternVLConfig", "internvl", 448, 256, "hf_internvl"),
     ("LlavaOnevisionConfig", "llava_onevision", 384, 196, "hf_uniform"),
     ("LlavaNextVideoConfig", "llava_next_video", 336, 144, "hf_uniform")],
)  # fmt: skip
def test_published_frames(kind: str, name: str, side: int, tokens: int, sampling: str) -> None:
    geometry = get_family(name).geometry(getattr(transformers, kind)())
    assert (geometry.side, geometry.frame_tokens, geometry.sampling) == (side, tokens, sampling)
    assert geometry.tokens(geometry.grid(5, side, side)) == 5 * tokens


def test_a_template_that_writes_the_first_token_itself() -> None:
    family = get_family("llava_next_video")
    for template in (VICUNA, "{{ bos_token }}" + VICUNA):
        tokenizer = llama_tokenizer(template=template)
        prompt = family.build_prompt(tokenizer, transformers.LlavaNextVideoConfig(), "What?", [])
        assert prompt.input_ids.tolist().count(tokenizer.bos_token_id) == 1 and prompt.input_ids[0] == 1


def test_words_that_stand_for_a_video_are_refused(frames: Bundle) -> None:
    family, grid = frames.family, frames.geometry.grid(1, frames.geometry.side, frames.geometry.side)

    def prompt(text: str, grids: list[Grid]) -> Any:
        return family.build_prompt(frames.tokenizer, frames.config, text, grids)

    with pytest.raises(InputError, match="hold 1 '<video>' slots for 0 videos"):
        prompt("What is <video>?", [])
    with pytest.raises(InputError, match="hold 2 '<video>' slots for 1 videos"):
        prompt("What is <video>?", [grid])
    with pytest.raises(InputError, match="an answer holds the visual placeholder"):
        family.answer_ids(frames.tokenizer, f"It is {family.placeholder}.")
    if family.placeholder != "<video>":
        with pytest.raises(InputError, match="the prompt's words hold it"):
            prompt(f"What is {family.placeholder}?", [grid])


def test_a_text_template_is_refused(frames: Bundle) -> None:
    tokenizer = copy.deepcopy(frames.tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | string | length }}{% endfor %}"
    with pytest.raises(InputError, match="hold 0 '<video>' slots for 1 videos"):
        frames.family.build_prompt(tokenizer, frames.config, "What?", [Grid(1, 4, 4)])


def test_a_processors_template_beside_the_tokenizers(frames: Bundle, tmp_path: Path) -> None:
    write_checkpoint(frames.family.name, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    template = "{% for p in messages[0]['content'] if p['type'] == 'video' %}<video>{% endfor %}Mine:"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    bundle = load_bundle(str(tmp_path), "float32", "cpu", weights=False)
    side = bundle.geometry.side
    prompt = bundle.family.build_prompt(bundle.tokenizer, bundle.config, "What?", [bundle.geometry.grid(1, side, side)])
    assert bundle.tokenizer.decode(prompt.input_ids).endswith("Mine:")


def test_a_tokenizer_without_the_end_of_a_turn_is_refused(frames: Bundle) -> None:
    if frames.family.turn_end is None:
        pytest.skip("ends its answers as the tokenizer says")
    with pytest.raises(InputError, match="no token '<|im_end|>'"):
        frames.family.answer_ids(llama_tokenizer(), "Yes.")


def test_frames_that_are_no_squares_are_refused(frames: Bundle) -> None:
    config = copy.deepcopy(frames.config)
    config.vision_config.image_size = [28, 56]
    with pytest.raises(InputError, match="is not square"):
        frames.family.geometry(config)


def test_frames_that_do_not_merge_are_refused() -> None:
    config = transformers.InternVLConfig()
    config.downsample_ratio = 0.3
    with pytest.raises(InputError, match="downsample_ratio of 0.3"):
        get_family("internvl").geometry(config)


def test_answers_follow_the_words_of_their_chat() -> None:
    """A Llama tokenizer starts every text with a space: right after "ASSISTANT:", wrong after ChatML's line break."""
    family = get_family("llava_next_video")
    for end, template, before in (("</s>", None, "ASSISTANT: "), ("<|im_end|>", CHATML, "assistant\n")):
        tokenizer = llama_tokenizer(end, *([template] if template else []))
        for answer in ("A red circle.", "x", "\nIt."):
            *got, last = family.answer_ids(tokenizer, answer)
            whole = tokenizer(before + answer)["input_ids"]
            assert got == whole[len(whole) - len(got) :] and last == tokenizer.convert_tokens_to_ids(end)
            assert tokenizer.decode(whole[: len(whole) - len(got)]).endswith(before.rstrip(" "))
    with pytest.raises(InputError, match="spans cannot be aligned"):
        align_spans(tokenizer, "A red circle.", family.answer_ids(tokenizer, "A red circle."), [[0, 5]])
