"""A run's figures as text, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def number(value: Any, digits: int = 3) -> str:
    """A figure, or a dash when there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2e}" if value and (abs(value) < 10**-digits or abs(value) >= 1e6) else f"{value:.{digits}f}"


def duration(seconds: Any) -> str:
    """Seconds in words a person reads: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if not isinstance(seconds, (int, float)):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def interval(stat: Any, digits: int = 2) -> str:
    """``0.61 [0.55, 0.67]``; a dash without a value."""
    if not isinstance(stat, dict) or stat.get("value") is None:
        return "–"
    return f"{stat['value']:.{digits}f} [{stat['lo']:.{digits}f}, {stat['hi']:.{digits}f}]"


def eval_columns(row: dict[str, Any]) -> dict[str, Any]:
    """The headline statistics of one evaluation row."""
    captions = row.get("captions") or {}
    return {
        "pairwise": row.get("pairwise_all"),
        "questions": (row.get("questions") or {}).get("all"),
        "caption order τ": captions.get("order_tau"),
        "objects": captions.get("objects"),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  "
        + "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )


def describe_result(verb: str, out: Path, summary: dict[str, Any]) -> str:
    """What a command prints when it is done."""
    counts, timings = summary.get("counts") or {}, summary.get("timings_s") or {}
    lines = [
        f"videos {counts.get('usable', 0)} of {counts.get('videos', 0)} usable "
        f"({counts.get('filtered', 0)} filtered, {counts.get('quarantined', 0)} quarantined), "
        f"pairs {counts.get('pairs', 0)} in {counts.get('records', 0)} records"
    ]
    trained = [s for s in [*(summary.get("stages") or []), summary.get("sft"), summary.get("control")] if s]
    if trained and verb in ("run", "train", "eval", "report"):
        rows = [
            [
                s["name"], number(s.get("steps")), f"{number(s.get('loss_first'))} → {number(s.get('loss_last'))}",
                number(s.get("margin")), number(s.get("accuracy")), _reference(s), duration(s.get("seconds")),
            ]
            for s in trained
        ]  # fmt: skip
        lines += ["", table(["stage", "steps", "loss", "margin", "accuracy", "reference", "time"], rows)]
    evals = summary.get("eval") or []
    if evals and verb in ("run", "eval", "report"):
        heads = list(eval_columns({}))
        rows = [[row["name"], *(interval(s) for s in eval_columns(row).values())] for row in evals]
        lines += ["", table(["evaluation, 95 % interval", *heads], rows)]
    for item in (summary.get("quarantined") or [])[:5]:
        lines.append(f"  quarantined {item['video']}: {item['reason']}")
    lines += ["", f"{out / 'summary.json'}  {duration(timings.get('total'))} of work"]
    if (out / "report.html").is_file():
        lines.append(str(out / "report.html"))
    return "\n".join(lines)


def _reference(stage: dict[str, Any]) -> str:
    reference = stage.get("reference") or {}
    return f"{reference['hits']} cached, {reference['misses']} computed" if "hits" in reference else "–"
