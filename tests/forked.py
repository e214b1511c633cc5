"""Work in forked processes: as real as any other, without seconds of imports."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child; returns its process id. An exception is printed and ends it with 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def reap(pid: int) -> int:
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(*works: Callable[[], object]) -> list[int]:
    """Exit codes of children that run at the same time."""
    return [reap(pid) for pid in [fork(work) for work in works]]
