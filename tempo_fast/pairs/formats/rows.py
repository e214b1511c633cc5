"""What every format of preference data shares: a row's fields read with reasons, and what is not read kept."""

from __future__ import annotations

import base64
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tempo_fast.files import to_plain
from tempo_fast.schema import PreferenceRecord, Rejected

Row = dict[str, Any]
Span = list[int]

OWN = "tempo_fast"
"""The column for what a format has no field for: a JSON string, so that a loader that infers column types, as Hugging
Face's does for ms-swift and LLaMA-Factory, finds one type in every row. Other readers ignore it."""

EXTRA = "extra"
"""Key of ``provenance``: a list with, for every rejected answer, the columns of its row that the format's reader does
not know (scores, margins, sources, ids). Absent where no row had any."""

VIDEO_TAG = "<video>"
OTHER_MEDIA = ("images", "image", "audios", "audio", "rejected_images", "rejected_audios")


class RowError(Exception):
    """A row that cannot be taken over; ``str()`` is the reason and names the field."""

    def __init__(self, field: str, reason: str, at: str = "") -> None:
        super().__init__((f"{at}: " if at else "") + (f"field '{field}' {reason}" if field else reason))
        self.field = field


@dataclass(frozen=True)
class Problem:
    """What could not be taken over, or not exactly.

    ``line`` counts from 1: lines of JSON lines, rows of JSON arrays, Parquet and Arrow files, records on writing.
    ``field`` is empty where the whole row is broken. ``kept``: the row was taken over all the same.
    """

    path: str
    line: int
    field: str
    reason: str
    kept: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass
class Pair:
    """What a foreign row says. The spans are character ranges of the two answers; None: what our column has of them."""

    video: str
    prompt: str
    chosen: str
    rejected: str
    chosen_spans: list[Span] | None = None
    rejected_spans: list[Span] | None = None


Report = Callable[[Problem], object]
"""Takes each problem as it is found."""


def to_log(log: logging.Logger, most: int = 20) -> Report:
    """A report that warns of the first problems, and once that there are more."""
    count = 0

    def report(problem: Problem) -> None:
        nonlocal count
        count += 1
        if count <= most:
            log.warning("%s", problem)
        elif count == most + 1:
            log.warning("%s: more are not listed", problem.path)

    return report


def text_of(row: Mapping[str, Any], name: str, at: str = "") -> str:
    """A text that must be there. Raises RowError when it is missing, empty, no text, or holds a NUL character."""
    value = row.get(name)
    if value is None:
        raise RowError(name, "is missing", at)
    if not isinstance(value, str):
        raise RowError(name, f"must be str, got {type(value).__name__}", at)
    if not value.strip():
        raise RowError(name, "is empty", at)
    if "\0" in value:
        raise RowError(name, "holds a NUL character", at)
    return value


def plain(value: Any, *, nulls: bool = True) -> Any:
    """As JSON can hold it: dates and the like as text, bytes as base64, numbers that are not finite as null.

    ``nulls=False`` also leaves out the null fields of objects, which Arrow puts wherever a row lacks one.
    """
    if isinstance(value, dict):
        return {str(k): plain(v, nulls=nulls) for k, v in value.items() if nulls or v is not None}
    if isinstance(value, (list, tuple)):
        return [plain(v, nulls=nulls) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value if value is None or isinstance(value, (str, int)) else str(value)


def dumps(obj: Any) -> str:
    """JSON as all our files have it."""
    return json.dumps(obj, ensure_ascii=False, default=to_plain)


def union(groups: list[list[Span]]) -> list[Span]:
    """All distinct ranges of several lists, in order. (pairs.spans has it too, and uses this package.)"""
    return [list(s) for s in sorted({(s[0], s[1]) for group in groups for s in group})]


class ForeignRow:
    """One row of a foreign format: what a layout's reader takes it apart with.

    ``own`` is our column, where this program wrote the row: then texts are taken as they stand. Otherwise tags of media
    and the white space beside them are taken out. ``notes`` collects (field, reason) of what is not taken over exactly,
    ``extra`` what a record has no field for.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.own = own_of(row)
        self.notes: list[tuple[str, str]] = []
        self.extra: Row = {}

    def text(self, name: str) -> str:
        return text_of(self.row, name)

    def note(self, name: str, reason: str) -> None:
        self.notes.append((name, f"field '{name}' {reason}"))

    def video(self, *columns: str, inline: list[str] | tuple[str, ...] = ()) -> str:
        """The one video of these columns and of ``inline``; empty when they name none.

        Raises RowError for several videos, frames or bytes in their place, and images or sound beside them.
        """
        for name in OTHER_MEDIA:
            if self.row.get(name):
                raise RowError(name, "holds images or sound, which a record has no field for")
        paths = list(inline)
        for name in columns:
            value = self.row.get(name)
            for item in value if isinstance(value, list) else [value] if value else []:
                item = item.get("path") if isinstance(item, dict) else item  # as Hugging Face's Video feature has it
                if isinstance(item, list):
                    raise RowError(name, "holds frames; the path of one video is supported")
                if not isinstance(item, str) or not item or "\0" in item:
                    raise RowError(name, "must hold paths of videos")
                paths.append(item)
        if len(set(paths)) > 1:
            raise RowError(columns[0], f"names {len(set(paths))} videos; one is supported")
        return paths[0] if paths else ""

    def prompt(self, name: str, text: str, video: str, tag: str = VIDEO_TAG) -> str:
        """``text`` without the tag of its video; ``tag`` with a line feed where the format's writers put one after it.

        Raises RowError when a tag stands for a video that the row does not name, or nothing is left.
        """
        if self.own is not None:
            return text.removeprefix(tag) if video else text
        mark = tag.strip()
        if mark not in text:
            return text
        if not video:
            raise RowError(name, f"holds {mark}, but the row names no video")
        before, *rest = text.split(mark)
        if before.strip() or any(part.strip() for part in rest[:-1]):
            self.note(name, f"has {mark} inside its text; the video comes before the text here")
        left = "".join([before, *rest]).strip()
        if not left:
            raise RowError(name, "is empty")
        return left

    def only_turn(self, turns: list[Turn], name: str) -> Turn:
        """The user's one message. A system message goes into ``extra``. Raises RowError for more turns."""
        if turns and turns[0].role == "system":
            self.extra["system"] = turns[0].text
            self.note(name, "has a system message, which goes into provenance only")
            turns = turns[1:]
        if [t.role for t in turns] != ["user"]:
            raise RowError(name, f"must hold one user message before the answers, got {[t.role for t in turns]}")
        return turns[0]


def own_of(row: Row) -> Row | None:
    """What our column holds. Raises RowError where it is not ours."""
    own = row.get(OWN)
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except ValueError as e:
            raise RowError(OWN, f"is not what this program writes ({e})") from e
    if own is not None and not isinstance(own, dict):
        raise RowError(OWN, f"is not what this program writes ({type(own).__name__})")
    for name in ("record", "rejected", EXTRA):
        if own and not isinstance(own.get(name, {}), dict):
            raise RowError(OWN, f"is not what this program writes ({name}: {type(own[name]).__name__})")
    return own or None


@dataclass
class Turn:
    """One message. ``tagged`` is its text with a tag where a video stands in structured content."""

    role: str
    text: str
    tagged: str
    videos: list[str]


_ROLES = {"human": "user", "gpt": "assistant"}


def turns_of(value: Any, name: str, role: str = "role", content: str = "content") -> list[Turn]:
    """A list of messages. Raises RowError, naming message and field, for what is no message of text and videos."""
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise RowError(name, "is missing" if value is None else "must be a list of messages")
    return [turn_of(m, f"{name}[{i}]", role, content) for i, m in enumerate(value)]


def turn_of(message: Row, at: str, role: str = "role", content: str = "content") -> Turn:
    """One message, its content plain text or a list of parts."""
    who = text_of(message, role, at)
    body = message.get(content)
    if not isinstance(body, list):
        text = text_of(message, content, at)
        return Turn(_ROLES.get(who, who), text, text, [])
    texts: list[str] = []
    tagged: list[str] = []
    videos: list[str] = []
    for part in body:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = None
        if isinstance(part, dict):
            kind = part.get("type") or next((k for k in ("video", "text") if k in part), None)
        if kind == "text":
            texts.append(str(part.get("text") or ""))
            tagged.append(texts[-1])
        elif kind == "video":
            tagged.append(VIDEO_TAG)
            path = part.get("video") or part.get("path") or part.get("url")
            videos += [path] if isinstance(path, str) else []
        else:
            raise RowError(content, f"has a part of type {kind!r}; text and video are supported", at)
    text = text_of({content: "".join(texts)}, content, at)
    return Turn(_ROLES.get(who, who), text, "".join(tagged), videos)


def answer_text(value: Any, name: str, role: str = "role", content: str = "content") -> str:
    """An answer: plain text, one message of the assistant, or a list of one. Raises RowError for anything else."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return text_of({name: value}, name)
    turns = turns_of(value, name, role, content)
    if len(turns) != 1 or turns[0].role != "assistant" or turns[0].videos:
        raise RowError(name, f"must hold one message of the assistant, got {[t.role for t in turns]}")
    return turns[0].text


@dataclass(frozen=True)
class Layout:
    """One way to lay out a pair in a row.

    Attributes:
        columns: what ``read`` looks at; all others are extra.
        id_column: written with the record's id; in rows of others an extra column.
        claims: whether a row looks like one of this layout.
        tags: what this layout's own readers take for a tag wherever a text holds it.
        schema: Arrow types of the columns that ``write`` fills in, as (name, type) pairs of ``arrow.py``'s spelling.
    """

    name: str
    columns: frozenset[str]
    id_column: str
    claims: Callable[[Row], bool]
    write: Callable[[PreferenceRecord, Rejected, Row], Row]
    read: Callable[[ForeignRow], Pair]
    tags: tuple[str, ...]
    schema: Mapping[str, Any]
