"""The page of pairs, for a reader's eyes: chosen and rejected side by side with their clips, after what the audit says.

The pairs are drawn by content: the videos of the smallest digests, the same ones at every r, so that a reader sees one
video grow harder. Files are read a row at a time; memory holds the drawn rows alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypeVar

from tempo_fast.config import RunConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_json, write_atomic
from tempo_fast.pairs.judge import SAME_STORY, measures
from tempo_fast.perturb import EDITS, KINDS
from tempo_fast.report.strips import Sheet, aspect, film, mark, thumbnails
from tempo_fast.report.svg import Mark, interval_chart
from tempo_fast.report.text import interval, number
from tempo_fast.schema import Clips, PreferenceRecord, Rejected, iter_records

T = TypeVar("T")
Pair = tuple[PreferenceRecord, Rejected]
_COLOURS = {"drop": "c2", "shuffle": "c3", "reverse": "c4"}
_MEANS = {
    "rouge_l": "ROUGE-L",
    "coverage": "events in both",
    "steps": "steps in both",
    "order_agreement": "order τ",
    "length_ratio": "length ratio",
    "broken": "broken",
    "kept": "kept",
}
"""Columns of the audit and figures of a pair, by their names in the audit."""


def build_pairs_page(pairs_dir: str | Path, config: RunConfig) -> Path:
    """Write ``audit.html`` into ``pairs_dir`` from its ``r<r>.jsonl`` and ``audit.json``; what is broken is named.

    Pictures come from the videos of ``curate/clips.jsonl`` beside ``pairs_dir``; without them there are texts alone.

    Args:
        pairs_dir: the folder of the step ``pairs``.
        config: how many pairs per r (``pairs.audit_pairs``), and the seed they are drawn by.

    Returns:
        The page. It asks nothing of the network: style, charts and pictures are inside.
    """
    folder = Path(pairs_dir)
    found = _Found(folder, config.pairs.audit_pairs, config.seed)
    sheet = Sheet()
    pictures = _Pictures(found.clips, sheet)
    kinds = [k for k in KINDS + EDITS if any(k in per for per in found.stats.values())]
    kinds += sorted({k for per in found.stats.values() for k in per} - set(kinds))
    sections = [("figures", "Figures", _figures(found, kinds))]
    sections += [(f"r{r}", f"r = {r}", _level(r, found, pictures)) for r in found.drawn]
    style = package_files("tempo_fast.report").joinpath("style.css").read_text(encoding="utf-8")
    nav = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    name = escape(Path(config.output_dir).name)
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Pairs of {name} · tempo-fast</title><style>{style}{''.join(sheet.rules)}</style></head><body><main>"
        f'<header><p class="brand">tempo-fast · pairs</p><h1>{name}</h1>{_story(found)}<nav>{nav}</nav></header>{body}'
        "</main></body></html>\n"
    )
    path = folder / "audit.html"
    write_atomic(path, lambda f: f.write(html.encode()))
    return path


# -- what is shown ----------------------------------------------------------------------------------------------------


class _Found:
    """``audit`` as audit.json holds it; ``drawn`` pairs per r, large r first; ``clips`` of their videos; ``notes`` on
    what could not be read."""

    def __init__(self, folder: Path, most: int, seed: int) -> None:
        self.notes: list[str] = []
        self.audit: dict[str, Any] = {}
        try:
            self.audit = dict(read_json(folder / "audit.json"))
        except (InputError, TypeError, ValueError) as e:
            self.notes.append(str(e))
        files = {int(p.stem[1:]): p for p in folder.glob("r*.jsonl") if p.stem[1:].isdecimal()}
        if listed := self.audit.get("files"):  # files of earlier settings may lie beside them
            files = {r: p for r, p in files.items() if p.name in listed}
        self.drawn: dict[int, list[Pair]] = {}
        for r in sorted(files, reverse=True) if most > 0 else ():
            self.drawn[r] = draw_pairs(self._rows(files[r], PreferenceRecord), most, seed)
        self.clips: dict[str, Clips] = {}
        wanted = {os.path.realpath(record.video) for pairs in self.drawn.values() for record, _ in pairs}
        curated = folder.parent / "curate" / "clips.jsonl"
        if wanted and curated.is_file():
            for clips in self._rows(curated, Clips):
                if (path := os.path.realpath(clips.video)) in wanted:
                    self.clips[path] = clips

    @property
    def stats(self) -> dict[str, Any]:
        return self.audit.get("stats") or {}

    def _rows(self, path: Path, cls: type[T]) -> Iterator[T]:
        """Rows up to the first broken one."""
        try:
            yield from iter_records(path, cls)
        except InputError as e:
            self.notes.append(f"{e}; what comes after is not shown")


def draw_pairs(records: Iterator[PreferenceRecord], most: int, seed: int) -> list[Pair]:
    """At most ``most`` pairs: one of each of the ``most`` videos whose digests with the seed are smallest, then, where
    there are fewer videos, another one of each."""
    kept: dict[str, list[PreferenceRecord]] = {}
    for record in records if most > 0 else ():
        key = digest([seed, record.provenance.get("video_digest") or record.video])
        if key in kept or len(kept) < most or key < max(kept):
            kept.setdefault(key, []).append(record)
        if len(kept) > most:
            del kept[max(kept)]
    queues = []
    for key in sorted(kept):
        pairs = [(record, x) for record in kept[key] for x in record.rejected]
        queues.append(sorted(pairs, key=lambda p: digest([seed, p[0].id, p[1].r, p[1].kind, p[1].text])))
    rounds = max(map(len, queues), default=0)
    return [queue[i] for i in range(rounds) for queue in queues if i < len(queue)][:most]


class _Pictures:
    """CSS classes of a video's clips, each picture once on the page."""

    def __init__(self, clips: dict[str, Clips], sheet: Sheet) -> None:
        self.clips, self.sheet = clips, sheet
        self.done: dict[str, tuple[list[str], str, str]] = {}

    def of(self, record: PreferenceRecord) -> tuple[list[str], str, str]:
        """(classes, shape, why there are none). Orders of other things than curated clips get none either."""
        path = os.path.realpath(record.video)
        clips = self.clips.get(path)
        if clips is None or record.provenance.get("clips", len(clips.clips)) != len(clips.clips):
            return [], "1", ""
        if path not in self.done:
            try:
                self.done[path] = [self.sheet.add(jpeg) for jpeg in thumbnails(clips)], aspect(clips), ""
            except InputError as e:
                self.done[path] = [], "1", str(e)
        return self.done[path]


# -- the sections -----------------------------------------------------------------------------------------------------


def _story(found: _Found) -> str:
    audit, lines = found.audit, []
    pairs = audit.get("pairs") or {}
    if pairs:
        each = ", ".join(f"{n} at r = {r}" for r, n in pairs.items())
        lines.append(f"{sum(pairs.values())} pairs of {audit.get('videos', 0)} videos: {each}.")
    shown = sum(map(len, found.drawn.values()))
    lines.append(
        f"{shown} of them are shown below, one a video as long as there are videos, the same videos at every r."
        if shown else "There are no pairs to show."
    )  # fmt: skip
    failed = audit.get("failed") or []
    if failed:
        lines.append(f"{len(failed)} videos could not be read.")
    notes = "".join(f"<p class='gap'>{escape(note)}.</p>" for note in found.notes)
    return "<ol class='story'>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + f"</ol>{notes}"


def _figures(found: _Found, kinds: list[str]) -> str:
    if not found.stats:
        return "<p class='gap'>No audit: run the step pairs.</p>"
    rs = sorted(found.stats, key=int, reverse=True)
    charts = []
    for kind in kinds:
        shares = {r: (found.stats[r].get(kind) or {}).get("separated") for r in rs}
        marks = [
            Mark(f"r = {r}", _COLOURS.get(kind, "c1"), s["value"], s["lo"], s["hi"])
            if isinstance(s, dict) and s.get("value") is not None
            else Mark(f"r = {r}", "c0", None)
            for r, s in shares.items()
        ]
        if any(m.value is not None for m in marks):
            title = f"{kind}: share told apart"
            charts.append(
                f"<figure><figcaption><b>{escape(kind)}</b><small>share of pairs that the judge tells apart</small>"
                f"</figcaption>{interval_chart(title, marks, bounds=(0, 1))}</figure>"
            )
    notes = [
        f"r = {' and '.join(map(str, c['r']))} are the same perturbation for {c['videos']} of {c['of']} videos."
        for c in found.audit.get("coincide") or []
    ]
    notes += [f"{Path(f['video']).name}: {f['reason']}" for f in (found.audit.get("failed") or [])[:20]]
    return (
        "<p class='lead'>The judge reads the two texts and nothing else. A step is an event with the one told after "
        f"it; a pair is told apart when less than {SAME_STORY:.0%} of the steps are in both texts. Intervals are of "
        "95 %.</p>"
        + (f"<div class='charts'>{''.join(charts)}</div>" if charts else "")
        + _table(found, rs, kinds)
        + "<p class='note'>Events and steps in both: over those of the text that tells more. Order τ: Kendall's τ of "
        "the common events. Length ratio: characters of the rejected over the chosen answer. Broken: adjacencies of "
        "the real order that are gone. Kept: share of clips left.</p>"
        + "".join(f"<p class='note'>{escape(n)}</p>" for n in notes)
    )


def _table(found: _Found, rs: list[str], kinds: list[str]) -> str:
    rows = []
    for r in rs:
        per = {k: found.stats[r][k] for k in kinds if k in found.stats[r]}
        for i, (kind, s) in enumerate(per.items()):
            filtered = ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in (s.get("filtered") or {}).items())
            share = s.get("separated")
            apart = interval(share) if isinstance(share, dict) else number(share, 2)
            cells = [number(s.get("made")), filtered or "none", apart, *(number(s.get(k), 2) for k in _MEANS)]
            head = f"<th scope='rowgroup' rowspan='{len(per)}'>{escape(r)}</th>" if i == 0 else ""
            body = "".join(f"<td{' class=words' if j == 1 else ''}>{escape(c)}</td>" for j, c in enumerate(cells))
            rows.append(f"<tr{' class=first' if i == 0 else ''}>{head}<th scope='row'>{escape(kind)}</th>{body}</tr>")
    heads = ["r", "kind", "pairs", "filtered, and why", "told apart", *_MEANS.values()]
    return (
        "<div class='scroll' tabindex='0'><table class='audit'><thead><tr>"
        + "".join(f"<th>{h}</th>" for h in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _level(r: int, found: _Found, pictures: _Pictures) -> str:
    pairs = found.drawn[r]
    if not pairs:
        return "<p class='gap'>No pairs.</p>"
    cards = "".join(_card(record, x, pictures) for record, x in pairs)
    lead = (
        "<p class='lead'>Sentences that are not told in the same run of both texts are marked. Numbers are the clips' "
        "places in the real video; those that are not in their own place have a coloured edge. Black clips were shown "
        "black.</p>"
    )
    return (lead if r == max(found.drawn) else "") + f"<div class='pairs'>{cards}</div>"


def _card(record: PreferenceRecord, x: Rejected, pictures: _Pictures) -> str:
    names, shape, why = pictures.of(record)
    found = measures(record.chosen, x.text)
    figures: dict[str, Any] = {**found, "length_ratio": len(x.text) / len(record.chosen)}
    if x.order:
        figures |= {"broken": x.broken, "kept": x.kept}
    spans = "".join(
        f"<span>{label} <b>{number(figures[name], 2)}</b></span>" for name, label in _MEANS.items() if name in figures
    )
    apart = found["separated"] > 0
    n = record.provenance.get("clips")
    about = f"{n} clips · " if n else ""
    blank = x.blank if len(x.blank) == len(x.order) else []
    gap = f"<p class='gap'>No pictures: {escape(why)}.</p>" if why else ""
    left = film("chosen", names, range(len(names)), shape) if names else ""
    right = film(x.kind, names, x.order, shape, blank) if names and x.order else ""
    return (
        f"<article class='record'><p class='meta'><b>{escape(Path(record.video).name)}</b> · {about}"
        f"“{escape(record.prompt)}” · <code>{escape(record.id)}</code></p>{gap}"
        f"<p class='measures'><b class='{'apart' if apart else 'alike'}'>{'told apart' if apart else 'not told apart'}"
        f"</b>{spans}</p><div class='sides'>"
        f"{_side('chosen', 'in order' if names else '', left, mark(record.chosen, record.spans_for(x)))}"
        f"{_side(x.kind, f'rejected, r = {x.r}', right, mark(x.text, x.spans))}</div></article>"
    )


def _side(kind: str, detail: str, strip: str, text: str) -> str:
    return (
        f"<div class='strip {escape(kind)}'><h5><em>{escape(kind)}</em>{escape(detail)}</h5>{strip}"
        f"<p class='answer'>{text}</p></div>"
    )
