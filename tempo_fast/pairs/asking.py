"""Asking about many videos, one of which may be broken, or too long for the model."""

from __future__ import annotations

from collections.abc import Sequence

from tempo_fast.errors import InputError
from tempo_fast.generation import RefusedRequest, Request
from tempo_fast.pairs.method import Ask, failure

_TOO_MANY = 3  # videos of which every request is refused


def ask_by_video(
    ask: Ask,
    videos: Sequence[str],
    groups: Sequence[Sequence[Request] | None],
    desc: str,
    failed: list[dict[str, str]],
) -> list[list[str] | None]:
    """Answers per group of requests, each about one of ``videos``. When a video breaks, or a request about it is
    refused, the others go on; all its groups have None and it is appended to ``failed`` (method.failure). Groups
    that are None, and videos in ``failed`` already, are not asked about.

    Raises:
        InputError: the engine's own trouble, which names none of the videos.
    """
    reasons = {f["video"]: f["reason"] for f in failed}

    def fail(video: str, error: Exception | str) -> None:
        if video not in reasons:
            reasons[video] = str(error)
            failed.append(failure(video, error))

    def answers(shown: Sequence[str], asked: Sequence[Sequence[Request]], desc: str) -> list[list[str]]:
        refused: dict[int, str] = {}
        try:
            texts = ask([request for group in asked for request in group], desc)
        except RefusedRequest as e:
            if len(e.reasons) == len(e.texts) and len(set(shown)) > _TOO_MANY:
                raise  # nothing that is asked pleases the endpoint: no video is at fault
            texts, refused = e.texts, e.reasons
        numbered = iter(enumerate(texts))
        out = []
        for video, group in zip(shown, asked, strict=True):
            mine = [next(numbered) for _ in group]
            for k, _ in mine:
                if k in refused:
                    fail(video, refused[k])
            out.append([text for _, text in mine])
        return out

    live = [[] if group is None or v in reasons else group for v, group in zip(videos, groups, strict=True)]
    try:
        told = answers(videos, live, desc)
    except InputError as e:
        if not any(video in str(e) for video in videos):
            raise
        told = []
        for video, group in zip(videos, live, strict=True):
            try:
                told += answers([video], [[] if video in reasons else group], "")
            except InputError as e:
                if video not in str(e):
                    raise
                fail(video, e)
                told.append([])
    return [
        None if group is None or video in reasons else texts
        for video, group, texts in zip(videos, groups, told, strict=True)
    ]
