"""Rows out of files: JSON lines, JSON arrays, Parquet, Arrow, each plain or in a folder; one row in memory at a time.

What a file is, its first bytes say, not its name; JSON may be gzipped. A folder is one that Hugging Face's
``save_to_disk`` wrote, or holds files of the above. Parquet and Arrow need pyarrow (extra ``formats``).
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import read_json
from tempo_fast.pairs.formats.arrays import read_array
from tempo_fast.pairs.formats.rows import Row, RowError

_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_DATA = (".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".arrow")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(.+?)-\d+-of-\d+")

Found = tuple[str, int, "Row | RowError"]
"""(file, number from 1, the row or why it is none)"""


def read_rows(path: str | Path) -> Iterator[Found]:
    """Yield every row of a file, a folder or a pattern's files, in order; the number is that of the line in JSON lines
    and of the row elsewhere.

    Raises InputError where nothing is found, a folder holds several splits, or pyarrow is needed and missing.
    """
    for file in _files(path):
        try:
            with open(file, "rb") as f:
                for number, row in _rows_of(f):
                    yield str(file), number, row
        except OSError as e:
            raise InputError(f"{file}: cannot be read ({e.strerror or e})") from e


def _files(path: str | Path) -> list[Path]:
    path = Path(path)
    if not path.exists() and glob.has_magic(str(path)):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise InputError(f"{path}: no file has such a name")
        return [Path(p) for p in matches]
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        if len(splits) != 1:
            raise InputError(f"{path}: holds the splits {', '.join(splits)}; name the folder of one")
        return _files(path / splits[0])
    if (path / "state.json").is_file():
        return [path / entry["filename"] for entry in read_json(path / "state.json").get("_data_files", [])]
    found = sorted(
        p
        for p in path.rglob("*")
        if p.suffix.lower() in _DATA
        and p.name not in _NOT_DATA
        and not any(x.startswith(".") for x in p.relative_to(path).parts)
    )
    if not found:
        raise InputError(f"{path}: holds no file of rows ({', '.join(_DATA)})")
    splits = sorted({m.group(1) for p in found if (m := _SHARD.match(p.name))})
    if len(splits) > 1:
        raise InputError(f"{path}: holds the splits {', '.join(splits)}; name the files of one, as in '{splits[0]}-*'")
    return found


def _rows_of(f: BufferedReader) -> Iterator[tuple[int, Row | RowError]]:
    magic = f.peek(8)[:8]  # a pipe cannot go back
    if magic[:4] == b"PAR1" or magic[:6] == b"ARROW1" or magic[:4] == b"\xff\xff\xff\xff":
        try:
            from tempo_fast.pairs.formats.arrow import read_arrow
        except ImportError as e:
            raise InputError(f"{f.name}: is read by pyarrow: pip install tempo-fast[formats] ({e})") from e
        yield from read_arrow(f, magic)
    elif magic[:2] == b"\x1f\x8b":
        yield from _damaged(_json(gzip.GzipFile(fileobj=f)))
    else:
        yield from _json(f)


def _damaged(rows: Iterator[tuple[int, Row | RowError]]) -> Iterator[tuple[int, Row | RowError]]:
    number = 0
    try:
        for number, row in rows:
            yield number, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        yield number + 1, RowError("", f"the file is damaged from here on ({e})")


def _json(f: Any) -> Iterator[tuple[int, Row | RowError]]:
    if f.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        for number, (text, value) in enumerate(read_array(f), 1):
            yield number, RowError("", text) if isinstance(value, ValueError) else _checked(text, value)
        return
    for number, line in enumerate(f, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> Row | RowError:
    try:
        text = line.decode()
        value = json.loads(text, parse_constant=lambda _: None)
    except UnicodeDecodeError as e:
        return RowError("", f"not UTF-8 text at byte {e.start + 1} of the line ({e.reason})")
    except (ValueError, RecursionError) as e:
        return RowError("", f"not valid JSON ({e})")
    return _checked(text, value)


def _checked(text: str, value: Any) -> Row | RowError:
    """An object whose texts can be written again: JSON can spell half of a character outside the basic plane."""
    if not isinstance(value, dict):
        return RowError("", f"expected an object, got {type(value).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        return RowError("", "not UTF-8 text")
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RowError("", "holds half of a surrogate pair, which is no text")
    return value
