"""The videos that a scan is about: a folder, a glob, a list of paths, one file, or a data set whose rows name them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import read_jsonl


def find_videos(spec: str) -> list[Path]:
    """What ``data.videos`` takes, and also JSON lines (``.jsonl``): pairs, SFT data, truths, questions, and pairs as
    TRL, ms-swift and RRPO write them. Every video comes once, in the order of its first row.

    Raises:
        InputError: nothing is found, or a folder or file cannot be read.
    """
    from tempo_fast.curate import list_videos

    path = Path(spec)
    try:
        if path.is_dir():
            os.listdir(path)
        elif path.is_file() and path.suffix.lower() == ".jsonl":
            return _of_data_set(path)
    except OSError as e:
        raise InputError(f"{spec}: cannot be read ({e.strerror})") from e
    return list_videos(spec)


def reaches(spec: str, folder: Path, names: Iterable[str]) -> bool:
    """Whether ``find_videos`` would also find one of these in the folder, where there may be none yet."""
    if os.path.isdir(spec):
        return folder.resolve().is_relative_to(Path(spec).resolve())
    if os.path.exists(spec):
        return False
    pattern, at = os.path.abspath(spec).split(os.sep), os.path.abspath(folder).split(os.sep)
    return any(_matches(pattern, [*at, name]) for name in names)


def _matches(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """As ``glob`` does: ** stands for any number of folders, and no wildcard for a name that starts with a dot."""
    if not pattern or not names:
        return all(p == "**" for p in pattern) and not names
    hidden = names[0].startswith(".") and not pattern[0].startswith(".")
    if pattern[0] == "**":
        return _matches(pattern[1:], names) or (not hidden and _matches(pattern, names[1:]))
    file_too_early = len(names) == 1 and len(pattern) > 1
    return not (hidden or file_too_early) and fnmatchcase(names[0], pattern[0]) and _matches(pattern[1:], names[1:])


def _of_data_set(path: Path) -> list[Path]:
    found: dict[Path, None] = {}
    for number, row in read_jsonl(path):
        for name in _named(f"{path}:{number}", row):
            beside = path.parent / name
            # as the readers of each format take it: beside the data set, or from the working directory
            found[beside if beside.exists() or not Path(name).exists() else Path(name)] = None
    if not found:
        raise InputError(f"{path}: no row names a video (fields video, videos, media_path)")
    return list(found)


def _named(where: str, row: dict[str, Any]) -> Iterator[str]:
    """Paths of one row; rows of text alone have none."""
    for field in ("video", "media_path"):
        value = row.get(field) or ""
        if not isinstance(value, str):
            raise InputError(f"{where}: field '{field}' must be a path, got {type(value).__name__}")
        if value:
            yield value
    videos = row.get("videos") or []
    if not isinstance(videos, list) or not all(isinstance(v, str) for v in videos):
        raise InputError(f"{where}: field 'videos' must be a list of paths")
    yield from videos
    messages = row.get("prompt")
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "video" and isinstance(part.get("video"), str):
                yield part["video"]
