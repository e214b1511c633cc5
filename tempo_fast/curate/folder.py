"""Many videos to clips: in parallel, over machines, resumable per file; one bad file never stops the run."""

from __future__ import annotations

import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tempo_fast.config import CurateConfig
from tempo_fast.curate.embed import check_embedder
from tempo_fast.curate.journal import Journals, Row
from tempo_fast.curate.shots import check_detector
from tempo_fast.curate.sources import Stamp, stamp_of
from tempo_fast.curate.work import Job, Shared, curate_file, rules_digest
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_jsonl, write_atomic
from tempo_fast.runtime.pool import Outcome, how_ended, run_isolated, warm_up
from tempo_fast.runtime.progress import progress as progress_bar
from tempo_fast.runtime.shards import ALL, Shard
from tempo_fast.schema import Clips, read_records
from tempo_fast.video.decode import open_decoder

log = logging.getLogger(__name__)

_STAMPERS = 16  # threads that look at files: a shared disk answers many at once
_POLL_S = 0.5
_GRACE_S = 30.0
_TELL_S = 30.0


Pool = Callable[[Iterable[Job], Shared], Generator[tuple[Job, Outcome], None, None]]


@dataclass(frozen=True)
class CurateResult:
    """How many videos are usable, filtered (they could be read but the method cannot use them) and quarantined (they
    could not), and ``n_clips`` of the usable ones. ``n_unsettled`` counts what failed for another reason than a file's
    bytes: the next run, or one with more time, may find otherwise. The rows lie in ``folder``, in the order of the
    paths."""

    folder: Path
    n_usable: int
    n_filtered: int
    n_quarantined: int
    n_clips: int
    n_unsettled: int

    @property
    def clips(self) -> list[Clips]:
        """All of ``clips.jsonl``."""
        return read_records(self.folder / "clips.jsonl", Clips)

    @property
    def filtered(self) -> list[dict[str, Any]]:
        """All of ``filtered.jsonl``: {"video", "reason"}."""
        return [row for _, row in read_jsonl(self.folder / "filtered.jsonl")]

    @property
    def quarantined(self) -> list[dict[str, Any]]:
        """All of ``quarantine.jsonl``: {"video", "reason"}."""
        return [row for _, row in read_jsonl(self.folder / "quarantine.jsonl")]


def curate_folder(
    paths: Sequence[str | os.PathLike[str]],
    config: CurateConfig,
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
    backend: str = "auto",
    timeout_s: float | None = None,
    shard: Shard | tuple[int, int] | None = None,
) -> CurateResult | None:
    """Curate every video, writing ``clips.jsonl``, ``filtered.jsonl`` and ``quarantine.jsonl`` into ``out``.

    See ``CurateJob``. The first shard waits for the others and puts the results together; the others return None.
    """
    part = shard if isinstance(shard, Shard) else Shard(*shard) if shard else ALL
    job = CurateJob(
        paths, config, out, workers=workers, progress=progress, check=check, backend=backend, timeout_s=timeout_s,
        together=part.count > 1,
    )  # fmt: skip
    with closing(job):
        job.run(part)
        if not part.is_first:
            return None
        job.wait()
        return job.merge()


class CurateJob:
    """Videos to curate, alone or as one of several processes that share a folder and never talk.

    A file belongs to a shard by a digest of its size and ends (reading all of every file in every process would cost
    more than curating its part). Each finished file is first appended, as one whole synced line, to the shard's own
    journal; every process reads all journals in the folder, whatever the number of shards was when they were written.
    So a run that was killed, or that sees new files, other shards or another config, does only what is missing. A file
    is known again by path, size, time and ends; the same bytes under another name are told by a digest of all of them.
    Failures for another reason than a file's bytes (a crash, the disk, memory, a missing right or file) are tried again
    by the next run of their shard, a timeout when there is more time.

    Files are read in worker processes, so that one which crashes or hangs its process is named. Each worker loads the
    detector and embedder itself, onto its rank's GPU where there is one (TransNetV2 has 30 MB of weights, SigLIP so400m
    about 1 GB in float16): a file then never waits for another process, and a crash takes one network with it.

    Args:
        paths: the videos; the order of the results.
        config: thresholds.
        out: folder, made when missing.
        workers: processes.
        progress: called with (done, total) after each file of this shard; by default a bar on the terminal.
        check: called ten times a second and more; may raise to stop the run (the journal keeps what is done).
        backend: decoder name.
        timeout_s: seconds for one file; None takes ``config.timeout_s``.
        pool: takes the jobs and ``Shared`` and yields (job, runtime.pool.Outcome) as they are done, in place of
            ``workers`` processes of this machine.
        together: whether the shards' processes start at one time, as torchrun's do; tasks of a SLURM array may be hours
            apart.

    Raises:
        InputError: ``out`` cannot be written, another process has this shard, or the detector, embedder or decoder
            asked for is missing.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        config: CurateConfig,
        out: str | os.PathLike[str],
        *,
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
        check: Callable[[], None] | None = None,
        backend: str = "auto",
        timeout_s: float | None = None,
        pool: Pool | None = None,
        together: bool = "RANK" in os.environ,
    ) -> None:
        self.paths, self.config, self.out = [os.fspath(p) for p in paths], config, Path(out)
        self.workers, self.backend = max(1, workers), backend
        self.timeout_s = config.timeout_s if timeout_s is None else timeout_s
        self._progress, self._check, self._pool = progress, check or (lambda: None), pool
        self._rules = rules_digest(config, backend)
        self._began, self._together = time.monotonic(), together
        self._shard = ALL
        self._journals: Journals | None = None
        self._ids: list[bytes] = []
        self._shards = array("I")  # of each path
        self._left: list[int] = []

    def run(self, shard: Shard = ALL) -> None:
        """Curate what is missing of a shard's files."""
        open_decoder(self.backend)  # a missing package is an error of the run, not of each file
        check_detector(self.config)
        check_embedder(self.config)
        self.close()
        self._shard, self._journals = shard, Journals(self.out, shard)
        self._ids, self._shards = [], array("I")
        known: set[bytes] = set()
        first: list[tuple[int, Stamp | None]] = []
        later: list[tuple[int, Stamp | None]] = []
        mine = done = 0
        for i, stamp in enumerate(self._stamps()):
            self._check()
            content = _content(stamp, self.paths[i])
            sample = _short([self._rules, content])
            self._shards.append(int(content[:15], 16) % shard.count)  # as Shard.holds
            self._ids.append(_short([self._rules, _bytes_of(self.paths[i]), stamp]))
            if not shard.holds(content):
                continue
            mine += 1
            if not self._to_do(self._ids[i]):
                done += 1
            elif sample in known or self._journals.alike(sample):
                later.append((i, stamp))  # the bytes may be those of another file
            else:
                known.add(sample)
                first.append((i, stamp))
        with _Told(self._progress, done, mine) as told:
            if first or later:
                warm_up(["tempo_fast.curate.work", "cv2"])
            for some in (first, later):
                for row in self._work(some):
                    self._journals.append(row)
                    told.one_more()
        self._left = list(range(len(self.paths)))

    def _stamps(self) -> Iterator[Stamp | None]:
        with ThreadPoolExecutor(_STAMPERS) as pool:
            paths = iter(self.paths)
            while some := list(islice(paths, 64 * _STAMPERS)):
                yield from pool.map(stamp_of, some)

    def _to_do(self, name: bytes) -> bool:
        journals = self._opened()
        place = journals.place(name)
        if place is None or place.final:
            return place is None
        row = journals.row(name)
        return row is None or row["failure"] != "timeout" or self.timeout_s > row["timeout_s"]

    def _work(self, files: Sequence[tuple[int, Stamp | None]]) -> Iterator[Row]:
        """A row for each file, as they are done."""
        workers, journals = min(self.workers, len(files)), self._opened()
        if not workers:
            return

        def jobs() -> Iterator[Job]:
            for i, stamp in files:
                place = journals.alike(_short([self._rules, _content(stamp, self.paths[i])]))
                known = journals.at(place)["key"] if place else ""
                yield Job(self.paths[i], stamp, known, i, place)

        shared = Shared(self.config, self.backend, max(1, _cores() // workers))
        with closing((self._pool or self._isolated(workers))(jobs(), shared)) as found:
            for job, outcome in found:
                yield self._row(job, outcome)

    def _isolated(self, workers: int) -> Pool:
        limit = lambda job: self.timeout_s  # noqa: E731
        return lambda jobs, shared: run_isolated(
            curate_file, jobs, workers=workers, timeout=limit, shared=shared, check=self._check
        )

    def _row(self, job: Job, outcome: Outcome) -> Row:
        sample = _short([self._rules, _content(job.stamp, job.path)])
        row: Row = {"id": self._ids[job.number].hex(), "sample": sample.hex(), "video": job.path}
        if not outcome.failure:
            found = dict(outcome.value)
            if found.pop("same"):
                # of the file that the job was given: by now others with these ends may have been found
                twin = self._opened().at(job.place) if job.place else {}
                if twin.get("key") != found["key"]:
                    raise InputError(f"{self.out}: its journals were changed by someone else during the run")
                found = {**twin, "failure": found["failure"]}
            return {**found, **row}
        row |= {"key": "", "status": "quarantined", "reason": self._why(job, outcome), "failure": outcome.failure}
        return row | {"clips": None} | ({"timeout_s": self.timeout_s} if outcome.failure == "timeout" else {})

    def _why(self, job: Job, outcome: Outcome) -> str:
        """What kept a job from returning. Raises InputError for what is wrong with more than this one file."""
        if isinstance(outcome.error, InputError):
            raise outcome.error
        if outcome.error is not None:
            log.debug("%s: %s", job.path, outcome.error.__cause__)
            return f"failed ({outcome.error})"
        if outcome.failure == "timeout":
            return f"took longer than {self.timeout_s:g} s"
        return f"crashed the process ({how_ended(outcome.exitcode)})"

    def missing(self) -> list[str]:
        """The videos that have no row yet, of whatever shard.

        A failure that another shard will try again, as found when this run began, counts as a row once nobody is at
        work on that shard; where processes start together, not before they have had the time to start.
        """
        journals = self._opened()
        journals.refresh()
        waiting = self._together and time.monotonic() < self._began + _GRACE_S
        at_work: dict[int, bool] = {}

        def pending(i: int) -> bool:
            place, index = journals.place(self._ids[i]), self._shards[i]
            if place is None or place.final or not place.old or index == self._shard.index:
                return place is None
            if index not in at_work:
                at_work[index] = waiting or journals.runs(Shard(index, self._shard.count))
            return at_work[index]

        self._left = [i for i in self._left if pending(i)]
        return [self.paths[i] for i in self._left]

    def wait(self) -> None:
        """Until every video has a row. ``check`` may raise to stop it."""
        told = 0.0
        while left := self.missing():
            if time.monotonic() - told > _TELL_S:
                shards = sorted({self._shards[i] for i in self._left})
                log.info(
                    "curate: waiting for %d videos of %d other shards (%s)", len(left), len(shards),
                    ", ".join(map(str, shards[:8])) + (" ..." if len(shards) > 8 else ""),
                )  # fmt: skip
                told = time.monotonic()
            time.sleep(_POLL_S)
            self._check()

    def merge(self) -> CurateResult:
        """Write the three files, atomically, each row as it is read; ``clips.jsonl`` appears last."""
        journals = self._opened()
        n = {"ok": 0, "filtered": 0, "quarantined": 0, "clips": 0, "unsettled": 0}

        def write(clips: Any, filtered: Any, quarantine: Any) -> None:
            files = {"ok": clips, "filtered": filtered, "quarantined": quarantine}
            for path, name in zip(self.paths, self._ids, strict=True):
                row = journals.row(name)
                if row is None:
                    raise InputError(f"{path}: is not curated yet; the same command goes on")
                status = row["status"]
                entry = {**row["clips"], "video": path} if status == "ok" else {"video": path, "reason": row["reason"]}
                n[status] += 1
                n["clips"] += len(entry.get("clips", ()))
                n["unsettled"] += bool(row["failure"])
                files[status].write(_line(entry))

        clips, filtered, quarantine = (self.out / f"{name}.jsonl" for name in ("clips", "filtered", "quarantine"))
        write_atomic(
            clips, lambda a: write_atomic(filtered, lambda b: write_atomic(quarantine, lambda c: write(a, b, c)))
        )
        return CurateResult(self.out, n["ok"], n["filtered"], n["quarantined"], n["clips"], n["unsettled"])

    def _opened(self) -> Journals:
        if self._journals is None:
            raise RuntimeError("run() comes first")
        return self._journals

    def close(self) -> None:
        """Give the shard to other processes. Can be called again."""
        if self._journals is not None:
            self._journals.close()
            self._journals = None


class _Told:
    """Progress to a function, or to a bar on the terminal."""

    def __init__(self, tell: Callable[[int, int], None] | None, done: int, total: int) -> None:
        self._tell, self._done, self._total = tell, done, total
        self._bar = None if tell else progress_bar(total, "curate", "video")

    def __enter__(self) -> _Told:
        self._advance(self._done)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def one_more(self) -> None:
        self._done += 1
        self._advance(1)

    def _advance(self, n: int) -> None:
        if self._tell:
            self._tell(self._done, self._total)
        elif self._bar is not None:
            self._bar.update(n)


def _content(stamp: Stamp | None, path: str) -> str:
    """What deals files to shards (hex): the same for the same bytes."""
    return stamp.sample if stamp else digest(["missing", _bytes_of(path)])


def _bytes_of(path: str) -> str:
    return os.fsencode(path).hex()  # a name need not be UTF-8


def _short(of: Any) -> bytes:
    return bytes.fromhex(digest(of)[:32])


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a name whose bytes are not UTF-8
        return json.dumps(row).encode() + b"\n"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
