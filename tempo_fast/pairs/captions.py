"""Captions of clips: the first clip alone, every other one in a window with the clip shown before it.

The TEMPLE authors' way (arXiv 2503.16929, ``generator_base.py``). An order of clips is a list of clip numbers; the
windows of an order are (first,), (first, second), (second, third), ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tempo_fast.config import PairsConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import Request
from tempo_fast.pairs.aggregate import clean_caption
from tempo_fast.pairs.asking import ask_by_video
from tempo_fast.pairs.method import Ask, failure
from tempo_fast.prompts import CLIP_PROMPT, WINDOW_PROMPT
from tempo_fast.schema import Clips

Window = tuple[int, ...]


def windows_of(order: Sequence[int]) -> list[Window]:
    """The clips shown for each caption of an order: one, then always two."""
    return [tuple(order[max(0, i - 1) : i + 1]) for i in range(len(order))]


def clip_plan(reader: Any, clips: Clips, index: int, clip_input: str) -> Any:
    """Frames a caption sees of one clip: its keyframes, or its frames at the sampled rate."""
    clip = clips.clips[index]
    if clip_input == "keyframes" and clip.keyframes:
        return reader.plan(clips.video, clip.keyframes)
    return reader.plan_range(clips.video, clip.start_frame, clip.end_frame)


class Captioner:
    """Captions of windows.

    Args:
        ask: puts requests to the model (method.Ask).
        failed: videos that could not be read are appended here (method.failure) and left out.
    """

    def __init__(self, reader: Any, config: PairsConfig, ask: Ask, failed: list[dict[str, str]]) -> None:
        self.reader, self.config, self._put, self.failed = reader, config, ask, failed

    def captions(self, jobs: Sequence[tuple[Clips, Sequence[int]]], desc: str) -> list[list[str] | None]:
        """Per (video, order): one caption per clip of the order, or None when the video cannot be read."""
        requests = [self._requests(clips, order) for clips, order in jobs]
        out: list[list[str] | None] = []
        for (clips, _), answers in zip(jobs, self.ask([c for c, _ in jobs], requests, desc), strict=True):
            texts = None if answers is None else [clean_caption(t) for t in answers]
            if texts is not None and not all(texts):
                self.fail(clips, f"the model gave no caption for clip {texts.index('')}")
                texts = None
            out.append(texts)
        return out

    def ask(
        self, videos: Sequence[Clips], groups: Sequence[Sequence[Request] | None], desc: str
    ) -> list[list[str] | None]:
        """asking.ask_by_video about these videos."""
        return ask_by_video(self._put, [v.video for v in videos], groups, desc, self.failed)

    def _requests(self, clips: Clips, order: Sequence[int]) -> list[Request] | None:
        if self.is_failed(clips):
            return None
        plans: dict[int, Any] = {}
        try:
            for index in order:
                if index not in plans:
                    plans[index] = clip_plan(self.reader, clips, index, self.config.clip_input)
        except InputError as e:
            self.fail(clips, e)
            return None
        return [
            Request(tuple(plans[i] for i in window), CLIP_PROMPT if len(window) == 1 else WINDOW_PROMPT)
            for window in windows_of(order)
        ]

    def fail(self, clips: Clips, error: Exception | str) -> None:
        if not self.is_failed(clips):
            self.failed.append(failure(clips.video, error))

    def is_failed(self, clips: Clips) -> bool:
        return any(f["video"] == clips.video for f in self.failed)
