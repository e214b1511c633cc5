"""Files and digests: atomic writes, JSON lines with line-numbered errors, content digests."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tempo_fast.errors import InputError


def to_plain(obj: Any) -> Any:
    """Dataclasses, paths, tuples and sets to what JSON can hold."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: to_plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, dict):
        return {str(k): to_plain(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_plain(v) for v in obj]
    if isinstance(obj, (set, frozenset)):
        return sorted(to_plain(v) for v in obj)
    if isinstance(obj, Path):
        return str(obj)
    return obj


def canonical_json(obj: Any) -> str:
    """One spelling per value: sorted keys, no spaces, no NaN. What digests are taken of."""
    return json.dumps(to_plain(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(obj: Any) -> str:
    """SHA-256 (hex, 64 characters) of the canonical JSON of ``obj``."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes. Raises InputError when it cannot be read."""
    h = hashlib.sha256()  # hashlib.file_digest is not in Python 3.10
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                h.update(block)
        return h.hexdigest()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def write_atomic(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary name beside ``path``, sync, rename: the file is complete or absent.

    Raises InputError on a full disk, a read-only folder or a missing permission, naming the path.
    """
    path = Path(path)
    # processes on several machines may share a folder, and in containers their numbers
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(tmp, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(tmp, path)
    finally:
        if path.parent.is_dir():
            tmp.unlink(missing_ok=True)


_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def drop_stale(folder: str | os.PathLike[str], pattern: str = ".*.tmp", older_than_s: float = 86_400) -> None:
    """Delete what killed processes left in a folder: files and folders of this pattern and age in seconds; by default
    what ``write_atomic`` had not finished."""
    now = time.time()
    for path in Path(folder).glob(pattern):
        try:
            if now - path.stat().st_mtime <= older_than_s:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError:  # another process was faster
            pass


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, a full disk, a read-only folder or a missing permission is an InputError that names ``path``.

    Libraries that write in Rust or C++ hide the error number; they are known by their words.
    """
    try:
        yield
    except OSError as e:
        if e.errno in _THE_DISK:
            raise InputError(f"{path}: cannot be written ({e.strerror})") from e
        raise
    except Exception as e:
        full = os.strerror(errno.ENOSPC)
        if full in str(e) or "PytorchStreamWriter failed" in str(e):
            raise InputError(f"{path}: cannot be written ({full})") from e
        raise


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Readable JSON, written atomically."""
    text = json.dumps(to_plain(obj), indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda f: f.write(text.encode()))


def read_json(path: str | os.PathLike[str]) -> Any:
    """Raises InputError when the file is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e})") from e


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Any]) -> None:
    """One JSON object a line, written atomically."""

    def write(f: BinaryIO) -> None:
        for row in rows:
            f.write(json.dumps(to_plain(row), ensure_ascii=False).encode() + b"\n")

    write_atomic(path, write)


def read_jsonl(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object). Raises InputError naming file and line."""
    try:
        f = open(path, encoding="utf-8")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    with f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as e:
                    raise InputError(f"{path}:{number}: not valid JSON ({e})") from e
                if not isinstance(row, dict):
                    raise InputError(f"{path}:{number}: expected an object, got {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as e:
            raise InputError(f"{path}: not UTF-8 text ({e.reason})") from e


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Flush every file below ``folder`` to disk, so that a rename after it never exposes a torn one."""
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, beside ``folder``; at the end it takes its place: complete or absent.

    Raises InputError naming ``folder`` for a full disk or a missing permission; what was there before stays.
    """
    folder = Path(folder)
    tmp, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    with writing(folder):
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
            yield tmp
            sync_tree(tmp)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            tmp.rename(folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
