"""What flows between the rooms: plain dataclasses, read and written as JSON lines.

Frame numbers count presented frames from 0; intervals are half-open; times are seconds from the first presented frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tempo_fast.errors import InputError
from tempo_fast.files import read_jsonl


@dataclass
class Clip:
    """A run of consecutive shots of one group: the unit of perturbation."""

    start_frame: int
    end_frame: int
    start_s: float
    end_s: float
    group: int
    keyframes: list[int]


@dataclass
class Clips:
    """One curated video."""

    video: str
    digest: str
    n_frames: int
    duration_s: float
    shots: list[list[int]]
    shot_groups: list[int]
    clips: list[Clip]

    @staticmethod
    def from_row(row: dict[str, Any]) -> Clips:
        return Clips(**{**row, "clips": [Clip(**c) for c in row["clips"]]})


@dataclass
class Rejected:
    """One rejected answer and how it came about.

    ``order`` are the clip indices it was built from, ``blank`` which of them were shown black (empty: none);
    ``broken`` and ``kept`` measure the perturbation (perturb.py);
    ``spans`` are character ranges [start, end) of ``text`` that differ from the chosen answer, ``chosen_spans`` those
    of the chosen answer that differ from ``text``: the key phrases of this pair (RRPO).
    """

    text: str
    kind: str
    r: int
    order: list[int] = field(default_factory=list)
    broken: float = 0.0
    kept: float = 1.0
    spans: list[list[int]] = field(default_factory=list)
    chosen_spans: list[list[int]] = field(default_factory=list)
    blank: list[bool] = field(default_factory=list)


@dataclass
class PreferenceRecord:
    """One prompt about one video, its chosen answer and 1..k rejected ones. One record becomes one response tree.

    ``spans`` are character ranges of ``chosen`` that differ from any rejected answer. Pairs go by the ``chosen_spans``
    of their rejected answer; a record in which none has them (made elsewhere, one rejected answer) goes by ``spans``.
    """

    id: str
    video: str
    prompt: str
    chosen: str
    rejected: list[Rejected]
    r: int
    spans: list[list[int]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_row(row: dict[str, Any]) -> PreferenceRecord:
        return PreferenceRecord(**{**row, "rejected": [Rejected(**x) for x in row["rejected"]]})

    def spans_for(self, rejected: Rejected) -> list[list[int]]:
        """Character ranges of ``chosen`` that differ from this rejected answer."""
        return rejected.chosen_spans if any(x.chosen_spans for x in self.rejected) else self.spans


@dataclass
class SFTRecord:
    """One prompt about one video (``video`` may be empty: text only) and the answer to imitate."""

    id: str
    video: str
    prompt: str
    response: str


@dataclass
class Question:
    """A multiple-choice temporal question; ``answer`` indexes ``options``."""

    id: str
    video: str
    question: str
    options: list[str]
    answer: int
    type: str = "other"
    split: str = ""


@dataclass
class QARecord:
    """A question about a video with its reference answer: what RRPO, LeanPO and M-DPO pairs are made from.

    ``options`` of a multiple choice, of which ``answer`` is one (its letter, its text, or both); ``type`` is free
    (``mcq``, ``yes_no``, ``short``, ``open``), and empty leaves it to the rules of tempo_fast.pairs.answers.
    """

    id: str
    video: str
    question: str
    answer: str
    options: list[str] = field(default_factory=list)
    type: str = ""


@dataclass
class Truth:
    """What is known to happen in a video: the sentences of its events in order.

    Without ``events`` they are the sentences of ``description``. The probes' true answer is the events, one after the
    other, so that it and its perturbed twins are written alike.
    """

    video: str
    description: str = ""
    events: list[str] = field(default_factory=list)
    split: str = ""

    def __post_init__(self) -> None:
        self.events = self.events or events_of(self.description)

    @staticmethod
    def from_row(row: dict[str, Any]) -> Truth:
        """``events`` may also be objects with a ``text``. Raises ValueError when there are none."""
        events = [e["text"] if isinstance(e, dict) else e for e in row.get("events", [])]
        truth = Truth(**{**row, "events": events})
        if not truth.events:
            raise ValueError("fields 'events' and 'description' are both empty")
        return truth


T = TypeVar("T")


def read_records(path: str | Path, cls: type[T]) -> list[T]:
    """All of ``iter_records``."""
    return list(iter_records(path, cls))


def iter_records(path: str | Path, cls: type[T]) -> Iterator[T]:
    """JSON lines as ``cls``, one at a time; unknown keys are ignored, so that files may carry more than we need.

    Raises:
        InputError: naming file, line and field, when a required field is missing, empty or of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = [
        n for n, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        for name in required:
            if name not in row:
                raise InputError(f"{where}: field '{name}' is missing")
            if row[name] == "" and name != "video" or row[name] is None or row[name] == [] and name == "rejected":
                raise InputError(f"{where}: field '{name}' is empty")
        for name, f in fields.items():
            if name in row:
                _check_type(where, name, row[name], str(f.type))
        kept = {k: v for k, v in row.items() if k in fields}
        try:
            yield cls.from_row(kept) if hasattr(cls, "from_row") else cls(**kept)  # type: ignore[attr-defined]
        except (TypeError, KeyError, ValueError) as e:
            raise InputError(f"{where}: {e}") from e


_PLAIN = {"str": str, "int": int, "float": (int, float)}


def _check_type(where: str, name: str, value: Any, annotation: str) -> None:
    expected: Any = list if annotation.startswith("list") else dict if annotation.startswith("dict") else None
    expected = expected or _PLAIN.get(annotation)
    if expected is not None and not isinstance(value, expected):
        raise InputError(f"{where}: field '{name}' must be {annotation}, got {type(value).__name__}")


def events_of(description: str) -> list[str]:
    """Sentences of a description, in order: the unit that order and object scores count."""
    parts = [p.strip() for p in description.replace("\n", " ").split(".")]
    return [p + "." for p in parts if p]


def resolve_videos(records: Sequence[Any], root: str | Path) -> None:
    """Make the records' relative video paths absolute against ``root``, in place."""
    for record in records:
        if record.video and not Path(record.video).is_absolute():
            record.video = str((Path(root) / record.video).resolve())
