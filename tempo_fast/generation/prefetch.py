"""Many clips of one video, decoded together: windows share files, and seeking to each clip would decode runs twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tempo_fast.video.container import DecodeError


def by_video(plans: Sequence[Any]) -> list[list[Any]]:
    """Distinct plans grouped by file, in order of appearance."""
    groups: dict[str, dict[str, Any]] = {}
    for plan in plans:
        groups.setdefault(plan.path, {})[plan.key] = plan
    return [list(group.values()) for group in groups.values()]


class _Decoded:
    """A source of the pixels that it was given, by plan key."""

    def __init__(self, pixels: dict[str, Tensor | DecodeError]) -> None:
        self._pixels = pixels

    def pixels(self, plan: Any) -> Tensor:
        out = self._pixels[plan.key]
        if isinstance(out, DecodeError):
            raise out
        return out


def shared_reader(reader: Any, plans: Sequence[Any]) -> _Decoded:
    """A source for these plans alone, of one file: the reader's pixels, all frames decoded in one pass.

    It raises DecodeError where the file cannot be decoded or has changed since it was planned.
    """
    return _Decoded(dict(zip([plan.key for plan in plans], reader.pixels_many(plans), strict=True)))
