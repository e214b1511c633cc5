"""Buckets of videos, the records that each of them gave, and how they are put together.

    parts/<bits>-<bucket>.jsonl     the records of a finished bucket, after a line about it
    r<r>.jsonl, audit.json          the result
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from tempo_fast.config import PairsConfig
from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, digest, file_digest, to_plain, write_atomic, write_json
from tempo_fast.pairs.filters import Tally, coinciding
from tempo_fast.pairs.method import Item, Part
from tempo_fast.stats import share_interval

_MOST_PROBLEMS = 200  # in the audit


@dataclass(frozen=True)
class Bucket:
    """Items whose digests begin with the ``bits`` bits of ``number``, with their places among all items."""

    bits: int
    number: int
    items: list[Item]
    places: list[int]

    @property
    def name(self) -> str:
        return f"{self.bits}-{self.number:0{-(-self.bits // 4) or 1}x}"

    def related(self, name: str) -> bool:
        """Whether the bucket of this name, of a run over more or fewer videos, can hold videos of this one."""
        bits, _, number = name.partition("-")
        if not (bits.isdecimal() and number):
            return False
        shift = self.bits - int(bits)
        return self.number >> shift == int(number, 16) if shift >= 0 else int(number, 16) >> -shift == self.number


def make_buckets(items: Sequence[Item], size: int) -> list[Bucket]:
    """Deal items into 2 ** bits buckets of ``size`` items at most on average, empty ones left out."""
    bits = max(0, (-(-len(items) // size) - 1).bit_length())
    found: dict[int, Bucket] = {}
    for place, item in enumerate(items):
        number = int(item.digest[:16], 16) >> (64 - bits)
        bucket = found.setdefault(number, Bucket(bits, number, [], []))
        bucket.items.append(item)
        bucket.places.append(place)
    return [found[number] for number in sorted(found)]


@dataclass
class Parts:
    """What the buckets of ``items`` gave, below ``out``.

    Args:
        items: the videos; their order is the order of the records.
        config: method and settings.
        out: folder, shared by all processes.
        settings: digest of all else that decides the records (who answers, seed, ...).

    Raises:
        InputError: there is nothing to make pairs from.
    """

    items: Sequence[Item]
    config: PairsConfig
    out: Path
    settings: str
    buckets: list[Bucket] = field(init=False)
    _keys: dict[int, str] = field(init=False, default_factory=dict)
    _left: list[Bucket] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.items = list(self.items)[: self.config.max_videos or None]
        if not self.items:
            raise InputError("pairs: there is no video to make pairs from")
        self.buckets = make_buckets(self.items, self.config.bucket_videos)

    def path(self, bucket: Bucket) -> Path:
        """Where the records of a finished bucket are."""
        return self.out / "parts" / f"{bucket.name}.jsonl"

    def is_done(self, bucket: Bucket, *, settled: bool = False) -> bool:
        """Whether its records are there, made from the same inputs; ``settled``: with no failure of a video that may go
        well another time."""
        try:
            with open(self.path(bucket), "rb") as f:
                head = json.loads(f.readline())
            return head["key"] == self._key(bucket) and not (settled and any(f.get("again") for f in head["failed"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def keep(self, bucket: Bucket, part: Part) -> None:
        """Write what a bucket gave."""
        places: dict[str, int] = {}
        for place, item in zip(bucket.places, bucket.items, strict=True):
            places.setdefault(item.video, place)
        head = {
            "key": self._key(bucket),
            "tallies": [[r, kind, vars(t)] for (r, kind), t in sorted(part.tallies.items())],
            "failed": part.failed,
            "counts": part.counts,
            "problems": part.problems,
        }

        def write(f: BinaryIO) -> None:
            f.write(canonical_json(head).encode() + b"\n")
            for record in part.records:
                row = json.dumps(to_plain(record), ensure_ascii=False)
                f.write(f"{record.r}\t{places[record.video]}\t{row}\n".encode())

        write_atomic(self.path(bucket), write)

    def _key(self, bucket: Bucket) -> str:
        if bucket.number not in self._keys:
            made_of = [[i.video, i.digest, i.version, i.clips, i.questions] for i in bucket.items]
            self._keys[bucket.number] = digest([self.settings, made_of])
        return self._keys[bucket.number]

    def missing(self) -> list[Bucket]:
        """Buckets that are not done; one that was done once is not looked at again."""
        self._left = [b for b in (self.buckets if self._left is None else self._left) if not self.is_done(b)]
        return self._left

    def merge(self) -> dict[str, Any]:
        """Write ``r<r>.jsonl`` (empty where nothing is left) and ``audit.json`` from the finished buckets.

        Returns:
            The audit, as ``audit.json`` holds it: ``records`` and ``pairs`` per r, ``files`` with digest,
            ``stats[str(r)][kind]`` with made, filtered and means (filters.Tally, judge.measures), ``separated`` with
            its interval, ``coincide``, ``failed``, ``counts``, ``problems``.

        Raises:
            InputError: no pair is left, a bucket is missing.
        """
        tallies = {(r, kind): Tally() for r in self.config.r for kind in self._kinds()}
        failed: list[dict[str, str]] = []
        problems: list[dict[str, str]] = []
        counts: Counter[str] = Counter()
        for bucket in self.buckets:
            if not self.is_done(bucket):
                raise InputError(f"{self.path(bucket)}: not there yet, or made from other inputs")
            head = self._head(bucket)
            for r, kind, row in head["tallies"]:
                tallies.setdefault((r, kind), Tally()).merge(Tally(**{**row, "filtered": Counter(row["filtered"])}))
            failed += head["failed"]
            problems += head["problems"][: _MOST_PROBLEMS - len(problems)]
            counts.update(head["counts"])
            counts["problems"] += len(head["problems"])
        order = {item.video: place for place, item in enumerate(self.items)}
        failed.sort(key=lambda f: order.get(f["video"], 0))
        videos = {f["video"] for f in failed}
        sizes = [len(i.clips.clips) for i in self.items if i.clips is not None and i.video not in videos]
        files = {r: self._write(r) for r in self.config.r}
        audit = {
            "videos": len(self.items),
            "failed": failed,
            "records": {str(r): f["records"] for r, f in files.items()},
            "pairs": {str(r): f["pairs"] for r, f in files.items()},
            "files": {f"r{r}.jsonl": {"sha256": f["sha256"]} for r, f in files.items()},
            "coincide": coinciding(sizes, self.config.r),
            "stats": {str(r): {kind: _stats(t) for (of, kind), t in tallies.items() if of == r} for r in self.config.r},
            "counts": dict(sorted((+counts).items())),
            "problems": problems,
        }  # fmt: skip
        write_json(self.out / "audit.json", audit)
        if not any(f["records"] for f in files.values()):
            where = self.out / "audit.json"
            for r in self.config.r:
                (self.out / f"r{r}.jsonl").unlink()
            raise InputError(f"{where}: no pair is left of {len(self.items)} videos, 'stats' and 'failed' say why")
        return audit

    def _kinds(self) -> list[str]:
        return self.config.kinds if self.config.method in ("temple", "rrpo") else []

    def _head(self, bucket: Bucket) -> dict[str, Any]:
        with open(self.path(bucket), "rb") as f:
            return json.loads(f.readline())

    def _write(self, r: int) -> dict[str, Any]:
        """Put the records of one r together, in the order of the items; memory holds their places alone."""
        index: list[tuple[int, int, int]] = []  # (place of the item, number of the bucket, offset): in this order
        for number, bucket in enumerate(self.buckets):
            for offset, of, place, _ in _lines(self.path(bucket)):
                if of == r:
                    index.append((place, number, offset))
        index.sort()
        pairs = 0

        def write(f: BinaryIO) -> None:
            nonlocal pairs
            at, source = -1, None
            try:
                for _, number, offset in index:
                    if number != at:
                        if source is not None:
                            source.close()
                        at, source = number, open(self.path(self.buckets[number]), "rb")
                    assert source is not None
                    source.seek(offset)
                    row = source.readline().split(b"\t", 2)[2]
                    pairs += len(json.loads(row)["rejected"])
                    f.write(row)
            finally:
                if source is not None:
                    source.close()

        path = self.out / f"r{r}.jsonl"
        write_atomic(path, write)
        return {"records": len(index), "pairs": pairs, "sha256": file_digest(path)}


def _stats(tally: Tally) -> dict[str, Any]:
    apart = round(tally.sums.get("separated", 0.0))
    return {**tally.row(), "separated": share_interval(apart, tally.made)}


def _lines(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(offset, r, place of the item, record) of every record in a part."""
    with open(path, "rb") as f:
        offset = len(f.readline())
        for line in f:
            r, place, row = line.split(b"\t", 2)
            yield offset, int(r), int(place), row
            offset += len(line)
