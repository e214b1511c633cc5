"""What pairs are made from: curated videos, or videos with questions about them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tempo_fast.curate.sources import stamp_of
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.pairs.method import Item
from tempo_fast.schema import Clips, QARecord, read_records, resolve_videos

_LOOKERS = 16


def clip_items(path: Path) -> list[Item]:
    """``clips.jsonl`` of the curation, in the order of the videos' paths."""
    return [Item(c.video, c.digest, clips=c) for c in sorted(read_records(path, Clips), key=lambda c: c.video)]


def read_questions(path: Path) -> list[QARecord]:
    """JSON lines of QARecord; paths of videos are relative to the file.

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
    return questions


def question_items(path: Path) -> list[Item]:
    """The questions of a file by video, in the order of the videos' paths.

    A video is dealt by its size and both ends: reading all of every file, in every process, would cost more than what
    follows. One that cannot be read is an item all the same: the method that asks about it puts it down as failed.
    """
    asked: dict[str, list[QARecord]] = {}
    for q in read_questions(path):
        asked.setdefault(q.video, []).append(q)
    videos = sorted(asked)
    with ThreadPoolExecutor(_LOOKERS) as pool:  # a shared disk answers many at once
        stamps = list(pool.map(stamp_of, videos))
    out = []
    for video, stamp in zip(videos, stamps, strict=True):
        known = (stamp.sample, f"{stamp.size}-{stamp.mtime_ns}") if stamp else (digest(["unreadable", video]), "")
        out.append(Item(video, *known, questions=tuple(asked[video])))
    return out
