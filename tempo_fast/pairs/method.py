"""What every way to make pairs offers: videos with what is asked about them in, records and their audit out.

A method sees one bucket of videos at a time (pairs.run makes the buckets, keeps what is done, and puts the parts
together). What it returns may depend on nothing but its arguments and the engine's answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tempo_fast.config import PairsConfig
from tempo_fast.generation import Request
from tempo_fast.pairs.filters import Tally
from tempo_fast.pairs.prompts import PromptPool
from tempo_fast.schema import Clips, PreferenceRecord, QARecord

Ask = Callable[[Sequence[Request], str], list[str]]
"""Answers to requests, in order; the words name a progress bar (empty: none). Kept on disk, equal requests are asked
once."""


@dataclass(frozen=True)
class Item:
    """One video: ``digest`` of its content or, with ``version``, of a sample of it, ``version`` then being another for
    other bytes; its ``clips`` (TEMPLE), what is asked about it (the other methods)."""

    video: str
    digest: str
    version: str = ""
    clips: Clips | None = None
    questions: Sequence[QARecord] = ()


@dataclass(frozen=True)
class Context:
    """What a method works with.

    ``ask`` the model, ``judge`` the judge model (None: there is none); ``reader`` is a video.reader.VideoReader;
    ``seed`` of everything that is drawn; ``prompts`` to caption a video by; ``provenance`` goes into every record;
    ``references`` the reference answers of all questions, whatever bucket they are in.
    """

    ask: Ask
    judge: Ask | None
    reader: Any
    config: PairsConfig
    seed: int
    prompts: PromptPool
    provenance: dict[str, Any]
    references: Sequence[str] = ()


@dataclass
class Part:
    """What came of a bucket.

    ``records`` of any r, in the order of the items; ``tallies`` by (r, kind); ``failed`` videos that could not be read
    (see ``failure``); ``counts`` of whatever a method wants in the audit; ``problems`` to be looked at
    ({"record", "what"}), such as a key phrase that is not in its answer.
    """

    records: list[PreferenceRecord] = field(default_factory=list)
    tallies: dict[tuple[int, str], Tally] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[dict[str, str]] = field(default_factory=list)

    def tally(self, r: int, kind: str) -> Tally:
        return self.tallies.setdefault((r, kind), Tally())


def failure(video: str, error: Exception | str) -> dict[str, str]:
    """A row of ``Part.failed``; ``again`` says why it may go well another time, where the file is not at fault."""
    from tempo_fast.video.container import DecodeTimeout
    from tempo_fast.video.frames import not_of_the_file

    row = {"video": video, "reason": str(error)}
    if isinstance(error, Exception):
        again = "timeout" if isinstance(error, DecodeTimeout) else not_of_the_file(error)
        row |= {"again": again} if again else {}
    return row


class Method(Protocol):
    def __call__(self, items: Sequence[Item], context: Context) -> Part:
        """Make the records of a bucket. Raises InputError for trouble that is not one video's."""
        ...
