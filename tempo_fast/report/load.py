"""Reads what a run has written so far. Every part may be missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tempo_fast.errors import InputError
from tempo_fast.files import read_json, read_jsonl
from tempo_fast.schema import Clips, PreferenceRecord, read_records

T = TypeVar("T")

_OTHERS = ("sft", "sft_first", "control")


@dataclass
class RunFiles:
    """``summary`` as summary.json; ``metrics`` rows per stage folder in training order; ``records`` per r; ``clips``
    per video; ``audit`` as audit.json; ``evals`` rows; ``config`` the YAML text."""

    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    records: dict[int, list[PreferenceRecord]] = field(default_factory=dict)
    clips: dict[str, Clips] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    evals: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""

    @property
    def stages(self) -> list[str]:
        """Names of the preference stages that have metrics."""
        return [name for name in self.metrics if name not in _OTHERS]

    @property
    def quarantined(self) -> list[dict[str, str]]:
        """Videos that could not be used, with their reasons."""
        return list(self.summary.get("quarantined") or [])


def load_run(folder: Path) -> RunFiles:
    """Collect a run's files. A broken file counts as missing: a page with a gap is more use than none."""
    run = RunFiles(folder)
    run.summary = _maybe(lambda: read_json(folder / "summary.json"), {})
    run.audit = _maybe(lambda: read_json(folder / "pairs" / "audit.json"), {})
    saved: dict[str, Any] = _maybe(lambda: read_json(folder / "eval" / "eval.json"), {})
    run.evals = list(saved.get("rows") or run.summary.get("eval") or [])
    for path in sorted((folder / "train").glob("*/metrics.jsonl"), key=lambda p: _order(p.parent.name)):
        run.metrics[path.parent.name] = _maybe(lambda path=path: [row for _, row in read_jsonl(path)], [])  # type: ignore[misc]
    for path in (folder / "pairs").glob("r*.jsonl"):
        if path.stem[1:].isdigit():
            rows: list[PreferenceRecord] = _maybe(lambda path=path: read_records(path, PreferenceRecord), [])  # type: ignore[misc]
            run.records[int(path.stem[1:])] = rows
    run.records = dict(sorted(run.records.items(), reverse=True))
    clips: list[Clips] = _maybe(lambda: read_records(folder / "curate" / "clips.jsonl", Clips), [])
    run.clips = {c.video: c for c in clips}
    run.config = _maybe(lambda: (folder / "config.yaml").read_text(encoding="utf-8"), "")
    return run


def _maybe(read: Callable[[], T], otherwise: T) -> T:
    try:
        return read()
    except (InputError, OSError, ValueError):
        return otherwise


def _order(name: str) -> tuple[int, str]:
    """sft_first < stage1_r16 < stage2_r8 < ... < stage10_r2 < sft < control."""
    last = {"sft_first": -1, "sft": 10**6, "control": 10**6 + 1}
    number = name.removeprefix("stage").split("_")[0]
    return (int(number) if number.isdigit() else last.get(name, 10**6 + 2), name)
