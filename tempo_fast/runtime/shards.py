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

def this_shard(environ: Mapping[str, str] | None = None) -> Shard:
    """This process's part: of ``torchrun``'s ranks, else of a SLURM array and the tasks that ``srun`` starts, else all.

    A SLURM array counts from its smallest number in steps of one (``--array=0-15``, ``--array=1-16``); each of its jobs
    may run several tasks (``srun``). A batch script without ``srun`` is one process, whatever ``--ntasks`` says.

    Raises:
        InputError: variables that contradict one another (an array with gaps).
    """
    env = os.environ if environ is None else environ
    if ranks := _part(env, "RANK", "WORLD_SIZE"):
        return ranks
    array = _part(env, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN") or ALL
    tasks = ALL
    if env.get("SLURM_STEP_ID"):  # set by srun; the script itself sees number 0 of all tasks
        tasks = _part(env, "SLURM_PROCID", "SLURM_NTASKS") or ALL
    return Shard(array.index * tasks.count + tasks.index, array.count * tasks.count)


def _part(env: Mapping[str, str], index: str, count: str, first: str = "") -> Shard | None:
    """The part that three variables name, None where one of the first two is not set: half a launcher is none."""
    if not (env.get(index) and env.get(count)):
        return None
    try:
        return _checked(int(env[index]) - int(env.get(first) or 0), int(env[count]))
    except ValueError as e:
        raise InputError(f"{index}={env[index]}, {count}={env[count]}: {e}") from e


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
