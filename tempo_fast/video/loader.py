"""Decoding ahead of the step: worker threads fill a bounded queue in the order in which videos will be asked for.

Decoders and torch's resize let go of the interpreter, so threads suffice and pixels are never copied between
processes. What comes out depends on the plans alone, never on the number of workers or on who was first.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from tempo_fast.config import LoaderConfig
from tempo_fast.video.container import DecodeTimeout

WORKER = "tempo-fast-decode"
"""Name of the threads."""


class Source(Protocol):
    """What makes pixels of plans: a ``VideoReader``."""

    def pixels(self, plan: Any) -> Tensor: ...


class _Job:
    """One video on its way: ``result`` is set before ``done``."""

    def __init__(self, plan: Any) -> None:
        self.plan = plan
        self.done = threading.Event()
        self.result: Tensor | BaseException | None = None
        self.started = 0.0
        self.dropped = False  # will not be asked for
        self.given_up = False  # its worker has been replaced


class Prefetcher:
    """A source that decodes the videos of ``plans`` before they are asked for.

    At most ``ahead`` decoded videos wait at a time. Videos are to be asked for in the order of ``plans``: one that is
    asked for out of turn lets those before it go. A video that was not foreseen is decoded by the caller.

    Args:
        source: decodes; used from several threads at once.
        plans: lazily read, as room comes free; never from another thread than the caller's.
        workers: threads, >= 1.
        ahead: most videos decoded or being decoded and not taken yet, >= 1.
        timeout_s: longest time a worker may take for one video. Its thread is then given up and replaced: a call into
            a decoder that never returns cannot be ended, and holds its memory until the process ends.
        skip: called with a plan when its turn comes; true where it will not be asked for (its features are cached).
        once: a video that is on its way, or was the last one taken, is not decoded for a second plan of the same key:
            whoever asks keeps what it makes of it.
    """

    def __init__(
        self,
        source: Source,
        plans: Iterable[Any],
        *,
        workers: int,
        ahead: int,
        timeout_s: float,
        skip: Callable[[Any], bool] = lambda plan: False,
        once: bool = False,
    ) -> None:
        if workers < 1 or ahead < 1 or timeout_s <= 0:
            raise ValueError(f"Prefetcher: {workers} workers, {ahead} ahead, {timeout_s} s; all must be above 0")
        self.source, self.ahead, self.timeout_s = source, ahead, timeout_s
        self._plans, self._skip, self._once = iter(plans), skip, once
        self._jobs: list[_Job] = []  # not taken yet, in order
        self._last = ""  # key of the one taken last
        self._running: list[_Job] = []
        self._lock = threading.Lock()  # over what a job's end and its giving up both change
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._workers = workers
        self._closed = False
        # CUDA's current device belongs to a thread: without this, workers of every rank would use the first GPU
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        for _ in range(workers):
            self._hire()
        self._fill()

    def pixels(self, plan: Any) -> Tensor:
        """The source's pixels of ``plan``. Raises what the source raised, or DecodeTimeout after ``timeout_s``."""
        if self._at(plan) is None:
            # what is cached since it was foreseen will not be asked for, and must not take up the room
            self._drop([job for job in self._jobs if self._skip(job.plan)])
            self._fill()
        at = self._at(plan)
        if at is None:
            return self.source.pixels(plan)
        job = self._jobs[at]
        self._drop(self._jobs[:at])
        self._jobs.remove(job)
        self._last = plan.key
        self._fill()
        result = self._wait(job)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Let the workers go; what waits is dropped."""
        self._closed = True
        self._drop(list(self._jobs))
        for _ in range(self._workers):
            self._queue.put(None)

    def _at(self, plan: Any) -> int | None:
        return next((i for i, job in enumerate(self._jobs) if job.plan.key == plan.key), None)

    def _drop(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.dropped = True
            self._jobs.remove(job)

    def _wait(self, job: _Job) -> Tensor | BaseException:
        while not job.done.wait(self._patience()):
            self._replace_hung()
            if job.given_up:
                where = getattr(job.plan, "path", job.plan.key)
                return DecodeTimeout(f"{where}: took longer than {self.timeout_s:g} s (loader.timeout_s)")
        assert job.result is not None
        return job.result

    def _patience(self) -> float:
        """Seconds until there is something to look at: every worker may hang on a video that nobody waits for."""
        with self._lock:
            begun = [job.started for job in self._running]
        return max(0.01, min(begun, default=time.monotonic()) + self.timeout_s - time.monotonic())

    def _replace_hung(self) -> None:
        with self._lock:
            hung = [job for job in self._running if time.monotonic() - job.started >= self.timeout_s]
            for job in hung:
                job.given_up = True
                self._running.remove(job)
        for _ in hung:
            self._hire()

    def _fill(self) -> None:
        while not self._closed and len(self._jobs) < self.ahead:
            plan = next(self._plans, None)
            if plan is None:
                return
            on_its_way = self._once and (plan.key == self._last or self._at(plan) is not None)
            if on_its_way or self._skip(plan):
                continue
            job = _Job(plan)
            self._jobs.append(job)
            self._queue.put(job)

    def _hire(self) -> None:
        # daemon: one that hangs in a decoder must not keep the process alive
        threading.Thread(target=self._work, name=WORKER, daemon=True).start()

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while (job := self._queue.get()) is not None:
            stays = job.dropped or self._run(job)
            del job  # or an idle worker would keep a video in memory
            if not stays:
                return  # another has taken its place

    def _run(self, job: _Job) -> bool:
        """Whether this worker still has its place afterwards."""
        job.started = time.monotonic()
        with self._lock:
            self._running.append(job)
        try:
            job.result = self.source.pixels(job.plan)
        except BaseException as e:  # handed to whoever asks for it
            job.result = e
        with self._lock:
            if not job.given_up:
                self._running.remove(job)
        job.done.set()
        return not job.given_up


@contextmanager
def prefetching(
    source: Source,
    plans: Iterable[Any],
    loader: LoaderConfig | None,
    *,
    skip: Callable[[Any], bool] = lambda plan: False,
    once: bool = False,
) -> Iterator[Source]:
    """A ``Prefetcher`` by configuration, closed at the end; ``source`` itself without workers."""
    if loader is None or loader.workers == 0:
        yield source
        return
    ahead = Prefetcher(
        source, plans, workers=loader.workers, ahead=loader.ahead, timeout_s=loader.timeout_s, skip=skip, once=once
    )
    try:
        yield ahead
    finally:
        ahead.close()
