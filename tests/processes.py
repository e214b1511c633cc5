"""Watching other processes."""

import time
from collections.abc import Callable
from pathlib import Path


def stat_of(pid: int) -> list[str]:
    """Fields of proc(5)'s stat, from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def alive(pid: int) -> bool:
    """Running, and not merely unburied."""
    try:
        return stat_of(pid)[0] != "Z"
    except OSError:
        return False


def until(happened: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Wait for it; False when it has not happened in time."""
    stop = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > stop:
            return False
        time.sleep(0.01)
    return True
