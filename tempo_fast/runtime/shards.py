"""One of several processes, on one machine or on many, that share work without talking to one another.

Work is dealt by content digest, so that every process knows its part without being told, and a file keeps its process
when others come and go.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tempo_fast.errors import InputError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def holds(self, digest: str) -> bool:
        """Whether what has this digest (hex) is this shard's."""
        return int(digest[:15], 16) % self.count == self.index

    def takes(self, number: int) -> bool:
        """Whether the piece of work of this number, counted from 0, is this shard's."""
        return number % self.count == self.index


ALL = Shard()
"""Everything: one process."""

# (index, count, offset of the index) as launchers name them; the first whose variables are set decides
_SOURCES = (
    ("RANK", "WORLD_SIZE", ""),
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
    ("SLURM_PROCID", "SLURM_NTASKS", ""),
)


def this_shard(environ: Mapping[str, str] | None = None) -> Shard:
    """This process's part: of ``torchrun``'s ranks, else of a SLURM array, else of a SLURM step, else all of it.

    A SLURM array counts from its smallest number in steps of one (``--array=0-15``, ``--array=1-16``).

    Raises:
        InputError: variables that contradict one another (an array with gaps).
    """
    env = os.environ if environ is None else environ
    for index_name, count_name, first_name in _SOURCES:
        if env.get(index_name, "") and env.get(count_name, ""):
            try:
                first = int(env.get(first_name, "0") or 0) if first_name else 0
                return _checked(int(env[index_name]) - first, int(env[count_name]))
            except ValueError as e:
                raise InputError(f"{index_name}={env[index_name]}, {count_name}={env[count_name]}: {e}") from e
    return ALL


def parse_shard(text: str) -> Shard:
    """``3/16`` -> the fourth of sixteen. Raises InputError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match:
        raise InputError(f"a shard is written index/count, such as 0/4, got {text!r}")
    try:
        return _checked(int(match[1]), int(match[2]))
    except ValueError as e:
        raise InputError(f"shard {text}: {e}") from e


def _checked(index: int, count: int) -> Shard:
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"there is no part {index} of {count}, counted from 0")
    return Shard(index, count)
