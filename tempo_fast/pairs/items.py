"""What pairs are made from: curated videos, or videos with questions about them."""

from __future__ import annotations

from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.pairs.method import Item
from tempo_fast.schema import Clips, QARecord, read_records, resolve_videos
from tempo_fast.video.probe import content_digest


def clip_items(path: Path) -> list[Item]:
    """``clips.jsonl`` of the curation, in the order of the videos' paths."""
    return [Item(c.video, c.digest, clips=c) for c in sorted(read_records(path, Clips), key=lambda c: c.video)]


def question_items(path: Path) -> list[Item]:
    """JSON lines of QARecord by video, in the order of the videos' paths; paths are relative to the file. A video that
    cannot be read is an item all the same: the method that asks about it puts it down as failed.

    Raises:
        InputError: a wrong row, no row, two questions of one id.
    """
    questions = read_records(path, QARecord)
    if not questions:
        raise InputError(f"{path}: holds no question")
    ids: set[str] = set()
    for q in questions:
        if q.id in ids:
            raise InputError(f"{path}: two questions have the id {q.id!r}")
        ids.add(q.id)
    resolve_videos(questions, path.parent)
    asked: dict[str, list[QARecord]] = {}
    for q in questions:
        asked.setdefault(q.video, []).append(q)
    return [Item(video, _digest(video), questions=tuple(asked[video])) for video in sorted(asked)]


def _digest(video: str) -> str:
    try:
        return content_digest(video)
    except InputError:
        return digest(["unreadable", video])
