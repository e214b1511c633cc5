"""Who uses a reference's folder: one small file per open store, touched while it is used.

No locks, which shared file systems keep badly. A process registers *before* it lists the shards; whoever wants to
delete moves files aside, looks for holders *afterwards*, and puts them back when one has come. A holder's file that
nobody has touched for a day counts no more, at once where its process is known to be gone: on the same machine.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = "live"
EXPIRES_S = 86_400.0
"""Age of a touch after which a holder on another machine counts as gone."""
_BEAT_S = 60.0


@lru_cache(maxsize=1)
def _machine() -> str:
    """Where process numbers mean the same: host, boot, and container."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if "ns" in path else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return "|".join(parts)


class Holder:
    """Registers this process with a reference's folder until ``release`` or the end of the process.

    In a folder that cannot be written nobody is registered, and nothing can be deleted.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / FOLDER / f"{os.getpid()}.{uuid.uuid4().hex[:12]}.json"
        self._beaten = time.monotonic()
        told = {"machine": _machine(), "pid": os.getpid(), "started": _start_of(os.getpid())}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(told))
        except OSError:
            pass
        self._end = weakref.finalize(self, _unregister, self.path, os.getpid())

    def beat(self) -> None:
        """Say that the store is in use; costs nothing within a minute of the last time."""
        now = time.monotonic()
        if now - self._beaten < _BEAT_S:
            return
        self._beaten = now
        try:
            os.utime(self.path)
        except OSError:
            pass

    def release(self) -> None:
        self._end()


def _unregister(path: Path, pid: int) -> None:
    if os.getpid() != pid:  # a fork of the holder
        return
    try:
        path.unlink(missing_ok=True)
        path.parent.rmdir()
    except OSError:  # others are there
        pass


def holders(root: Path, *, sweep: bool = True) -> int:
    """How many use this reference; with ``sweep`` the files of those that are gone are deleted."""
    found = 0
    for path in (root / FOLDER).glob("*.json"):
        try:
            age = time.time() - path.stat().st_mtime
            told: dict[str, Any] = json.loads(path.read_text())
        except OSError:  # released meanwhile
            continue
        except ValueError:  # being written
            told = {}
        if age < EXPIRES_S and not (told.get("machine") == _machine() and not _runs(told)):
            found += 1
        elif sweep:
            path.unlink(missing_ok=True)
    return found


def _runs(told: dict[str, Any]) -> bool:
    started = _start_of(int(told["pid"]))
    return started is not None and started == told.get("started")


def _start_of(pid: int) -> int | None:
    """When a process of this machine was started, which tells it from a later one of the same number; None when it is
    gone, 0 where the system does not tell."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state[0] == "Z" else int(state[19])
    except (OSError, IndexError, ValueError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return None if Path("/proc/self/stat").exists() else 0
