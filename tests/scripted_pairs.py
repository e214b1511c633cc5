"""A scripted world for pairs: each clip has a number, and the engine says which clips it was shown."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tempo_fast.config import PairsConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.pairs.method import Item
from tempo_fast.pairs.run import make_pairs
from tempo_fast.prompts import CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT
from tempo_fast.schema import Clip, Clips, PreferenceRecord, read_records

THINGS = ["A red circle moves left.", "A blue ring grows.", "A green cross appears.", "A white square shrinks."]


@dataclass(frozen=True)
class ClipPlan:
    video: str
    clips: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.video}:{self.clips}"


class ClipReader:
    """Ten frames a clip, so that a frame number says its clip."""

    settings = "ten frames a clip"

    def plan(self, path, indices=None):
        if "gone" in path:
            raise InputError(f"{path}: no such file")
        return ClipPlan(path, tuple(i // 10 for i in indices))

    def plan_range(self, path, start, end):
        return ClipPlan(path, (start // 10,))

    def plan_clips(self, path, ranges, blank=()):
        shown = zip(ranges, blank or [False] * len(ranges), strict=True)
        return ClipPlan(path, tuple(-1 if black else start // 10 for (start, _), black in shown))


def say(clip: int) -> str:
    return f"Event {clip}. {THINGS[clip % 4]}"


class Scripted:
    """Answers like a model that sees everything; records what it was asked."""

    def __init__(self, name: str = "scripted") -> None:
        self.name, self.asked = name, []

    def provenance(self):
        return {"engine": self.name, "model": "m0"}

    def generate(self, requests, desc=""):
        self.asked += requests
        return [self._answer(r) for r in requests]

    def _answer(self, r):
        if any("broken" in p.video for p in r.plans):
            raise InputError(f"{r.plans[0].video}: cannot be decoded")
        if r.prompt == CLIP_PROMPT:
            return say(r.plans[0].clips[0])
        if r.prompt == WINDOW_PROMPT:
            return f"In clip 1, things.\n\n{say(r.plans[1].clips[0])}"
        if r.prompt in VIDEO_PROMPTS:
            return " ".join(say(c) for c in r.plans[0].clips)
        return "Told: " + " ".join(
            line.split(". ", 1)[1] for line in r.prompt.splitlines() if re.match(r"\d+\. ", line)
        )


def video(name: str, n: int, groups=None) -> Clips:
    groups = groups or list(range(n))
    clips = [Clip(10 * i, 10 * i + 10, i, i + 1.0, g, [10 * i + 3, 10 * i + 6]) for i, g in enumerate(groups)]
    shots = [[c.start_frame, c.end_frame] for c in clips]
    return Clips(name, digest(["video", name]), 10 * n, float(n), shots, groups, clips)


CONFIG = PairsConfig(aggregate="template")
VIDEOS = [video("a.mp4", 6), video("b.mp4", 17), video("c.mp4", 4)]


def items_of(videos):
    return [Item(v.video, v.digest, clips=v) for v in videos]


def pairs_of(videos, engine, config, out, **how):
    """({r: records}, audit) of scripted videos."""
    audit = make_pairs(items_of(videos), engine, ClipReader(), config, out, **how)
    return {r: read_records(out / f"r{r}.jsonl", PreferenceRecord) for r in config.r}, audit
