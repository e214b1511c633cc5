"""RRPO's rows: key phrases between <MASK> and </MASK> in a second copy of each answer (docs/DATA.md and
train_llavavideo.py of pritamqu/RRPO, commit a905573).

Written: ``question``, beginning with the tag <image> on a line of its own, for which its loaders put in the video;
``answer`` (chosen) and ``pred`` (rejected), both again with tags in ``answer_masked`` and ``pred_masked``;
``sample_id``; the video as ``video`` (released files) and ``media_path`` (loaders). The loaders read a JSON array.

Read: that; ``src`` and foreign ``sample_id`` are extra. A phrase that is not found in its answer is reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tempo_fast.pairs.formats.rows import VIDEO_TAG, ForeignRow, Layout, Pair, Row, Span
from tempo_fast.schema import PreferenceRecord, Rejected

_MASK = re.compile(r"<MASK>(.*?)</MASK>", re.DOTALL)
_TAG = re.compile(r"</?MASK>")
_IMAGE = "<image>\n"


def mask(text: str, spans: Sequence[Span]) -> str:
    """``text`` with every range between ``<MASK>`` and ``</MASK>``; ``spans`` are in order and do not overlap."""
    out, last = [], 0
    for start, end in spans:
        out += [text[last:start], "<MASK>", text[start:end], "</MASK>"]
        last = end
    return "".join([*out, text[last:]])


def unmask(text: str, masked: str) -> tuple[list[Span], list[str]]:
    """Ranges of ``text`` that are marked in ``masked``, and the marked phrases that are not found, in order.

    Where ``masked`` is ``text`` with tags, but for white space, the ranges are exact. Elsewhere a phrase is looked for
    right after the words that stand between it and the phrase before it. A tag without its partner counts as a phrase
    that is not found.
    """
    marked = [(m.start(1), m.end(1)) for m in _MASK.finditer(masked)]
    outside = _MASK.sub("", masked)
    if _TAG.search(outside) or any(not masked[s:e].strip() or _TAG.search(masked, s, e) for s, e in marked):
        return _search(text, masked)
    if _TAG.sub("", masked) == text:
        tags = len("<MASK></MASK>")
        return [[s - k * tags - len("<MASK>"), e - k * tags - len("<MASK>")] for k, (s, e) in enumerate(marked)], []
    bare = _TAG.sub(lambda m: " " * len(m.group()), masked)
    if "".join(bare.split()) != "".join(text.split()):
        return _search(text, masked)
    at = [i for i, c in enumerate(text) if not c.isspace()]
    before = [len("".join(bare[:s].split())) for s, _ in marked]
    inside = [len("".join(bare[s:e].split())) for s, e in marked]
    return [[at[n], at[n + k - 1] + 1] for n, k in zip(before, inside, strict=True)], []


def _search(text: str, masked: str) -> tuple[list[Span], list[str]]:
    """Phrase by phrase, where the two copies differ in more than white space."""
    spans: list[Span] = []
    lost: list[str] = []
    cursor = last = 0
    for match in [*_MASK.finditer(masked), None]:
        between = masked[last : match.start() if match else len(masked)]
        lost += [between[tag.start() :].strip()[:80] for tag in _TAG.finditer(between)]
        if match is None:
            break
        last = match.end()
        before, phrase = _TAG.sub("", between).strip(), match.group(1).strip()
        start = _after(text, before, phrase, cursor) if phrase else -1
        if start < 0:
            lost.append(phrase)
            continue
        cursor = start + len(phrase)
        spans.append([start, cursor])
    return spans, lost


def _after(text: str, before: str, phrase: str, cursor: int) -> int:
    """Where ``phrase`` stands in ``text`` right after ``before``, from ``cursor`` on; -1 when it does not."""
    at = text.find(before, cursor) if before else cursor
    while at >= 0:
        start = text.find(phrase, at + len(before))
        if start < 0:
            return -1
        if not text[at + len(before) : start].strip():
            return start
        at = text.find(before, at + 1) if before else -1
    return -1


def _write(record: PreferenceRecord, rejected: Rejected, extra: Row) -> Row:
    return {
        "sample_id": extra.get("sample_id", record.id),
        "video": record.video,
        "media_path": record.video,
        "question": (_IMAGE if record.video else "") + record.prompt,
        "answer": record.chosen,
        "pred": rejected.text,
        "answer_masked": mask(record.chosen, record.spans_for(rejected)),
        "pred_masked": mask(rejected.text, rejected.spans),
    }


def _read(row: ForeignRow) -> Pair:
    video = row.video("media_path")
    if (name := row.video("video")) != video:  # loaders read media_path, a whole path where video is a name
        if video and name:
            row.extra["video"] = name
        video = video or name
    question = row.prompt("question", row.text("question"), video, _IMAGE)
    if row.own is None:
        question = row.prompt("question", question, video, VIDEO_TAG)
    answer, pred = row.text("answer"), row.text("pred")
    chosen_spans = _spans(row, "answer_masked", answer, "chosen_spans")
    return Pair(video, question, answer, pred, chosen_spans, _spans(row, "pred_masked", pred, "spans"))


def _spans(row: ForeignRow, name: str, text: str, own: str) -> list[Span] | None:
    """None where our column has them and the tags still say the same: a text may hold the letters of a tag."""
    masked = row.text(name)
    if row.own is not None:
        known = [row.own.get("rejected", {}).get(own, []), row.own.get("record", {}).get("spans", [])]
        try:
            if masked in [mask(text, spans) for spans in known]:
                return None
        except (TypeError, ValueError):  # no ranges at all, which the record's own check says
            return None
    spans, lost = unmask(text, masked)
    for phrase in lost:
        row.note(name, f"marks {phrase!r}, which is not in the answer")
    return spans


RRPO = Layout(
    name="rrpo",
    columns=frozenset({"media_path", "video", "question", "answer", "pred", "answer_masked", "pred_masked"}),
    id_column="sample_id",
    claims=lambda row: "answer_masked" in row or "pred_masked" in row or ("pred" in row and "chosen" not in row),
    write=_write,
    read=_read,
    tags=("<MASK>", "</MASK>", "<image>"),
    schema={name: str for name in (
        "sample_id", "video", "media_path", "question", "answer", "pred", "answer_masked", "pred_masked",
    )},
)  # fmt: skip
