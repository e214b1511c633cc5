"""``tempo-fast pairs convert``: preference data from one format and container to another, at any size."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tempo_fast.errors import InputError
from tempo_fast.files import write_atomic
from tempo_fast.pairs.formats import Problem, write_pairs
from tempo_fast.pairs.formats.layouts import FORMATS, known
from tempo_fast.pairs.formats.llama_factory import dataset_info
from tempo_fast.pairs.formats.reading import Reader
from tempo_fast.schema import PreferenceRecord

LISTED = 20
"""Problems listed on stderr."""


@dataclass(frozen=True)
class ConvertOptions:
    """``read_as`` and ``write_as`` are names of formats; ``auto`` tells the former by the rows. ``r``: difficulty of
    rows that do not say theirs. ``problems``: JSON lines with every problem (file, line, field, reason, kept).
    ``strict``: any problem is an error. ``group``: as ``iter_pairs`` takes it."""

    read_as: str = "auto"
    write_as: str = "native"
    r: int = 0
    problems: Path | None = None
    strict: bool = False
    group: str = "all"


@dataclass(frozen=True)
class Converted:
    """Counts: rows read, records and rejected answers written, rows left out, rows or records not exactly kept."""

    source: str
    out: str
    rows: int
    records: int
    answers: int
    skipped: int
    noted: int

    def __str__(self) -> str:
        noted = f", {self.noted} taken over with a remark" if self.noted else ""
        answers = f" with {self.answers} rejected answers" if self.answers != self.records else ""
        return f"{self.rows} rows read, {self.records} records{answers} written, {self.skipped} skipped{noted}"


def convert(source: str | Path, out: str | Path, options: ConvertOptions | None = None) -> Converted:
    """Convert ``source`` into ``out``, which is complete or, on any error or interruption, as it was before.

    The first problems go to stderr and, where it is wanted, all go to a file, also when this ends in an error.

    Raises:
        InputError: no row is good; any problem where ``strict``; files that cannot be read or written.
    """
    options = options or ConvertOptions()
    known(options.write_as)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        tally = _Tally(spool)
        reader = Reader(source, options.read_as, r=options.r, problems=tally, group=options.group)
        counts: Counter[str] = Counter()

        def records() -> Iterator[PreferenceRecord]:
            for record in reader:
                counts["records"] += 1
                counts["answers"] += len(record.rejected)
                yield record
            # said here, so that nothing is written
            if not counts["records"]:
                raise InputError(f"{source}: none of {reader.rows} rows is good as {reader.fmt}; {tally.first}")

        def checked() -> Iterator[PreferenceRecord]:
            yield from records()
            if options.strict and tally.count:
                raise InputError(f"{source}: {tally.count} problems, and --strict allows none; {tally.first}")

        try:
            write_pairs(out, checked(), options.write_as, problems=tally)
        except InputError:
            tally.close(options.problems)
            raise
        tally.close(options.problems)
    return Converted(
        source=f"{source} ({reader.fmt})", out=f"{out} ({options.write_as})", rows=reader.rows, skipped=reader.skipped,
        noted=tally.kept, **counts,
    )  # fmt: skip


class _Tally:
    """Takes problems: the first to stderr, all to a temporary file."""

    def __init__(self, spool: IO[str]) -> None:
        self.spool = spool
        self.count = self.kept = 0
        self.first = ""

    def __call__(self, problem: Problem) -> None:
        self.count += 1
        self.kept += problem.kept
        self.first = self.first or str(problem)
        if self.count <= LISTED:
            print(f"{'note: ' if problem.kept else ''}{problem}", file=sys.stderr)
        row = asdict(problem)
        self.spool.write(json.dumps({"file": row.pop("path"), **row}, ensure_ascii=True) + "\n")

    def close(self, path: Path | None) -> None:
        if self.count > LISTED:
            where = "" if path else ", --problems FILE takes all"
            print(f"and {self.count - LISTED} more{where}", file=sys.stderr)
        if path:
            self.spool.flush()
            self.spool.seek(0)
            write_atomic(path, lambda f: shutil.copyfileobj(self.spool.buffer, f))  # type: ignore[attr-defined]


def convert_command(source: str, out: str, options: ConvertOptions) -> None:
    """``tempo-fast pairs convert``: convert, and say on stdout what was done and how to use it."""
    places = {"OUT": Path(out), "--problems": options.problems, "IN": Path(source)}
    seen: dict[Path, str] = {}
    for name, path in places.items():
        if path is not None and (other := seen.setdefault(path.resolve(), name)) != name:
            raise InputError(f"pairs convert: {name} and {other} are the same file, {path}")
    if options.r < 0:
        raise InputError(f"pairs convert: --r must be 0 or more, got {options.r}")
    done = convert(source, out, options)
    print(f"{done.out}: {done} (from {done.source})")
    if options.write_as == "llama-factory":
        entry = json.dumps(dataset_info(out), indent=2, ensure_ascii=False)
        print(f"LLaMA-Factory's dataset_info.json, in the same folder, needs the entry:\n{entry}")


__all__ = ["FORMATS", "ConvertOptions", "Converted", "convert", "convert_command"]
