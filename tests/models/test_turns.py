"""Chats of several turns are those of transformers' own processors (as kept by hf_turns.py), for every family."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import frame_models
import pytest
import qwen_models
import tiny_qwen
from safetensors.torch import load_file

from tempo_fast.errors import InputError
from tempo_fast.models import Grid, get_family
from tempo_fast.models.base import chat_messages
from tempo_fast.models.family import Timing

spec = importlib.util.spec_from_file_location("hf_turns", Path(__file__).with_name("hf_turns.py"))
assert spec is not None and spec.loader is not None
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

START, END, PAD = "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"


def known(name: str) -> tuple[Any, Any, Any]:
    """(family, tokenizer, config)"""
    if name in hf.FRAMES:
        tokenizer = frame_models.make_tokenizer(name)
        return get_family(name), tokenizer, frame_models.make_config(name, tokenizer)
    tokenizer = tiny_qwen.make_tokenizer()
    make = tiny_qwen.make_config if name == "qwen2_vl" else lambda t: qwen_models.make_config(name, t)
    return get_family(name), tokenizer, make(tokenizer)


def videos(name: str, geometry: Any, kept: Any) -> tuple[list[Grid], list[Timing]]:
    """The videos of hf_turns, as the reader plans them."""
    if name in hf.FRAMES:
        grids = [geometry.grid(n, geometry.side, geometry.side) for n in hf.COUNTS]
        return grids, [Timing(tuple(map(float, range(n))), 1.0) for n in hf.COUNTS]
    times = [Timing(tuple(i / v.rate for i in v.indices()), v.fps) for v in hf.CASE]
    return [Grid(*row) for row in kept[f"{name}.grids"].tolist()], times


@pytest.fixture(scope="module")
def kept() -> Any:
    return load_file(hf.KEPT)


@pytest.mark.parametrize("name", hf.QWEN + hf.FRAMES)
def test_turns_equal_the_hugging_face_processor(kept: Any, name: str) -> None:
    family, tokenizer, config = known(name)
    grids, times = videos(name, family.geometry(config), kept)
    prompt = family.build_prompt(tokenizer, config, hf.TEXT, grids, times, hf.TURNS)
    ids = kept[f"{name}.ids"].tolist()
    if name == "qwen3_vl":  # see test_qwen_successors.py
        around = [None, *ids, None]
        start, end, pad = (tokenizer.convert_tokens_to_ids(t) for t in (START, END, PAD))
        ids = [
            t
            for before, t, after in zip(around, ids, around[2:], strict=False)
            if (t != start or after == pad) and (t != end or before == pad)
        ]
    assert prompt.input_ids.tolist() == ids
    # the videos stand in the first turn: every visual token lies before what was first answered
    before = tokenizer(hf.TURNS[0][1], add_special_tokens=False)["input_ids"][-4:]
    last = int(prompt.visual.nonzero().max())
    assert last < next(i for i in range(len(ids)) if ids[i : i + 4] == before)
    assert int(prompt.visual.sum()) == sum(family.geometry(config).tokens(g) for g in grids)


@pytest.mark.parametrize("name", hf.QWEN + hf.FRAMES)
def test_turns_are_words_alone(kept: Any, name: str) -> None:
    """Without videos too; and an earlier turn may not pass for a video."""
    family, tokenizer, config = known(name)
    prompt = family.build_prompt(tokenizer, config, "So?", [], [], hf.TURNS)
    text = tokenizer.decode(prompt.input_ids)
    places = [text.index(words) for turn in [*hf.TURNS, ("So?",)] for words in turn]
    assert places == sorted(places) and not prompt.visual.any()
    assert prompt.position_ids[:, -1].tolist() == [len(prompt.input_ids) - 1] * 3
    grids, times = videos(name, family.geometry(config), kept)
    slot = PAD if name in hf.QWEN else "<video>"
    with pytest.raises(InputError, match="slots for"):
        family.build_prompt(tokenizer, config, "So?", grids, times, [("What?", f"A {slot}.")])


def test_no_turns_is_one_user_turn() -> None:
    assert chat_messages("So?", 2) == [
        {"role": "user", "content": [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "So?"}]}
    ]
