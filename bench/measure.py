"""What every benchmark shares: interleaved timing, peak memory, the environment, the JSON and the table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

MEMORY_NOTE = {
    "cpu": "peak of live bytes of torch's CPU allocator over the state before the call, from the profiler's memory "
    "events; a BLAS library's own scratch is not in it",
    "cuda": "torch.cuda.max_memory_allocated over memory_allocated before the call",
}
TIME_NOTE = {
    "cpu": "ms is wall clock; ms_cpu the CPU time of all threads, which stays comparable on a machine that others load",
    "cuda": "ms is between CUDA events, after a write of four times the L2 cache; ms_cpu is the host's CPU time",
}
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "trl", "quack-kernels", "transformers")


def environment(device: str) -> dict[str, Any]:
    """Versions, machine, threads, load and commit: what a number cannot be read without."""
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": _output(*driver) if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _output("git", "describe", "--always", "--dirty"),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "time": TIME_NOTE[device],
        "peak_mib": MEMORY_NOTE[device],
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# -- time -------------------------------------------------------------------------------------------------------------


class Timed(Protocol):
    """Something with a forward that builds a loss and a backward that differentiates it."""

    @property
    def forward(self) -> Callable[[], Tensor]: ...

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]: ...


@dataclass
class Laps:
    """Milliseconds per repetition."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Median and spread."""
        return {"ms": median(self.wall), "ms_min": min(self.wall), "ms_max": max(self.wall), "ms_cpu": median(self.cpu)}


@dataclass
class Times:
    forward: Laps = field(default_factory=Laps)
    backward: Laps = field(default_factory=Laps)
    both: Laps = field(default_factory=Laps)
    """From the start of forward to the end of backward: the sum of the two."""


class Marks:
    """Points in time on the device. On CUDA they are events, so that no wait stands between forward and backward."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.points: list[Any] = []
        self.cpu: list[float] = []

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def between(self, start: int, end: int) -> float:
        """Milliseconds between two marks; waits for the device."""
        first, last = self.points[start], self.points[end]
        if self.cuda:
            last.synchronize()
        return first.elapsed_time(last) if self.cuda else 1e3 * (last - first)

    def lap(self, laps: Laps, start: int, end: int) -> None:
        """Add the time between two marks; waits for the device."""
        laps.wall.append(self.between(start, end))
        laps.cpu.append(1e3 * (self.cpu[end] - self.cpu[start]))


def cold_cache(device: str) -> Callable[[], object]:
    """A call that pushes the inputs out of a GPU's L2 cache. Nothing on a CPU, where they are far larger than it."""
    if device != "cuda":
        return lambda: None
    size = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 64 * 2**20
    buffer = torch.empty(4 * size, dtype=torch.uint8, device=device)
    return buffer.zero_


def orders(count: int, repetitions: int) -> Iterator[list[int]]:
    """An order of 0..count-1 per round: each starts one further on, and every other one runs backwards."""
    for round_ in range(repetitions):
        order = [(round_ + i) % count for i in range(count)]
        yield order if round_ % 2 == 0 else order[::-1]


def interleaved(
    steps: Sequence[Timed], repetitions: int, device: str, until: Callable[[], bool] | None = None
) -> list[Times]:
    """Times of each step (already warm), ``repetitions`` times: all once per round, so that drift hits all alike.

    ``until`` ends it after a whole round.
    """
    times = [Times() for _ in steps]
    clear = cold_cache(device)
    for order in orders(len(steps), repetitions):
        for i in order:
            clear()
            synchronize(device)
            marks = Marks(device)
            marks.mark()
            loss = steps[i].forward()
            marks.mark()
            gradients = steps[i].backward(loss)
            marks.mark()
            for laps, start, end in ((times[i].forward, 0, 1), (times[i].backward, 1, 2), (times[i].both, 0, 2)):
                marks.lap(laps, start, end)
            del loss, gradients
        if until is not None and until():
            break
    return times


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Deadline:
    """``seconds`` from now on, by ``clock``."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.end = clock() + seconds

    def left(self) -> float:
        """Seconds, negative when it has passed."""
        return self.end - self.clock()


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``. Main thread only; elsewhere and on Windows it never does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    try:
        before = signal.signal(signal.SIGALRM, stop)
    except (AttributeError, ValueError):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- memory -----------------------------------------------------------------------------------------------------------


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """MiB that one call allocates at its highest, over what was live before it. See MEMORY_NOTE."""
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest / 2**20


# -- output -----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; floats with four significant digits, nested dicts as key=value, what is missing as -.

    A column ``a.b`` is the entry b of the dict a.
    """

    def show(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{k}={show(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return "x".join(map(str, value))
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    def find(row: Any, column: str) -> Any:
        for key in column.split("."):
            row = row.get(key) if isinstance(row, dict) else None
        return row

    cells = [list(columns), *([show(find(row, c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write(path: str | Path | None, env: dict[str, Any], rows: list[dict[str, Any]], **more: Any) -> None:
    """The file ``{"env": ..., **more, "rows": [...]}``, complete at any moment, or nothing without a path."""
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps({"env": env, **more, "rows": rows}, indent=1) + "\n")
        temporary.replace(target)
