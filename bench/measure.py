"""What every benchmark shares: interleaved timing, peak memory, the environment, the JSON and the table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

MEMORY_NOTE = {
    "cpu": "peak of live bytes of torch's CPU allocator over the state before the call, from the profiler's memory "
    "events; a BLAS library's own scratch is not in it",
    "cuda": "torch.cuda.max_memory_allocated over memory_allocated before the call",
}


def environment(device: str) -> dict[str, Any]:
    """Versions, machine, threads, load and commit: what a number cannot be read without."""
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": done.stdout.strip() or None,
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "peak_mib": MEMORY_NOTE[device],
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Times(NamedTuple):
    """Milliseconds per repetition."""

    wall: list[float]
    cpu: list[float]
    """Of all threads of this process: what remains comparable on a machine that others load."""


def interleaved(calls: Sequence[Callable[[], Any]], repetitions: int, device: str) -> list[Times]:
    """Times of each call, ``repetitions`` times: all calls once per round, so that drift hits all alike.

    The order turns around every other round. One unmeasured round warms up.
    """
    for call in calls:
        call()
    times = [Times([], []) for _ in calls]
    for round_ in range(repetitions):
        order = range(len(calls)) if round_ % 2 == 0 else range(len(calls) - 1, -1, -1)
        for i in order:
            _sync(device)
            start, start_cpu = time.perf_counter(), time.process_time()
            calls[i]()
            _sync(device)
            times[i].wall.append(1e3 * (time.perf_counter() - start))
            times[i].cpu.append(1e3 * (time.process_time() - start_cpu))
    return times


def peak_mib(call: Callable[[], Any], device: str) -> float:
    """MiB that one call allocates at its highest, over what was live before it. See MEMORY_NOTE."""
    if device == "cuda":
        _sync(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _sync(device)
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


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text; floats with four significant digits, nested dicts as key=value."""

    def show(value: Any) -> str:
        if isinstance(value, dict):
            return " ".join(f"{k}={show(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return "x".join(map(str, value))
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [list(columns), *([show(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write(path: str | None, env: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The file ``{"env": ..., "rows": [...]}``, or nothing without a path."""
    if path:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps({"env": env, "rows": rows}, indent=1) + "\n")
        temporary.replace(target)
