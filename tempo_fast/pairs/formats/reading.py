"""Records out of any format in any container, one at a time, with what could not be taken over."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.pairs.formats import native
from tempo_fast.pairs.formats.containers import read_rows
from tempo_fast.pairs.formats.grouping import Leaf, adjacent, everywhere
from tempo_fast.pairs.formats.layouts import FORMATS, LAYOUTS, known
from tempo_fast.pairs.formats.rows import EXTRA, OWN, ForeignRow, Layout, Problem, Report, Row, RowError, own_of, to_log
from tempo_fast.schema import PreferenceRecord

log = logging.getLogger(__name__)
PEEK = 1000


class Reader:
    """Iterates over the records of a file; afterwards ``rows`` and ``skipped`` count what was read.

    ``fmt`` is the format's name, of the file where ``auto`` was asked for. Arguments as ``iter_pairs``.
    """

    def __init__(
        self, path: str | Path, fmt: str = "auto", *, r: int = 0, problems: Report | None = None, group: str = "all"
    ) -> None:
        if group not in ("all", "adjacent"):
            raise InputError(f"group must be all or adjacent, got {group!r}")
        if fmt != "auto":
            known(fmt)
        self.path, self.r, self.group = path, r, group
        self.strict = problems is None
        self.report = to_log(log) if problems is None else problems
        self.rows = self.skipped = 0
        self.found = read_rows(path)
        self.fmt = self._told() if fmt == "auto" else fmt

    def _told(self) -> str:
        """The format by the fields of the first row that looks like one."""
        head = []
        for found in islice(self.found, PEEK):
            head.append(found)
            row = found[2]
            if isinstance(row, dict) and (name := detect(row)):
                self.found = chain(head, self.found)
                return name
        if not head:
            raise InputError(f"{self.path}: holds no record")
        first = next((row for _, _, row in head if isinstance(row, dict)), head[0][2])
        fields = str(first) if isinstance(first, RowError) else f"it has {', '.join(sorted(first)) or 'no field'}"
        file, number, _ = head[0]
        raise InputError(f"{file}:{number}: no row of a format that is known ({', '.join(FORMATS)}): {fields}")

    def __iter__(self) -> Iterator[PreferenceRecord]:
        if self.fmt == "native":
            records = self._taken(native.read)
        else:
            layout = LAYOUTS[self.fmt]
            leaves = self._taken(lambda row: self._leaf(layout, row))
            records = adjacent(leaves) if self.group == "adjacent" else everywhere(leaves)
        empty = True
        for record in records:
            empty = False
            yield record
        if empty and not self.skipped:
            raise InputError(f"{self.path}: holds no record")

    def _taken(self, read: Callable[[Row], object]) -> Iterator:
        for file, number, row in self.found:
            self.rows += 1
            self.where = (file, number)
            try:
                if isinstance(row, RowError):
                    raise row
                yield read(row)
            except RowError as e:
                problem = Problem(file, number, e.field, str(e))
                if self.strict:
                    raise InputError(str(problem)) from e
                self.skipped += 1
                self.report(problem)

    def _leaf(self, layout: Layout, row: Row) -> Leaf:
        foreign = ForeignRow(row)
        pair = layout.read(foreign)
        known_columns = layout.columns | {OWN}
        if foreign.own is None:
            content = [pair.video, pair.prompt, pair.chosen]
            own: Row = {"id": digest(content)[:16]}
        else:
            known_columns |= {layout.id_column}
            own = foreign.own
        try:
            extra = {**own.get(EXTRA, {}), **{k: v for k, v in row.items() if k not in known_columns and v is not None}}
            spans = {"spans": pair.rejected_spans, "chosen_spans": pair.chosen_spans}
            answer = {
                "kind": "given", "r": self.r, **own.get("rejected", {}), "text": pair.rejected,
                **{k: v for k, v in spans.items() if v is not None},
            }  # fmt: skip
            whole = {
                "r": self.r, **own.get("record", {}), "id": own.get("id"), "video": pair.video, "prompt": pair.prompt,
                "chosen": pair.chosen, "rejected": [answer],
            }  # fmt: skip
            own_spans = foreign.own is not None and pair.chosen_spans is None
            if not own_spans:
                whole.pop("spans", None)
            record = native.read(whole)
        except (RowError, TypeError, AttributeError) as e:
            if foreign.own is None:
                raise
            raise RowError(OWN, f"is not what this program writes ({e})") from e
        for name, reason in foreign.notes:
            self.report(Problem(*self.where, name, reason, kept=True))
        same = [record.id, record.video, record.prompt, record.chosen, record.r, record.provenance]
        key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).digest()
        return Leaf(key, record, {**extra, **foreign.extra}, own_spans)


def detect(row: Row) -> str:
    """The format that a row looks like; empty when none."""
    try:
        said = (own_of(row) or {}).get("format")
    except RowError:
        said = None
    if said in LAYOUTS:
        return str(said)
    if native.claims(row):
        return "native"
    return next((name for name, layout in LAYOUTS.items() if layout.claims(row)), "")


def iter_pairs(
    path: str | Path, fmt: str = "auto", *, r: int = 0, problems: Report | None = None, group: str = "all"
) -> Iterator[PreferenceRecord]:
    """Yield the records of a file or folder of any size in constant memory.

    Args:
        path: JSON lines, a JSON array (both also gzipped), Parquet, Arrow, a folder or a pattern of such files, or a
            folder that Hugging Face's ``save_to_disk`` wrote; told by its first bytes.
        fmt: one of ``FORMATS``; ``auto`` tells it by the fields of the first row that looks like one.
        r: difficulty given to rows that do not say theirs.
        problems: called with each ``Problem``: rows that are left out, and what was not taken over exactly. Without it
            the first broken row is an InputError, and the latter go to the log.
        group: foreign formats have one row per pair; rows that agree in all but the rejected answer become one record.
            ``all`` joins them wherever they stand, in the order of first rows; all rows are read, and wait on disk,
            before the first record comes. ``adjacent`` joins neighbours only: no wait, and rows that stand apart become
            several records. Neither loses an answer.

    Raises:
        InputError: naming file, line and field, for a missing, empty or ill-typed field; for a file without rows.
    """
    yield from Reader(path, fmt, r=r, problems=problems, group=group)


def read_pairs(
    path: str | Path, fmt: str = "auto", *, r: int = 0, problems: Report | None = None
) -> list[PreferenceRecord]:
    """All records of a file that fits in memory; else as ``iter_pairs``."""
    return list(iter_pairs(path, fmt, r=r, problems=problems))
