"""The file of a scan's rows: appended to as they come, put in order at the end, resumed from after a kill."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tempo_fast.errors import InputError
from tempo_fast.files import write_atomic, writing

Row = dict[str, Any]
"""What is known of one video; ``video`` (its path), ``ok`` and ``reason`` are always there."""


def _line(row: Row) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name whose bytes are not UTF-8
        return json.dumps(row).encode() + b"\n"


def _is_row(value: object) -> bool:
    return isinstance(value, dict) and {"ok", "settings"} <= value.keys() and isinstance(value.get("video"), str)


def _is_torn(line: bytes) -> bool:
    """Whether these bytes, which are no JSON, are the beginning of a row, as left by a kill or a full disk."""
    start, then = b'{"video": "', b'", "ok": '
    if line.endswith(b"\n") or not line.startswith(start):
        return start.startswith(line)
    rest = re.sub(rb'^(?:[^"\\]|\\.?)*', b"", line[len(start) :])
    return then.startswith(rest) or rest.startswith(then)


class RowFile:
    """Rows by their ``video``; a later one takes the place of an earlier. In memory there are only their places.

    Args:
        path: the file; None keeps rows in a nameless temporary one.
        fresh: forget what the file holds.

    Raises:
        InputError: the file holds something else than a scan's rows, or cannot be written.
    """

    def __init__(self, path: Path | None, *, fresh: bool = False) -> None:
        self.path = path
        self._at: dict[str, int] = {}
        self._file: BinaryIO
        if path is None:
            self._file = tempfile.TemporaryFile()
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # a device would give its name to a plain file
                raise InputError(f"{path}: is not a plain file")
            self._file = open(path, "a+b")
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})") from e
        try:
            size = self._index(path)  # all of the file is looked at before any of it is changed
        except InputError:
            self.close()
            raise
        if fresh:
            self._at.clear()
        self._file.truncate(0 if fresh else size)

    def _index(self, path: Path) -> int:
        """Note where rows stand; bytes up to the end of the last whole one."""
        self._file.seek(0)
        size = 0
        for number, line in enumerate(self._file, 1):
            row: Row = {}
            try:
                row = json.loads(line)
                ours = _is_row(row)
            except (ValueError, RecursionError):
                ours = _is_torn(line)
            if not ours:
                raise InputError(
                    f"{path}: line {number} was not written by a scan and would be overwritten; choose another name"
                )
            if line.endswith(b"\n"):
                self._at[row["video"]] = size
                size += len(line)
        return size

    def get(self, video: str) -> Row | None:
        """The last row about this video."""
        at = self._at.get(video)
        if at is None:
            return None
        self._file.seek(at)
        row: Row = json.loads(self._file.readline())
        return row

    def append(self, row: Row) -> None:
        """Keep a row, whatever happens to this process from now on. Raises InputError on a full disk."""
        with writing(self.path or tempfile.gettempdir()):
            self._at[row["video"]] = self._file.seek(0, os.SEEK_END)
            self._file.write(_line(row))
            self._file.flush()

    def ordered(self, videos: Iterable[str]) -> Iterator[Row]:
        """The rows of these videos, in this order."""
        for video in videos:
            row = self.get(video)
            if row is not None:
                yield row

    def finish(self, videos: Iterable[str]) -> None:
        """Put the file in order, atomically; rows of other videos go."""
        if self.path is not None:
            write_atomic(self.path, lambda f: f.writelines(_line(row) for row in self.ordered(videos)))
        self.close()

    def close(self) -> None:
        """Can be called again."""
        try:
            self._file.close()
        except OSError:  # the rest of a row that found no room, which ``append`` has told of
            pass
