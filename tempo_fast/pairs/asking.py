"""Asking about many videos, one of which may be broken."""

from __future__ import annotations

from collections.abc import Sequence

from tempo_fast.errors import InputError
from tempo_fast.generation import Request
from tempo_fast.pairs.method import Ask


def ask_by_video(
    ask: Ask, videos: Sequence[str], groups: Sequence[Sequence[Request]], desc: str, failed: list[dict[str, str]]
) -> list[list[str] | None]:
    """Answers per group of requests, each about one of ``videos``. When a video breaks, the others go on; it has None
    and is appended to ``failed`` as {"video", "reason"}.

    Raises:
        InputError: the engine's own trouble, which names none of the videos.
    """
    try:
        texts = iter(ask([request for group in groups for request in group], desc))
        return [[next(texts) for _ in group] for group in groups]
    except InputError as e:
        if not any(video in str(e) for video in videos):
            raise
    out: list[list[str] | None] = []
    for video, group in zip(videos, groups, strict=True):
        try:
            out.append(list(ask(group, "")))
        except InputError as e:
            if video not in str(e):
                raise
            failed.append({"video": video, "reason": str(e)})
            out.append(None)
    return out
