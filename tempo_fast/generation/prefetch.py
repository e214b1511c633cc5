"""Many clips of one video, decoded together: windows share files, and seeking to each clip would decode runs twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _Memory:
    """A decoder over frames that are in memory already."""

    def __init__(self, decoder: Any, frames: Tensor, indices: Sequence[int]) -> None:
        self._decoder, self._frames = decoder, frames
        self._row = {index: row for row, index in enumerate(indices)}

    def decode(self, path: str, indices: Sequence[int]) -> Tensor:
        return self._frames[torch.tensor([self._row[i] for i in indices])]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


def by_video(plans: Sequence[Any]) -> list[list[Any]]:
    """Distinct plans grouped by file, in order of appearance."""
    groups: dict[str, dict[str, Any]] = {}
    for plan in plans:
        groups.setdefault(plan.path, {})[plan.key] = plan
    return [list(group.values()) for group in groups.values()]


def shared_reader(reader: Any, plans: Sequence[Any]) -> Any:
    """A reader for these plans of one file, all their frames decoded in one pass.

    The pixels are the reader's own: only its decoder is replaced, by one over the decoded frames.

    Raises:
        InputError: the file cannot be decoded.
    """
    indices = sorted({i for plan in plans for i in plan.indices})
    shared = copy.copy(reader)
    shared.decoder = _Memory(reader.decoder, reader.decoder.decode(plans[0].path, indices), indices)
    return shared
