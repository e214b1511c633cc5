"""The page: its sections in reading order."""

from __future__ import annotations

from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from tempo_fast import __version__
from tempo_fast.config import RunConfig
from tempo_fast.perturb import EDITS, KINDS
from tempo_fast.report.curves import curve_section
from tempo_fast.report.load import RunFiles
from tempo_fast.report.results import difficulties, evaluation_section, label
from tempo_fast.report.strips import Sheet, choose_records, record_card
from tempo_fast.report.text import duration, interval, number


def render(run: RunFiles, config: RunConfig) -> str:
    """The whole page as HTML."""
    sheet = Sheet()
    sections = [
        ("results", "Does it know when?", evaluation_section(run)),
        ("training", "The curriculum", curve_section(run)),
        ("strips", "What it was shown", _strips(run, config, sheet)),
        ("audit", "Pairs, per difficulty and kind", _audit(run)),
        ("work", "Time, and what was left out", _work(run)),
        ("config", "Configuration", _config(run)),
    ]
    style = package_files("tempo_fast.report").joinpath("style.css").read_text(encoding="utf-8")
    name = Path(config.output_dir).name
    nav = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)} · tempo-fast</title><style>{style}{''.join(sheet.rules)}</style></head><body><main>"
        f'<header><p class="brand">tempo-fast {escape(str(run.summary.get("version", __version__)))}</p>'
        f"<h1>{escape(name)}</h1>{_story(run, config)}{_cards(run)}<nav>{nav}</nav></header>{body}"
        f"<footer>{_identity(run)}</footer></main></body></html>\n"
    )


_ASKED = {
    "rrpo": "Right answers were paired with wrong ones that the model gave about perturbed frames of",
    "leanpo": "Answers reflected upon were paired with answers about a few augmented frames of",
    "mdpo": "The best of several answers was paired with the worst, on questions about",
}


def _story(run: RunFiles, config: RunConfig) -> str:
    counts, lines = run.summary.get("counts") or {}, []
    if counts:
        left_out = [f"{counts[k]} {k}" for k in ("filtered", "quarantined") if counts.get(k)]
        tail = f" ({', '.join(left_out)})" if left_out else ""
        made = f"{counts.get('pairs', 0)} pairs in {counts.get('records', 0)} records"
        if config.pairs.method == "temple":
            lines.append(f"{counts.get('usable', 0)} of {counts.get('videos', 0)} videos were cut into clips{tail}.")
            shown = (
                "the perturbed clips were shown to the model"
                if config.pairs.perturb_on == "frames"
                else "its clip captions were perturbed"
            )
            kinds = ", ".join(config.pairs.kinds)
            lines.append(f"The model told each video in order; then {shown} ({kinds}), which gave {made}.")
        else:
            lines.append(f"{_ASKED[config.pairs.method]} {counts.get('videos', 0)} videos{tail}, which gave {made}.")
    stages = run.summary.get("stages") or []
    if stages:
        steps = sum(s.get("steps") or 0 for s in stages)
        path = ", ".join(difficulties(s["name"]) for s in stages)
        name = config.train.objective.name.upper()
        text = f"{name} ran over {len(stages)} stages (r = {path}; large is easy) in {steps} steps"
        cached = [s["reference"] for s in stages if "hits" in (s.get("reference") or {})]
        if cached:
            hits, misses = sum(c["hits"] for c in cached), sum(c["misses"] for c in cached)
            text += f"; of its reference statistics {misses} were computed and {hits} reused"
        lines.append(text + ".")
    rows = {row["name"]: row for row in run.evals}
    base, last = rows.get("base"), next((row for row in reversed(run.evals) if row["name"].startswith("stage")), None)
    if base and last:
        lines.append(
            "On held-out videos the true description beats its perturbed twin in a share of "
            f"{interval(base.get('pairwise_all'))} of cases before the stages and {interval(last.get('pairwise_all'))} "
            "after them."
        )
    if "sft" in rows and "control" in rows:
        method: Any
        control: Any
        method, control = ((rows[n].get("questions") or {}).get("all") for n in ("sft", "control"))
        if _known(method) and _known(control):
            apart = method["lo"] > control["hi"] or control["lo"] > method["hi"]
            lines.append(
                f"After the same SFT, questions are answered right in {interval(method)} with the stages before "
                f"it and in {interval(control)} without; the intervals {'do not overlap' if apart else 'overlap'}."
            )
    if not lines:
        lines.append("This run has not written a summary yet.")
    return "<ol class='story'>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ol>"


def _known(stat: Any) -> bool:
    return isinstance(stat, dict) and stat.get("value") is not None


def _cards(run: RunFiles) -> str:
    cards: list[tuple[str, str, str]] = []
    rows = {row["name"]: row for row in run.evals}
    staged = [row for row in run.evals if row["name"].startswith("stage")]
    base, final = rows.get("base"), rows.get("sft") or next(reversed(staged or run.evals[1:]), None)

    def change(title: str, pick: Any) -> None:
        if base and final and _known(pick(base)) and _known(pick(final)):
            control: Any = pick(rows["control"]) if "control" in rows else None
            aside = f"SFT alone {control['value']:.2f}" if _known(control) else f"base → {label(final['name'])}"
            cards.append((title, f"{pick(base)['value']:.2f} → {pick(final)['value']:.2f}", aside))

    change("pairwise order", lambda r: r.get("pairwise_all"))
    change("temporal questions", lambda r: (r.get("questions") or {}).get("all"))
    change("order in free captions, τ", lambda r: (r.get("captions") or {}).get("order_tau"))
    stages = run.summary.get("stages") or []
    if stages:
        last = stages[-1]
        aside = f"last stage, r={difficulties(last['name'])}; margin {number(last.get('margin'), 2)}"
        cards.append(("reward accuracy", number(last.get("accuracy"), 2), aside))
    total = (run.summary.get("timings_s") or {}).get("total")
    if total is not None:
        pairs = (run.summary.get("counts") or {}).get("pairs", 0)
        cards.append(("whole run", duration(total), f"{pairs} pairs"))
    return (
        "<div class='cards'>"
        + "".join(
            f"<div class='card'><p>{escape(t)}</p><strong>{escape(v)}</strong><small>{escape(s)}</small></div>"
            for t, v, s in cards
        )
        + "</div>"
    )


def _strips(run: RunFiles, config: RunConfig, sheet: Sheet) -> str:
    if not any(run.records.values()):
        return gap("No pairs yet: run the step pairs")
    lead = (
        "Numbers are the clips' places in the real video. A chosen answer tells them in order; a rejected one as "
        "below. Frames that are not in their own place have a coloured edge."
        if config.pairs.method == "temple"
        else "What differs between two answers is marked."
    )
    parts = [f"<p class='lead'>{lead}</p>"]
    for place, (r, records) in enumerate(run.records.items()):
        if not records or config.report.pairs < 1:
            continue
        cards = [
            record_card(run, x, sheet, max(2, config.report.strip_frames))
            for x in choose_records(records, config.report.pairs, place)
        ]
        first = " open" if place == 0 else ""
        parts.append(
            f"<details class='level'{first}><summary>r = {r} <small>{len(records)} records, "
            f"{sum(len(x.rejected) for x in records)} pairs</small></summary>{''.join(cards)}</details>"
        )
    return "".join(parts)


def _audit(run: RunFiles) -> str:
    stats = run.audit.get("stats") or {}
    if not stats:
        return gap("No audit yet: run the step pairs")
    kinds = [k for k in KINDS + EDITS if any(k in per for per in stats.values())]
    kinds += sorted({k for per in stats.values() for k in per} - set(kinds))
    rows = []
    for r in sorted(stats, key=int, reverse=True):
        for i, kind in enumerate(k for k in kinds if k in stats[r]):
            s = stats[r][kind]
            filtered = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in (s.get("filtered") or {}).items())
            cells = [
                number(s.get("made")),
                filtered or "none",
                interval(s.get("separated")),
                *(number(s.get(k), 2) for k in ("length_ratio", "similarity", "broken", "kept")),
            ]
            head = f"<th scope='rowgroup' rowspan='{len(stats[r])}'>{r}</th>" if i == 0 else ""
            body = "".join(f"<td{' class=words' if j == 1 else ''}>{escape(c)}</td>" for j, c in enumerate(cells))
            rows.append(f"<tr{' class=first' if i == 0 else ''}>{head}<th scope='row'>{kind}</th>{body}</tr>")
    page = run.folder / "pairs" / "audit.html"
    more = " <a href='pairs/audit.html'>Pairs side by side, with their clips</a>." if page.is_file() else ""
    heads = ["pairs", "filtered, and why", "told apart", "length ratio", "similarity", "broken", "kept"]
    notes = [
        f"r = {' and '.join(map(str, c['r']))} are the same perturbation for {c['videos']} of {c['of']} videos."
        for c in run.audit.get("coincide") or []
    ]
    notes += [f"{Path(f['video']).name}: {f['reason']}" for f in run.audit.get("failed") or []]
    return (
        "<p class='lead'>Told apart: by a judge that reads the two texts alone, with 95 % intervals. Length ratio: "
        "characters of the rejected over the chosen answer. Similarity: common words in order. Broken: adjacencies of "
        f"the real order that are gone. Kept: share of clips left.{more}</p>"
        + scroll(
            "<thead><tr><th>r</th><th>kind</th>"
            + "".join(f"<th>{h}</th>" for h in heads)
            + f"</tr></thead><tbody>{''.join(rows)}</tbody>",
            "audit",
        )
        + "".join(f"<p class='note'>{escape(n)}</p>" for n in notes)
    )


def _work(run: RunFiles) -> str:
    timings = {
        k: v for k, v in (run.summary.get("timings_s") or {}).items() if k != "total" and isinstance(v, (int, float))
    }
    parts = []
    if timings:
        most = max([*timings.values(), 1e-9])
        bars = "".join(
            f"<dt>{escape(k)}</dt><dd><i style='width:{max(0.4, 100 * v / most):.1f}%'></i>"
            f"<span>{duration(v)}</span></dd>"
            for k, v in timings.items()
        )
        parts.append(f"<dl class='bars'>{bars}</dl>")
    else:
        parts.append(gap("No timings yet"))
    stages = [s for s in [*(run.summary.get("stages") or []), run.summary.get("sft"), run.summary.get("control")] if s]
    if stages:
        rows = ""
        for s in stages:
            last = (run.metrics.get(s.get("name", "")) or [{}])[-1]
            reference = s.get("reference") or {}
            cells = [
                number(s.get("steps")), number(s.get("pairs")),
                f"{number(s.get('loss_first'))} → {number(s.get('loss_last'))}",
                number(s.get("margin")), number(s.get("accuracy")),
                f"{reference['hits']} / {reference['misses']}" if "hits" in reference else "–",
                number(last.get("perf/tokens_per_s"), 0), number(last.get("perf/decode_wait_frac"), 2),
                duration(s.get("seconds")),
            ]  # fmt: skip
            rows += (
                f"<tr><th scope='row'>{escape(label(s.get('name', '')).removeprefix('after '))}</th>"
                + "".join(f"<td>{escape(c)}</td>" for c in cells)
                + "</tr>"
            )
        heads = [
            "steps",
            "pairs",
            "loss",
            "margin",
            "accuracy",
            "reference cached / computed",
            "tokens/s",
            "decode wait",
            "time",
        ]
        parts.append(
            scroll(
                "<thead><tr><th>stage</th>"
                + "".join(f"<th>{h}</th>" for h in heads)
                + f"</tr></thead><tbody>{rows}</tbody>",
                "stages",
            )
        )
    for title, key in (("Quarantined", "quarantined"), ("Filtered by curation", "filtered")):
        items = run.summary.get(key) or []
        if items:
            rows = "".join(
                f"<li><code>{escape(Path(q['video']).name)}</code> {escape(_reason(q))}</li>" for q in items[:50]
            )
            more = f"<li>and {len(items) - 50} more in summary.json</li>" if len(items) > 50 else ""
            parts.append(f"<h3>{title}: {len(items)}</h3><ul class='files'>{rows}{more}</ul>")
    if run.summary and not run.quarantined:
        parts.append("<p class='note'>No video was quarantined.</p>")
    return "".join(parts)


def _reason(item: dict[str, str]) -> str:
    return item.get("reason", "").removeprefix(f"{item.get('video', '')}: ")


def _config(run: RunFiles) -> str:
    if not run.config:
        return gap("config.yaml is not there")
    return f"<details><summary>config.yaml, as resolved</summary><pre>{escape(run.config)}</pre></details>"


def _identity(run: RunFiles) -> str:
    model = run.summary.get("model") or {}
    parts = [f"config {str(run.summary.get('config_digest', ''))[:12]}"] if run.summary.get("config_digest") else []
    if model:
        parts.append(f"model {model.get('path', '')} ({model.get('dtype', '')}) {str(model.get('weights', ''))[:12]}")
    return escape(" · ".join(parts))


def gap(text: str) -> str:
    """A part that is not there yet."""
    return f"<p class='gap'>{escape(text)}.</p>"


def scroll(table: str, css: str) -> str:
    """A table in a box that scrolls by itself on a narrow screen."""
    return f"<div class='scroll' tabindex='0'><table class='{css}'>{table}</table></div>"
