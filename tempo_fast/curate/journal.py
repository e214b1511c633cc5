"""What is known of each file, as JSON lines that survive any kill: a journal per process, all of them read by each.

A process appends to its own journal alone, and holds a lock on it while it runs. In memory are only the places of rows.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tempo_fast.errors import InputError
from tempo_fast.files import writing
from tempo_fast.runtime.shards import ALL, Shard

try:
    import fcntl
except ImportError:  # not on Windows; two processes with one journal then go unnoticed
    fcntl = None  # type: ignore[assignment]

Row = dict[str, Any]
"""``id`` (file and rules, hex), ``sample`` (ends of the content, and rules; hex), ``key`` (content and rules, hex; ""
where the content was not read), ``video``, ``status`` ok | filtered | quarantined, ``reason``, ``failure`` ("" for
findings about the file's bytes, which are final), ``timeout_s`` after a timeout, ``clips`` or None."""


@dataclass
class _File:
    path: Path
    read: int = 0
    """Bytes that are indexed; a line that is not whole yet comes later."""
    handle: BinaryIO | None = None


class Place(NamedTuple):
    """Where a row lies; ``final`` where it is not tried again, ``old`` where it lay there when this process began."""

    file: int
    offset: int
    final: bool
    old: bool


class Journals:
    """All journals of a folder. Of rows about the same file the first final one counts, else the last.

    Args:
        folder: made when missing.
        shard: whose journal is written.

    Raises:
        InputError: the folder cannot be written, or another process has this shard.
    """

    def __init__(self, folder: Path, shard: Shard = ALL) -> None:
        self.folder = folder
        self._own = folder / name_of(shard)
        self._files: list[_File] = []
        self._places: dict[bytes, Place] = {}
        self._samples: dict[bytes, Place] = {}
        self._old = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._own, "a+b")
        except OSError as e:
            raise InputError(f"{self._own}: cannot be written ({e.strerror})") from e
        try:
            if not _try_lock(self._lock, tries=10):  # ``runs`` of other processes holds it for a moment
                raise InputError(
                    f"{self._own}: another process writes it; each needs its own part of the work, or its own folder"
                )
            with writing(self._own):
                self._cut_torn_line()
            self.refresh()
        except BaseException:
            self.close()
            raise
        self._old = False

    def _cut_torn_line(self) -> None:
        """What a kill left of the last line of our own journal goes. Others' are theirs to cut."""
        size = at = self._lock.seek(0, os.SEEK_END)
        while at > 0:
            start = max(0, at - (1 << 16))
            self._lock.seek(start)
            newline = self._lock.read(at - start).rfind(b"\n")
            if newline >= 0:
                at = start + newline + 1
                break
            at = start
        if at < size:
            self._lock.truncate(at)

    def refresh(self) -> None:
        """Index what has been appended since the last time, by us or others."""
        known = {f.path for f in self._files}
        self._files += [_File(p) for p in sorted(self.folder.glob("journal*.jsonl")) if p not in known]
        for number, file in enumerate(self._files):
            try:
                with open(file.path, "rb") as f:
                    f.seek(file.read)
                    for line in f:
                        if not line.endswith(b"\n"):
                            break
                        self._index(number, file.read, line)
                        file.read += len(line)
            except OSError as e:
                raise InputError(f"{file.path}: cannot be read ({e.strerror})") from e

    def _index(self, number: int, offset: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            name, sample = bytes.fromhex(row["id"]), bytes.fromhex(row["sample"])
            place = Place(number, offset, not row["failure"], self._old)
            alike = place.final and bool(row["key"])
        except (ValueError, KeyError, TypeError):
            return  # a line damaged on disk, or of another version: done again
        before = self._places.get(name)
        if before is None or not before.final:
            self._places[name] = place
        if alike:
            self._samples.setdefault(sample, place)

    def append(self, row: Row) -> None:
        """Keep a row, whatever happens to this process or machine from now on. Raises InputError on a full disk."""
        line = json.dumps(row).encode() + b"\n"  # ASCII: names whose bytes are not UTF-8 survive
        number, file = next((n, f) for n, f in enumerate(self._files) if f.path == self._own)
        with writing(self._own):
            self._lock.write(line)
            self._lock.flush()
            os.fsync(self._lock.fileno())
        self._index(number, file.read, line)
        file.read += len(line)

    def place(self, name: bytes) -> Place | None:
        """Where the row of a file lies."""
        return self._places.get(name)

    def row(self, name: bytes) -> Row | None:
        """The row of a file."""
        place = self._places.get(name)
        return None if place is None else self.at(place)

    def alike(self, sample: bytes) -> Place | None:
        """Where the first finding about a file with these ends lies."""
        return self._samples.get(sample)

    def at(self, place: Place) -> Row:
        """The row that lies in a place."""
        file = self._files[place.file]
        if file.handle is None:
            try:
                file.handle = open(file.path, "rb")
            except OSError as e:
                raise InputError(f"{file.path}: cannot be read ({e.strerror})") from e
        file.handle.seek(place.offset)
        row: Row = json.loads(file.handle.readline())
        return row

    def runs(self, shard: Shard) -> bool:
        """Whether a process is at work on this shard now. (Never known where files cannot be locked.)"""
        path = self.folder / name_of(shard)
        if path == self._own:
            return True
        try:
            with open(path, "rb") as f:
                return not _try_lock(f, shared=True)
        except OSError:
            return False

    def __enter__(self) -> Journals:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Can be called again."""
        for f in (*(file.handle for file in self._files), self._lock):
            if f is not None:
                f.close()


def name_of(shard: Shard) -> str:
    """The file name of a shard's journal."""
    return "journal.jsonl" if shard.count == 1 else f"journal-{shard.index}-of-{shard.count}.jsonl"


def _try_lock(file: BinaryIO, *, shared: bool = False, tries: int = 1) -> bool:
    """False where another process holds it; True where the file system knows no locks."""
    if fcntl is None:
        return True
    for _ in range(tries):
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if tries > 1:
                time.sleep(0.1)
        except OSError:
            return True
    return False
