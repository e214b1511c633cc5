"""Records into any format, the container told by the file's name; complete or absent."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tempo_fast.errors import InputError
from tempo_fast.files import new_folder, write_atomic
from tempo_fast.pairs.formats import native
from tempo_fast.pairs.formats.layouts import LAYOUTS, known
from tempo_fast.pairs.formats.rows import EXTRA, OTHER_MEDIA, OWN, Layout, Problem, Report, Row, dumps, to_log
from tempo_fast.schema import PreferenceRecord

log = logging.getLogger(__name__)


def write_pairs(
    path: str | Path, records: Iterable[PreferenceRecord], fmt: str = "native", *, problems: Report | None = None
) -> None:
    """Write records, one in memory at a time, atomically.

    Args:
        path: ends with ``.jsonl`` (one object a line), ``.json`` (an array), either with ``.gz``, or ``.parquet``;
            without a suffix, or with a slash at its end, a new folder with one Parquet file that Hugging Face's
            ``load_dataset`` takes.
        fmt: one of ``FORMATS``. A foreign format gets one row a pair; what it has no field for goes into its column
            ``tempo_fast``, so that all comes back on reading, and in JSON the extra columns of a record's source stand
            beside it.
        problems: called with each ``Problem``: texts that hold what the format's own readers take for a tag. Without
            it they go to the log.

    Raises:
        InputError: the format or suffix is not known, the folder exists, or the file cannot be written.
    """
    known(fmt)
    report = to_log(log) if problems is None else problems
    schema = native.SCHEMA if fmt == "native" else {**LAYOUTS[fmt].schema, OWN: str}
    rows = _native(records) if fmt == "native" else _foreign(str(path), records, LAYOUTS[fmt], report)
    name = str(path)
    path = Path(path)
    suffixes = [s.lower() for s in path.suffixes]
    if not suffixes or name.endswith("/") or path.is_dir():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path}: exists; name a new folder, or a file that ends with {_SUFFIXES}")
        with new_folder(path) as folder:
            (folder / "data").mkdir()
            with open(folder / "data" / "train-00000-of-00001.parquet", "wb") as f:
                _parquet(path)(f, rows, schema)
    elif suffixes[-1] == ".parquet":
        write = _parquet(path)
        write_atomic(path, lambda f: write(f, rows, schema))
    elif suffixes[-1] in _JSON:
        put = _JSON[suffixes[-1]]
        write_atomic(path, lambda f: put(f, rows))
    elif suffixes[-1] == ".gz" and suffixes[-2:-1] and suffixes[-2] in _JSON:
        put = _JSON[suffixes[-2]]

        def zipped(f: BinaryIO) -> None:
            with gzip.GzipFile("", "wb", fileobj=f, mtime=0) as z:  # no name and time in it: equal rows, equal bytes
                put(z, rows)  # type: ignore[arg-type]

        write_atomic(path, zipped)
    else:
        raise InputError(f"{path}: the name must end with {_SUFFIXES}, or be that of a new folder")


def _lines(f: BinaryIO, rows: Iterable[Row]) -> None:
    for row in rows:
        f.write(dumps(row).encode() + b"\n")


def _array(f: BinaryIO, rows: Iterable[Row]) -> None:
    f.write(b"[")
    for i, row in enumerate(rows):
        f.write((b",\n" if i else b"\n") + dumps(row).encode())
    f.write(b"\n]\n")


_JSON: dict[str, Callable[[BinaryIO, Iterable[Row]], None]] = {".jsonl": _lines, ".ndjson": _lines, ".json": _array}
_SUFFIXES = ".jsonl, .json (either with .gz) or .parquet"


def _parquet(path: Path) -> Callable[[BinaryIO, Iterable[Row], dict[str, Any]], None]:
    try:
        from tempo_fast.pairs.formats.arrow import write_parquet
    except ImportError as e:
        raise InputError(f"{path}: is written by pyarrow: pip install tempo-fast[formats] ({e})") from e
    return write_parquet


def _native(records: Iterable[PreferenceRecord]) -> Iterator[Row]:
    return (native.write(record) for record in records)


def _foreign(path: str, records: Iterable[PreferenceRecord], layout: Layout, report: Report) -> Iterator[Row]:
    hidden = {OWN, *layout.columns, *OTHER_MEDIA}  # columns that would say something else about the row
    for number, record in enumerate(records, 1):
        texts = {"prompt": [record.prompt], "chosen": [record.chosen], "rejected": [x.text for x in record.rejected]}
        for name, found in texts.items():
            held = [tag for tag in layout.tags if any(tag in text for text in found)]
            if held:
                reason = f"field '{name}' holds {', '.join(held)}, which readers of {layout.name} take for a tag"
                report(Problem(path, number, name, f"record {record.id}: {reason}", kept=True))
        about = {k: v for k, v in vars(record).items() if k not in ("id", "video", "prompt", "chosen", "rejected")}
        extras = native.extra_of(record)
        if any(extras):  # they go with their rows; anything else under this name stays as it is
            about["provenance"] = {k: v for k, v in record.provenance.items() if k != EXTRA}
        for rejected, extra in zip(record.rejected, extras, strict=True):
            row = layout.write(record, rejected, extra)
            answer = {k: v for k, v in vars(rejected).items() if k != "text"}
            own = {
                "format": layout.name,
                "id": record.id,
                "record": about,
                "rejected": answer,
                **({EXTRA: extra} if extra else {}),
            }
            row[OWN] = dumps(own)
            yield {**row, **{k: v for k, v in extra.items() if k not in hidden and k not in row}}
