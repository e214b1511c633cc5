"""Film strips: the clips of a video in the order told by the chosen answer, and in that of each rejected one."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.report.load import RunFiles
from tempo_fast.schema import Clips, PreferenceRecord, events_of

THUMB = 112  # px, longer side


@dataclass
class Sheet:
    """Thumbnails of the page, each stored once as a CSS class."""

    rules: list[str] = field(default_factory=list)

    def add(self, jpeg: bytes) -> str:
        name = f"f{len(self.rules)}"
        data = base64.b64encode(jpeg).decode()
        self.rules.append(f".{name}{{background-image:url(data:image/jpeg;base64,{data})}}")
        return name


def choose_records(records: Sequence[PreferenceRecord], kinds: int, skip: int = 0) -> list[PreferenceRecord]:
    """Records that show every kind ``kinds`` times between them, those with most kinds first, from the ``skip``-th."""
    ranked = sorted(records, key=lambda x: -len(x.rejected))
    full = len(ranked[0].rejected) if ranked else 0
    best = [x for x in ranked if len(x.rejected) == full]
    start = skip % max(1, len(best))
    shown: dict[str, int] = {}
    chosen = []
    for record in [*best[start:], *best[:start], *ranked[len(best) :]]:
        if any(shown.get(x.kind, 0) < kinds for x in record.rejected):
            chosen.append(record)
            for x in record.rejected:
                shown[x.kind] = shown.get(x.kind, 0) + 1
    return chosen


def thumbnails(clips: Clips) -> list[bytes]:
    """One JPEG per clip, of its first keyframe. Raises InputError when the video cannot be read any more."""
    from PIL import Image

    from tempo_fast.video.decode import open_decoder

    indices = [c.keyframes[0] if c.keyframes else (c.start_frame + c.end_frame) // 2 for c in clips.clips]
    frames = open_decoder("pyav").decode(clips.video, indices).cpu().numpy()
    out = []
    for frame in frames:
        picture = Image.fromarray(frame)
        picture.thumbnail((THUMB, THUMB))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=82)
        out.append(buffer.getvalue())
    return out


def record_card(run: RunFiles, record: PreferenceRecord, sheet: Sheet, most: int) -> str:
    """One record: the clean strip with the chosen answer, then a strip per rejected answer; texts alone where the
    pairs were made of questions, and not of clips."""
    if record.provenance.get("method", "temple") != "temple":
        return _words(record, most)
    clips = find_clips(run, record.video)
    names: list[str] = []
    note, shape = "", "1"
    if clips is None:
        note = "the video is not among the curated ones any more"
    else:
        try:
            names = [sheet.add(jpeg) for jpeg in thumbnails(clips)]
            shape = aspect(clips)
        except InputError as e:
            note = str(e)
    n = len(names) or max([1, *(max(x.order, default=0) + 1 for x in record.rejected)])
    parts = [
        '<article class="record">',
        f'<p class="meta"><b>{escape(Path(record.video).name)}</b> · {n} clips · “{escape(record.prompt)}”</p>',
    ]
    if note:
        parts.append(f'<p class="gap">No pictures: {escape(note)}.</p>')
    parts.append(_row("chosen", "in order", names, list(range(n)), record.chosen, record.spans, most, shape))
    for x in record.rejected:
        detail = f"{x.broken:.0%} of adjacencies broken" if x.kind != "drop" else f"{x.kept:.0%} of clips kept"
        parts.append(_row(x.kind, detail, names, x.order, x.text, x.spans, most, shape, x.blank))
    return "".join(parts) + "</article>"


def _words(record: PreferenceRecord, most: int) -> str:
    parts = [
        '<article class="record">',
        f'<p class="meta"><b>{escape(Path(record.video).name)}</b> · “{escape(record.prompt)}”</p>',
        _row("chosen", "", [], [], record.chosen, record.spans, most, "1"),
    ]
    for x in record.rejected:
        seen = [f"{x.kept:.0%} of the frames seen"] if x.kept < 1 else []
        seen += [f"{x.broken:.0%} of adjacencies broken"] if x.broken else []
        parts.append(_row(x.kind, ", ".join(seen), [], [], x.text, x.spans, most, "1"))
    return "".join(parts) + "</article>"


def find_clips(run: RunFiles, video: str) -> Clips | None:
    """The curated video of a record, by path or by what the path resolves to."""
    if video in run.clips:
        return run.clips[video]
    wanted = os.path.realpath(video)
    return next((c for v, c in run.clips.items() if os.path.realpath(v) == wanted), None)


def aspect(clips: Clips) -> str:
    """Width over height, as CSS writes it. Raises InputError when the video cannot be read."""
    from tempo_fast.video.probe import probe

    info = probe(clips.video)
    return f"{info.width / info.height:.3f}"


def _row(
    kind: str,
    detail: str,
    names: list[str],
    order: list[int],
    text: str,
    spans: list[list[int]],
    most: int,
    shape: str,
    blank: Sequence[bool] = (),
) -> str:
    sentences = events_of(text)
    told = sentences if len(sentences) == len(order) else []
    picked = range(len(order))
    if len(order) > most:
        picked = sorted({round(i * (len(order) - 1) / (most - 1)) for i in range(most)})  # type: ignore[assignment]
    cut = f"; {len(picked)} of {len(order)} clips shown" if len(picked) < len(order) else ""
    body = "" if told else f"<p class='answer'>{mark(text, spans)}</p>"
    shown = film(kind, names, order, shape, blank, told, picked) if order else ""
    return f'<div class="strip {kind}"><h5><em>{kind}</em> {escape(detail)}{cut}</h5>{shown}{body}</div>'


def film(
    kind: str,
    names: Sequence[str],
    order: Sequence[int],
    shape: str,
    blank: Sequence[bool] = (),
    told: Sequence[str] = (),
    picked: Sequence[int] | None = None,
) -> str:
    """Clips as an ordered list: a picture each, black where blank, its place in the video, and what is told of it.

    Args:
        kind: ``chosen``, or a perturbation; clips that a shuffle or reverse moved get a coloured edge.
        names: CSS classes of the video's clips; clips beyond them are grey.
        order: which clips are shown.
        shape: see ``aspect``.
        picked: places in ``order`` to show, if not all.
    """
    frames = []
    for i in range(len(order)) if picked is None else picked:
        name = "blank" if blank and blank[i] else names[order[i]] if order[i] < len(names) else ""
        picture = f'<i class="{name}" style="aspect-ratio:{shape}"></i>' if name else "<i></i>"
        moved = "" if kind in ("chosen", "drop") or order[i] == i else " moved"
        caption = f"<span>{escape(told[i])}</span>" if told else ""
        frames.append(f'<li class="{moved.strip()}">{picture}<b>{order[i] + 1}</b>{caption}</li>')
    return f'<ol tabindex="0" aria-label="{escape(kind)}">{"".join(frames)}</ol>'


def mark(text: str, spans: Sequence[Sequence[int]]) -> str:
    """The text as HTML with its differing spans marked."""
    out, at = [], 0
    for start, end in sorted((int(a), int(b)) for a, b in spans):
        if start < at or end > len(text):
            continue
        out += [escape(text[at:start]), "<mark>", escape(text[start:end]), "</mark>"]
        at = end
    return "".join([*out, escape(text[at:])])
