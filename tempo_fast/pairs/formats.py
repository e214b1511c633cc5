"""Preference data as others write it: TRL, ms-swift and RRPO rows, and our own.

The foreign formats have one row per pair. What they have no field for goes into a column ``tempo_fast`` of its own,
which other readers ignore, so that a record survives the way there and back. Without that column, rows of equal video,
prompt and chosen answer become one record (one tree).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_jsonl, write_jsonl
from tempo_fast.pairs.spans import Span, union
from tempo_fast.schema import PreferenceRecord, Rejected, read_records

VIDEO_TAG = "<video>"
_MASK = re.compile(r"<MASK>(.*?)</MASK>", re.DOTALL)

Row = dict[str, Any]
# (video, prompt, chosen, chosen spans, rejected, rejected spans)
Pair = tuple[str, str, str, list[Span], str, list[Span]]


def write_pairs(path: str | Path, records: Sequence[PreferenceRecord], fmt: str = "native") -> None:
    """Write records as ``native``, ``trl``, ``ms-swift`` or ``rrpo`` JSON lines, atomically."""
    if fmt == "native":
        write_jsonl(path, records)
        return
    make = _known(fmt)[0]
    write_jsonl(path, ({**make(r, x), "tempo_fast": _own(r, x)} for r in records for x in r.rejected))


def read_pairs(
    path: str | Path, fmt: str = "auto", *, r: int = 0, problems: list[str] | None = None
) -> list[PreferenceRecord]:
    """Read records of any of the formats; ``auto`` tells them by the fields of the first line.

    Args:
        r: difficulty given to rows that do not say theirs.
        problems: what could not be taken over exactly (an RRPO span that is not in the answer) is appended here.

    Raises:
        InputError: naming file, line and field, for a missing, empty or ill-typed field; for an empty file.
    """
    if fmt == "auto":
        fmt = _detect(path)
    if fmt == "native":
        records = read_records(path, PreferenceRecord)
        if not records:
            raise InputError(f"{path}: holds no record")
        return records
    read = _known(fmt)[1]
    found: dict[str, PreferenceRecord] = {}
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        video, prompt, chosen, spans, text, rejected_spans = read(where, row, problems if problems is not None else [])
        own = row.get("tempo_fast") or {}
        try:
            key = str(own.get("id") or digest([video, prompt, chosen])[:16])
            given = {"kind": "given", "r": r, "spans": rejected_spans, "chosen_spans": spans, **own.get("rejected", {})}
            rejected = Rejected(**{**given, "text": text})
            extra = own.get("record", {})
            record = found.setdefault(
                key,
                PreferenceRecord(
                    id=key, video=video, prompt=prompt, chosen=chosen, rejected=[], r=extra.get("r", r),
                    spans=extra.get("spans", []), provenance=extra.get("provenance", {}),
                ),
            )  # fmt: skip
        except (TypeError, AttributeError) as e:
            raise InputError(f"{where}: field 'tempo_fast' is not what this program writes ({e})") from e
        record.rejected.append(rejected)
        if "spans" not in extra:
            record.spans = union([record.spans, spans])
    if not found:
        raise InputError(f"{path}: holds no record")
    return list(found.values())


def _own(record: PreferenceRecord, rejected: Rejected) -> Row:
    return {
        "id": record.id,
        "record": {"r": record.r, "spans": record.spans, "provenance": record.provenance},
        "rejected": {k: v for k, v in asdict(rejected).items() if k != "text"},
    }


def _detect(path: str | Path) -> str:
    for _, row in read_jsonl(path):
        if "rejected_response" in row or "messages" in row:
            return "ms-swift"
        if "pred" in row or "answer_masked" in row:
            return "rrpo"
        return "trl" if isinstance(row.get("prompt"), list) else "native"
    raise InputError(f"{path}: holds no record")


def _known(fmt: str) -> tuple[Callable[..., Row], Callable[..., Pair]]:
    if fmt not in _FORMATS:
        raise InputError(f"unknown format of preference data {fmt!r}; known: {', '.join(FORMATS)}")
    return _FORMATS[fmt]


def _text(where: str, row: Row, name: str) -> str:
    value = row.get(name)
    if name not in row:
        raise InputError(f"{where}: field '{name}' is missing")
    if not isinstance(value, str):
        raise InputError(f"{where}: field '{name}' must be str, got {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{where}: field '{name}' is empty")
    return value


def _videos(where: str, row: Row) -> str:
    videos = row.get("videos", [])
    if not isinstance(videos, list) or not all(isinstance(v, str) for v in videos):
        raise InputError(f"{where}: field 'videos' must be a list of paths")
    if len(videos) > 1:
        raise InputError(f"{where}: field 'videos' names {len(videos)} videos; one is supported")
    return videos[0] if videos else ""


# TRL: conversational preference with an explicit prompt


def _to_trl(record: PreferenceRecord, rejected: Rejected) -> Row:
    content: list[Row] = [{"type": "video"}] if record.video else []
    content.append({"type": "text", "text": record.prompt})

    def answer(text: str) -> list[Row]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    return {
        "prompt": [{"role": "user", "content": content}],
        "chosen": answer(record.chosen),
        "rejected": answer(rejected.text),
        "videos": [record.video] if record.video else [],
    }


def _message(where: str, row: Row, name: str, role: str) -> tuple[str, str]:
    """(text, path of a video given in the content) of a one-message list, or of a plain string."""
    value = row.get(name)
    if isinstance(value, list):
        if len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
            raise InputError(f"{where}: field '{name}' must hold one message of role {role}")
        value = value[0].get("content")
    if isinstance(value, list):
        parts = [p for p in value if isinstance(p, dict)]
        video = next((str(p["video"]) for p in parts if p.get("type") == "video" and p.get("video")), "")
        value = "".join(str(p.get("text", "")) for p in parts if p.get("type") == "text")
    else:
        video = ""
    return _text(where, {name: value} if value is not None else {}, name), video


def _from_trl(where: str, row: Row, problems: list[str]) -> Pair:
    prompt, inline = _message(where, row, "prompt", "user")
    chosen, _ = _message(where, row, "chosen", "assistant")
    rejected, _ = _message(where, row, "rejected", "assistant")
    return _videos(where, row) or inline, prompt.replace(VIDEO_TAG, ""), chosen, [], rejected, []


# ms-swift: messages with the chosen answer last, and rejected_response


def _to_swift(record: PreferenceRecord, rejected: Rejected) -> Row:
    return {
        "messages": [
            {"role": "user", "content": (VIDEO_TAG if record.video else "") + record.prompt},
            {"role": "assistant", "content": record.chosen},
        ],
        "rejected_response": rejected.text,
        "videos": [record.video] if record.video else [],
    }


def _from_swift(where: str, row: Row, problems: list[str]) -> Pair:
    messages = row.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{where}: field 'messages' is missing or not a list of messages")
    roles = [m.get("role") for m in messages]
    if roles != ["user", "assistant"]:
        raise InputError(f"{where}: field 'messages' must be one user and one assistant message, got {roles}")
    prompt = _text(f"{where}: messages[0]", messages[0], "content")
    chosen = _text(f"{where}: messages[1]", messages[1], "content")
    rejected = _text(where, row, "rejected_response")
    return _videos(where, row), prompt.removeprefix(VIDEO_TAG).lstrip("\n"), chosen, [], rejected, []


# RRPO: key phrases between <MASK> and </MASK> in a second copy of each answer


def mask(text: str, spans: Sequence[Span]) -> str:
    """``text`` with every range between ``<MASK>`` and ``</MASK>``."""
    out, last = [], 0
    for start, end in spans:
        out += [text[last:start], "<MASK>", text[start:end], "</MASK>"]
        last = end
    return "".join([*out, text[last:]])


def unmask(text: str, masked: str) -> tuple[list[Span], list[str]]:
    """Ranges of ``text`` that are marked in ``masked``, and the marked phrases that are not found, in order.

    White space may differ from that of ``text`` beside the tags.
    """
    spans: list[Span] = []
    lost: list[str] = []
    cursor = last = 0
    for match in _MASK.finditer(masked):
        before, phrase = masked[last : match.start()].strip(), match.group(1).strip()
        last = match.end()
        # the text before the phrase says which of several equal phrases is meant
        at = text.find(before, cursor) if before else cursor
        start = text.find(phrase, at + len(before)) if at >= 0 and phrase else -1
        if start < 0 or text[at + len(before) : start].strip():
            lost.append(phrase)
            continue
        cursor = start + len(phrase)
        spans.append([start, cursor])
    return spans, lost


def _to_rrpo(record: PreferenceRecord, rejected: Rejected) -> Row:
    return {
        "sample_id": record.id,
        "video": record.video,
        "question": record.prompt,
        "answer": record.chosen,
        "pred": rejected.text,
        "answer_masked": mask(record.chosen, record.spans_for(rejected)),
        "pred_masked": mask(rejected.text, rejected.spans),
    }


def _from_rrpo(where: str, row: Row, problems: list[str]) -> Pair:
    answer, pred = _text(where, row, "answer"), _text(where, row, "pred")
    question = _text(where, row, "question").replace(VIDEO_TAG, "").strip()
    video = row.get("media_path") or row.get("video") or ""
    marked = []
    for name, text in (("answer_masked", answer), ("pred_masked", pred)):
        spans, lost = unmask(text, _text(where, row, name))
        problems += [f"{where}: field '{name}': {phrase!r} is not in the answer" for phrase in lost]
        marked.append(spans)
    return str(video), question, answer, marked[0], pred, marked[1]


_FORMATS: dict[str, tuple[Callable[..., Row], Callable[..., Pair]]] = {
    "trl": (_to_trl, _from_trl),
    "ms-swift": (_to_swift, _from_swift),
    "rrpo": (_to_rrpo, _from_rrpo),
}


FORMATS = ("native", *_FORMATS)
