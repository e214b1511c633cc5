"""Worker processes that may crash or hang: what that happens on is known by name, and the rest goes on.

``concurrent.futures`` gives up the whole pool when a worker dies and cannot stop one that hangs. Here every worker has
its own pipe and never more than one job, so that a dead or late worker names its job.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from tempo_fast.errors import InputError

JOBS_PER_PROCESS = 50
"""A worker is replaced after so many jobs: what libraries keep in memory goes with it."""
_POLL_S = 0.1
_KILL_S = 5.0
_START_S = 300.0  # a worker's imports, over a slow network
_NONE = object()


@dataclass(frozen=True)
class Outcome:
    """``value`` is what the job returned, or its last ``report`` where ``failure`` says that it never returned:
    "timeout", "crash" with the process's ``exitcode`` (negative: the signal), or "error" with what it raised: an
    InputError, or a RuntimeError that tells of another exception and has its traceback as cause."""

    value: Any = None
    failure: str = ""
    exitcode: int = 0
    error: Exception | None = None


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    job: Any
    ready: bool = False
    jobs: int = 0
    deadline: float = math.inf
    value: Any = None


def warm_up(modules: Sequence[str]) -> None:
    """Begin to import what workers need, once for all of them, while this process does other things. Only where
    processes are forked; elsewhere each worker imports for itself."""
    context = _context()
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(list(modules))
        _start_server()


def run_isolated(
    function: Callable[..., Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    timeout: Callable[[Any], float],
    shared: Any = None,
    check: Callable[[], None] = lambda: None,
) -> Generator[tuple[Any, Outcome], None, None]:
    """Yield (job, outcome) as jobs finish. Closing the iterator kills what is running.

    Args:
        function: called in a worker as ``function(job, shared, report)``; importable by name, as by pickle. ``report``
            takes a preliminary value, kept in case the job is cut short.
        jobs: picklable; taken one at a time, when a worker is free.
        workers: processes, at least 1.
        timeout: seconds a job may take, from its start in the worker.
        shared: picklable, given to every job.
        check: called ten times a second and more, and before the end of a worker is believed to be its job's fault;
            may raise to stop.

    Raises:
        InputError: a worker cannot start.
    """
    context = _context()
    queue = iter(jobs)
    crew: list[_Worker] = []
    try:
        while True:
            check()
            # the job is taken first: no worker starts for nothing
            while len(crew) < workers and (job := next(queue, _NONE)) is not _NONE:
                crew.append(_start(context, function, shared, job))
            if not crew:
                return
            soonest = min(w.deadline for w in crew) - time.monotonic()
            readable = set(wait([w.pipe for w in crew], max(0.0, min(_POLL_S, soonest))))
            for worker in list(crew):
                outcome = _attend(worker, worker.pipe in readable, timeout, check)
                if outcome is None:
                    continue
                job = worker.job
                spent = outcome.failure in ("timeout", "crash") or worker.jobs >= JOBS_PER_PROCESS
                worker.job = _NONE if spent else next(queue, _NONE)
                if worker.job is _NONE:
                    crew.remove(worker)
                    _end(worker)
                else:
                    _send_job(worker, timeout)
                yield job, outcome
    finally:
        for worker in crew:
            worker.process.kill()
        for worker in crew:
            _end(worker)


def _context() -> Any:
    """Forks of a process without threads of its own: as quick to start as a fork, as safe as a new interpreter."""
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")


def _start_server() -> None:
    """Start the process that is forked from, deaf to Ctrl-C from its first instruction, as are its forks."""
    resource_tracker.ensure_running()  # the server would start it, and let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(context: Any, function: Callable[..., Any], shared: Any, job: Any) -> _Worker:
    if context.get_start_method() == "forkserver":
        _start_server()  # again, should it have died
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, function, shared), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, job, deadline=time.monotonic() + _START_S)


def _send_job(worker: _Worker, timeout: Callable[[Any], float]) -> None:
    worker.value, worker.jobs = None, worker.jobs + 1
    worker.deadline = time.monotonic() + timeout(worker.job)
    try:
        worker.pipe.send(worker.job)
    except OSError:  # it died since its last job; found when its pipe is read
        pass


def _attend(
    worker: _Worker, readable: bool, timeout: Callable[[Any], float], check: Callable[[], None]
) -> Outcome | None:
    """What became of the worker's job, or None while it runs."""
    if not readable:
        if time.monotonic() <= worker.deadline:
            return None
        if not worker.ready:
            raise InputError(f"a worker process did not start within {_START_S:g} s")
        return Outcome(worker.value, "timeout")
    try:
        kind, value = worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(_KILL_S)
        time.sleep(_POLL_S)  # a signal to a group of processes may reach this one last
        check()
        code = worker.process.exitcode or 0
        if not worker.ready:
            few = "; fewer may fit into memory" if code == -signal.SIGKILL else ""
            raise InputError(f"a worker process cannot start ({how_ended(code)}){few}") from None
        return Outcome(worker.value, "crash", code)
    if kind == "ready":
        worker.ready = True
        _send_job(worker, timeout)
    elif kind == "report":
        worker.value = value
    elif kind == "done":
        return Outcome(value)
    else:
        error, text = value
        error.__cause__ = RuntimeError(text)
        return Outcome(worker.value, "error", error=error)
    return None


def how_ended(exitcode: int) -> str:
    """A process's exit code (negative: the signal) in words: SIGKILL, exit code 3."""
    try:
        return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    except ValueError:
        return f"signal {-exitcode}"


def _end(worker: _Worker) -> None:
    """Let a worker go. One that even SIGKILL does not end (its disk does not answer) is left behind."""
    worker.pipe.close()
    worker.process.kill()
    worker.process.join(_KILL_S)


def _work(pipe: Connection, function: Callable[..., Any], shared: Any) -> None:
    # Ctrl-C goes to every process of a terminal; the parent alone decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            try:
                result = "done", function(job, shared, lambda value: pipe.send(("report", value)))
            except Exception as e:
                # others may not survive pickling
                told = e if isinstance(e, InputError) else RuntimeError(f"{type(e).__name__}: {e}")
                result = "error", (told, traceback.format_exc())
            pipe.send(result)
    except (EOFError, OSError):  # the parent has closed its end
        return


def _follow_parent() -> None:
    """A worker whose parent was killed ends at once, in the middle of a job."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
