"""Our own rows: PreferenceRecord as JSON, every field checked.

In Parquet and Arrow, ``provenance`` is a JSON string. Columns that a record does not have become extra of each of its
answers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from tempo_fast.pairs.formats.rows import EXTRA, Row, RowError, Span, plain, text_of
from tempo_fast.schema import PreferenceRecord, Rejected

RECORD, ANSWER = get_type_hints(PreferenceRecord), get_type_hints(Rejected)
_NEEDED = {
    cls: {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for cls in (PreferenceRecord, Rejected)
}
SCHEMA: dict[str, Any] = {
    name: [ANSWER] if name == "rejected" else str if get_origin(hint) is dict else hint for name, hint in RECORD.items()
}


def write(record: PreferenceRecord) -> Row:
    """The record as a row; shares its lists."""
    return {**vars(record), "rejected": [vars(x) for x in record.rejected]}


def claims(row: Row) -> bool:
    """Whether a row looks like ours."""
    rejected = row.get("rejected")
    return isinstance(rejected, list) and all(isinstance(x, dict) and "text" in x for x in rejected)


def read(row: Row) -> PreferenceRecord:
    """The record of a row. Raises RowError for a missing, empty or ill-typed field, and spans outside their text."""
    for name in ("id", "prompt", "chosen"):
        text_of(row, name)
    if isinstance(row.get("provenance"), str):
        try:
            row = {**row, "provenance": json.loads(row["provenance"])}
        except ValueError as e:
            raise RowError("provenance", f"is not valid JSON ({e})") from e
    answers = row.get("rejected")
    if not isinstance(answers, list) or not all(isinstance(x, dict) for x in answers):
        raise RowError("rejected", "is missing" if answers is None else "must be a list of answers")
    if not answers:
        raise RowError("rejected", "is empty")
    chosen, found = row["chosen"], [_answer(x, i, row["chosen"]) for i, x in enumerate(answers)]
    record = PreferenceRecord(**{**_typed(row, PreferenceRecord), "rejected": found})
    _inside(record.spans, chosen, "spans", "")
    if "\0" in record.video:
        raise RowError("video", "holds a NUL character")
    record.provenance = plain(record.provenance)
    unknown = {k: v for k, v in row.items() if k not in RECORD and v is not None}
    if unknown:
        add_extra(record, [unknown] * len(record.rejected))
    return record


def extra_of(record: PreferenceRecord) -> list[Row]:
    """The extra columns of each answer's row."""
    found = record.provenance.get(EXTRA)
    if isinstance(found, list) and len(found) == len(record.rejected) and all(isinstance(x, dict) for x in found):
        return found
    return [{} for _ in record.rejected]


def add_extra(record: PreferenceRecord, extra: list[Row]) -> None:
    """Add columns of each answer's row to those that are known."""
    if any(extra):
        known = extra_of(record)
        record.provenance = {**record.provenance, EXTRA: [{**k, **plain(x)} for k, x in zip(known, extra, strict=True)]}


def _answer(row: Row, index: int, chosen: str) -> Rejected:
    at = f"rejected[{index}]"
    text_of(row, "text", at)
    if unknown := set(row) - set(ANSWER):
        raise RowError(min(unknown), "is not known", at)
    answer = Rejected(**_typed(row, Rejected, at))
    _inside(answer.spans, answer.text, "spans", at)
    _inside(answer.chosen_spans, chosen, "chosen_spans", at)
    return answer


def _typed(row: Row, cls: type[PreferenceRecord] | type[Rejected], at: str = "") -> Row:
    out = {}
    for name, fit in _FIT[cls].items():
        value = row.get(name)
        if value is not None:
            try:
                out[name] = fit(value)
            except TypeError as e:
                raise RowError(name, f"must be {e}, got {type(value).__name__}", at) from e
        elif name in _NEEDED[cls]:
            raise RowError(name, "is missing", at)
    return out


def _fitter(hint: Any) -> Callable[[Any], Any]:
    """What returns a value as this type or raises TypeError(the type): whole numbers also serve as float."""
    wanted = get_origin(hint) or hint
    spelling = hint.__name__ if isinstance(hint, type) and wanted is hint else str(hint)
    inner = _fitter(get_args(hint)[0]) if wanted is list else None
    types = {float: (int, float)}.get(wanted, (wanted,))

    def fit(value: Any) -> Any:
        if type(value) not in types or (wanted is float and not math.isfinite(value)):
            raise TypeError(spelling)
        if inner is not None:
            try:
                return [inner(v) for v in value]
            except TypeError:
                raise TypeError(spelling) from None
        return float(value) if wanted is float else value

    return fit


_FIT = {
    cls: {name: _fitter(hint) for name, hint in hints.items() if hint != list[Rejected]}
    for cls, hints in ((PreferenceRecord, RECORD), (Rejected, ANSWER))
}


def _inside(spans: list[Span], text: str, name: str, at: str) -> None:
    for span in spans:
        if len(span) != 2 or not 0 <= span[0] <= span[1] <= len(text):
            raise RowError(name, f"has {span}, no range of a text of {len(text)} characters", at)
