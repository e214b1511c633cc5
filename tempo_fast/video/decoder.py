"""What every decoder is, and what they share.

Shapes: F frames asked for, H and W pixels as displayed (rotation applied).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from tempo_fast.video.container import DecodeError
from tempo_fast.video.probe import VideoInfo

T = TypeVar("T")
MOST_BYTES = 1 << 30
"""Of frames that are decoded in one call, as long as it is not for a single file."""
Item = tuple[str | os.PathLike[str], Sequence[int]]
"""A file and the frame numbers wanted of it."""


class Decoder(Protocol):
    """Stateless towards its caller, and safe to use from several threads: every call names its file."""

    name: str
    route: str
    """How YUV becomes RGB; part of what identifies pixels, since decoders differ by several levels."""

    def refuses(self, info: VideoInfo) -> str:
        """Why this decoder must not be trusted with this file (about the kind of file, without its name), or ""."""
        ...

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """uint8 [F, H, W, 3] RGB in the order asked for, repeats allowed, each distinct frame decoded once.

        Raises:
            DecodeError: for anything that keeps a single one of the frames from being the right one.
        """
        ...

    def decode_many(self, items: Sequence[Item]) -> list[Tensor | DecodeError]:
        """``decode`` of each item, in order; a failure is a value in its place and harms no other."""
        ...


def one_by_one(decoder: Decoder, items: Sequence[Item]) -> list[Tensor | DecodeError]:
    """``decode_many`` for a decoder that gains nothing from batches."""
    out: list[Tensor | DecodeError] = []
    for path, indices in items:
        try:
            out.append(decoder.decode(path, indices))
        except DecodeError as e:
            out.append(e)
    return out


def in_batches(jobs: Iterable[tuple[T, int]], most: int | None = None) -> Iterator[list[T]]:
    """Jobs, each given with the bytes of its frames, in runs of at most ``MOST_BYTES`` and ``most`` jobs."""
    batch: list[T] = []
    held = 0
    for job, n_bytes in jobs:
        if batch and (len(batch) == most or held + n_bytes > MOST_BYTES):
            yield batch
            batch, held = [], 0
        batch.append(job)
        held += n_bytes
    if batch:
        yield batch


def check_refused(decoder: Decoder, info: VideoInfo) -> None:
    """Raises DecodeError where the decoder refuses the file."""
    why = decoder.refuses(info)
    if why:
        raise DecodeError(f"{info.path}: {why}; use video.backend pyav")


def pick(frames: Tensor, distinct: Sequence[int], wanted: Sequence[int]) -> Tensor:
    """The wanted ones of frames [F, ...] that are numbered ``distinct``, ascending; on the device they lie on."""
    if list(wanted) == list(distinct):
        return frames
    row = {index: k for k, index in enumerate(distinct)}
    return frames[[row[i] for i in wanted]]
