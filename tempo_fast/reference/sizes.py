"""How much room statistics take, and whether the disk has it: known before anything is computed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch

from tempo_fast.errors import InputError
from tempo_fast.models.load import Bundle
from tempo_fast.reference.shard import MEAN, SCALARS

_PER_ANSWER = 96  # its row in the header
_PER_SHARD = 2048  # the rest of the header
_MARGIN = 2**30
_MARGIN_SHARE = 0.02


class Room(NamedTuple):
    """Answers, response tokens and bytes of what is to be computed, and the free bytes of the disk."""

    answers: int
    tokens: int
    bytes: int
    free: int

    def __str__(self) -> str:
        each = self.bytes / max(1, self.tokens)
        return (
            f"{self.answers:,} answers of {self.tokens:,} tokens, {readable(self.bytes)} ({readable(each)} a token),"
            f" {readable(self.free)} free"
        )


def bytes_per_token(bundle: Bundle, form: str) -> int:
    """Of one response token in this form: 8 (scalars), 12 + 4·D (mean_embedding), 8 + 2·D (hidden, bfloat16)."""
    d = int(bundle.config.get_text_config().hidden_size)
    if form == SCALARS:
        return 8
    if form == MEAN:
        return 12 + 4 * d
    return 8 + d * getattr(torch, form.removeprefix("hidden.")).itemsize


def room_for(root: Path, answers: int, tokens: int, shards: int, per_token: int) -> Room:
    """What so many answers take in files of so many shards, and what is free where ``root`` is or will be."""
    return Room(answers, tokens, tokens * per_token + answers * _PER_ANSWER + shards * _PER_SHARD, free_bytes(root)[0])


def free_bytes(root: Path) -> tuple[int, int]:
    """(free for us, all) bytes of the file system of a folder that may not exist yet."""
    while not root.exists() and root != root.parent:
        root = root.parent
    usage = shutil.disk_usage(os.fspath(root))
    return usage.free, usage.total


def check_room(root: Path, room: Room, form: str) -> None:
    """Refuse a fill that the disk would not hold, 2 % of it or a GiB, whichever is less, left free.

    Raises:
        InputError: one sentence with the numbers and what helps.
    """
    total = free_bytes(root)[1]
    margin = int(min(_MARGIN, _MARGIN_SHARE * total))
    if room.bytes + margin <= room.free:
        return
    larger = "set reference.store to a larger disk"
    ways = f"{larger}, or reference.keep to hidden (half of it in bfloat16)" if form == MEAN else f"or {larger}"
    raise InputError(
        f"{root}: the statistics of {room.answers:,} answers ({room.tokens:,} tokens) take {readable(room.bytes)} and"
        f" the disk has {readable(room.free)} free, of which {readable(margin)} stay free: make room (tempo-fast"
        f" reference gc), {ways}"
    )


def readable(n: float) -> str:
    """Bytes as people read them: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
