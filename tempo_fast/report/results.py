"""The evaluation: four headline charts with intervals, then every figure in tables."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from tempo_fast.report.load import RunFiles
from tempo_fast.report.svg import Mark, interval_chart

_NAMES = {"base": "base", "sft": "stages + SFT", "sft_first": "SFT, before the stages", "control": "SFT alone"}

Pick = Callable[[dict[str, Any]], Any]


def label(name: str) -> str:
    """A row's name for people: ``stage2_r8`` is ``after r=8``, ``stage2_r8_4`` ``after r=8+4``."""
    return _NAMES.get(name) or (f"after r={difficulties(name)}" if name.startswith("stage") else name)


def difficulties(stage: str) -> str:
    """``8`` of ``stage2_r8``, ``8+4`` of ``stage2_r8_4``."""
    return stage.partition("_r")[2].replace("_", "+")


def _css(name: str) -> str:
    return {"base": "c0", "sft": "c3", "sft_first": "c3", "control": "c2"}.get(name, "c1")


def evaluation_section(run: RunFiles) -> str:
    """Charts and tables of the probes on held-out videos, or a sentence when there are none yet."""
    rows = run.evals
    if not rows:
        return "<p class='gap'>No evaluation yet: run the step eval, with data.eval_truth or data.eval_questions.</p>"
    charts: list[tuple[str, str, Pick, float | None]] = [
        (
            "Pairwise order",
            "true description over its perturbed twin, by log-probability",
            lambda r: r.get("pairwise_all"),
            0.5,
        ),
        ("Temporal questions", "right option by likelihood", lambda r: (r.get("questions") or {}).get("all"), None),
        (
            "Order in free captions",
            "Kendall τ of the events told",
            lambda r: (r.get("captions") or {}).get("order_tau"),
            0.0,
        ),
        (
            "Objects in free captions",
            "share of objects told right",
            lambda r: (r.get("captions") or {}).get("objects"),
            None,
        ),
    ]
    figures = []
    for title, what, pick, rule in charts:
        marks = [_mark(row, pick(row)) for row in rows]
        if any(m.value is not None for m in marks):
            figures.append(
                f"<figure><figcaption><b>{title}</b><small>{what}</small></figcaption>"
                f"{interval_chart(title, marks, rule=rule)}</figure>"
            )
    videos = max((s["n"] for row in rows for s in _stats(row) if s.get("n")), default=0)
    return (
        f"<p class='lead'>Bars are 95 % intervals from resampling whole videos (n = {videos}); dashed lines are chance."
        " <b>SFT alone</b> is the control: the base model with the same SFT data and budget, without the stages.</p>"
        f"<div class='charts four'>{''.join(figures)}</div>" + _pairwise(rows) + _questions(rows)
    )


def _stats(row: dict[str, Any]) -> list[dict[str, Any]]:
    found = [row.get("pairwise_all"), (row.get("questions") or {}).get("all"), *(row.get("captions") or {}).values()]
    return [s for s in found if isinstance(s, dict)]


def _mark(row: dict[str, Any], stat: Any) -> Mark:
    name = row["name"]
    if not isinstance(stat, dict) or stat.get("value") is None:
        return Mark(label(name), _css(name), None)
    return Mark(label(name), _css(name), stat["value"], stat["lo"], stat["hi"])


def _pairwise(rows: list[dict[str, Any]]) -> str:
    kinds: dict[str, list[str]] = {}
    for row in rows:
        for kind, per in (row.get("pairwise") or {}).items():
            for r in per:
                if r not in kinds.setdefault(kind, []):
                    kinds[kind].append(r)
    if not kinds:
        return ""
    order = {k: sorted(v, key=lambda r: -int(r)) for k, v in kinds.items()}
    top = "".join(f"<th colspan='{len(rs)}' class='group'>{escape(k)}</th>" for k, rs in order.items())
    sub = "".join(
        f"<th{' class=group' if i == 0 else ''}>r={r}</th>" for rs in order.values() for i, r in enumerate(rs)
    )
    body = ""
    for row in rows:
        cells = "".join(
            _cell((row.get("pairwise") or {}).get(k, {}).get(r), "group" if i == 0 else "")
            for k, rs in order.items()
            for i, r in enumerate(rs)
        )
        body += f"<tr><th scope='row'>{escape(label(row['name']))}</th>{cells}</tr>"
    return (
        "<h3>Pairwise, per kind and difficulty</h3><div class='scroll' tabindex='0'><table class='figures'>"
        f"<thead><tr><th rowspan='2'>model</th>{top}</tr><tr>{sub}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _questions(rows: list[dict[str, Any]]) -> str:
    types: list[str] = []
    for row in rows:
        types += [t for t in (row.get("questions") or {}) if t != "all" and t not in types]
    captions = [("events", "events"), ("objects", "objects"), ("order_tau", "order τ")]
    has_captions = any(row.get("captions") for row in rows)
    if not types and not has_captions:
        return ""
    heads = [
        (f"<th{' class=group' if i == 0 else ''}>{escape(t.replace('_', ' '))}</th>")
        for i, t in enumerate(["all", *types] if types else [])
    ]
    heads += [
        f"<th{' class=group' if i == 0 else ''}>{name}</th>"
        for i, (_, name) in enumerate(captions if has_captions else [])
    ]
    top = f"<th colspan='{len(types) + 1}' class='group'>questions</th>" if types else ""
    top += "<th colspan='3' class='group'>free captions</th>" if has_captions else ""
    body = ""
    for row in rows:
        asked, told = row.get("questions") or {}, row.get("captions") or {}
        cells = "".join(
            _cell(asked.get(t), "group" if i == 0 else "") for i, t in enumerate(["all", *types] if types else [])
        )
        cells += "".join(
            _cell(told.get(k), "group" if i == 0 else "") for i, (k, _) in enumerate(captions if has_captions else [])
        )
        body += f"<tr><th scope='row'>{escape(label(row['name']))}</th>{cells}</tr>"
    return (
        "<h3>Questions per type, and free captions</h3><div class='scroll' tabindex='0'><table class='figures'>"
        f"<thead><tr><th rowspan='2'>model</th>{top}</tr><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(stat: Any, css: str) -> str:
    attribute = f" class='{css}'" if css else ""
    if not isinstance(stat, dict) or stat.get("value") is None:
        return f"<td{attribute}>–</td>"
    return f"<td{attribute}>{stat['value']:.2f}<small>{stat['lo']:.2f}–{stat['hi']:.2f}</small></td>"
