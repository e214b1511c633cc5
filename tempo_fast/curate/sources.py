"""Which videos a user means, and what tells one file from another without reading all of it."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from tempo_fast.errors import InputError

VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
}  # fmt: skip
_LIST_SUFFIXES = {".txt", ".lst", ".list"}
_EDGE = 1 << 15


@dataclass(frozen=True)
class Stamp:
    """What a file is known by between runs: ``size`` in bytes, ``mtime_ns``, and ``sample``, a digest (hex) of its size
    and its first and last 32 KiB: of the content alone, and so the same under any name."""

    size: int
    mtime_ns: int
    sample: str


def stamp_of(path: str) -> Stamp | None:
    """None where there is no readable file: curating it says why. Costs two reads, whatever the size."""
    try:
        if not os.path.isfile(path):  # to open a pipe would wait for its writer
            return None
        with open(path, "rb") as f:
            stat = os.fstat(f.fileno())
            ends = hashlib.sha256(b"%d " % stat.st_size + f.read(_EDGE))
            f.seek(max(0, stat.st_size - _EDGE))
            ends.update(f.read(_EDGE))
    except OSError:
        return None
    return Stamp(stat.st_size, stat.st_mtime_ns, ends.hexdigest())


def list_videos(spec: str) -> list[Path]:
    """The videos a user means: a folder (with subfolders), a glob, one video file, or a text file with a path a line.

    Folders give files with a video's suffix, sorted; lines of a text file are relative to that file, ``#`` starts a
    comment, and are kept even when no such file exists (the run then names it in the quarantine).

    Raises:
        InputError: nothing is found.
    """
    path = Path(spec)
    if not spec:
        raise InputError("data.videos: is empty; give a folder, a glob, or a text file with one path a line")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"data.videos: {spec} holds no video files ({', '.join(sorted(VIDEO_SUFFIXES))})")
        return found
    if path.is_file():
        if path.suffix.lower() not in _LIST_SUFFIXES:
            return [path]
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"data.videos: {spec} cannot be read as a list of paths ({e})") from e
        names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not names:
            raise InputError(f"data.videos: {spec} lists no paths")
        return [path.parent / name for name in dict.fromkeys(names)]
    matches = sorted(p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file())
    if not matches:
        raise InputError(f"data.videos: {spec} matches no file")
    return matches
