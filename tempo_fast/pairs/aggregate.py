"""Clip captions to one description: joined in order, or asked of the model."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tempo_fast.generation import Request
from tempo_fast.pairs.method import Ask
from tempo_fast.prompts import AGGREGATE_PROMPT

_CLIP = re.compile(r"\b(c)lip\s+([12])\b", re.IGNORECASE)


def clean_caption(answer: str) -> str:
    """The caption in a window's answer: its last line that is not empty, without the names of the two clips.

    As the TEMPLE authors do (``generator_qwen2vl.py``): "clip 2" becomes "this clip" and "clip 1" "the previous clip".
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]

    def name(match: re.Match[str]) -> str:
        words = "this clip" if match.group(2) == "2" else "the previous clip"
        return words[0].upper() + words[1:] if match.group(1) == "C" else words

    return _CLIP.sub(name, lines[-1]) if lines else ""


def join_captions(captions: Sequence[str]) -> str:
    """Captions one after the other, each ended by a full stop if it ends in a word."""
    parts = [c.strip() for c in captions if c.strip()]
    return " ".join(p if p[-1] in ".!?\"'”)" else f"{p}." for p in parts)


def aggregate_prompt(captions: Sequence[str]) -> str:
    """The text-only instruction to write one description from numbered captions."""
    return AGGREGATE_PROMPT.format(captions="\n".join(f"{i}. {c}" for i, c in enumerate(captions, 1)))


def aggregate(how: str, captions: Sequence[Sequence[str]], ask: Ask | None, desc: str = "") -> list[str]:
    """One description per list of captions.

    Args:
        how: ``template`` joins; ``model`` asks, and needs ``ask``.
        captions: clip captions in the order they are to be told.
    """
    if how == "template":
        return [join_captions(c) for c in captions]
    assert ask is not None
    return [" ".join(t.split()) for t in ask([Request((), aggregate_prompt(c)) for c in captions], desc)]
