"""Training curves: one step axis through all stages, a shaded band per stage."""

from __future__ import annotations

from html import escape
from typing import Any

from tempo_fast.perturb import EDITS, KINDS
from tempo_fast.report.load import RunFiles
from tempo_fast.report.results import difficulties
from tempo_fast.report.svg import Series, line_chart

Keys = list[tuple[str, str, str]]  # metric, label, colour class


def curve_section(run: RunFiles) -> str:
    """Loss, margin, accuracy, KL and log-probabilities over the stages; SFT and its control beside them."""
    if not run.metrics:
        return "<p class='gap'>No training metrics yet: run the step train.</p>"
    seen = {key for stage in run.stages for row in run.metrics[stage] for key in row}
    kinds = [k for k in KINDS + EDITS if f"rewards/accuracies/{k}" in seen]
    by_kind: Keys = [(f"rewards/accuracies/{k}", k, f"c{2 + i % 3} faint") for i, k in enumerate(kinds)]
    both: list[tuple[str, str]] = [("chosen", "c1"), ("rejected", "c2")]
    charts = [
        _chart(run, "Loss", [("loss", "loss", "c1")]),
        _chart(run, "Reward margin", [("rewards/margins", "margin", "c1")], rule=0.0),
        _chart(run, "Reward accuracy", [*by_kind, ("rewards/accuracies", "all", "c1")], bounds=(0.0, 1.0), rule=0.5),
        _chart(run, "KL to the reference, nats per answer", [(f"kl/{n}", n, css) for n, css in both]),
        _chart(run, "Log-probability of an answer", [(f"logps/{n}", n, css) for n, css in both]),
        _sft(run),
    ]
    return (
        "<p class='lead'>Every dot is an optimizer step; each stage starts a new optimizer and schedule.</p>"
        f"<div class='charts'>{''.join(charts)}</div>"
    )


def _chart(
    run: RunFiles,
    title: str,
    keys: Keys,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    rule: float | None = None,
) -> str:
    bands, series, at = [], {key: Series(name, css, []) for key, name, css in keys}, 0
    for stage in run.stages:
        rows = run.metrics[stage]
        if not rows:
            continue
        for key, line in series.items():
            piece = [(float(at + i + 1), float(row[key])) for i, row in enumerate(rows) if _number(row.get(key))]
            if piece:
                line.runs.append(piece)
        bands.append((f"r={difficulties(stage)}", float(at + 1), float(at + len(rows))))
        at += len(rows)
    return figure(title, [s for s in series.values() if s.runs], bands, bounds, rule)


def _sft(run: RunFiles) -> str:
    names = {
        "sft": ("after the stages", "c1"),
        "sft_first": ("before the stages", "c1"),
        "control": ("alone (control)", "c2"),
    }
    series = []
    for stage, (name, css) in names.items():
        points = [
            (float(i + 1), float(row["loss"]))
            for i, row in enumerate(run.metrics.get(stage, []))
            if _number(row.get("loss"))
        ]
        if points:
            series.append(Series(name, css, [points]))
    return figure("SFT loss", series, [], (None, None), None)


def figure(
    title: str,
    series: list[Series],
    bands: list[tuple[str, float, float]],
    bounds: tuple[float | None, float | None],
    rule: float | None,
) -> str:
    """A chart with its title and legend; without data a sentence in its place."""
    keys = "".join(f"<span><i class='{s.css}'></i>{escape(s.label)}</span>" for s in series) if len(series) > 1 else ""
    inner = (
        line_chart(title, series, bands, bounds=bounds, rule=rule)
        if series
        else "<p class='gap'>Not measured in this run.</p>"
    )
    return f"<figure><figcaption><b>{escape(title)}</b>{keys}</figcaption>{inner}</figure>"


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
