"""``python -m bench video``: from a file to Qwen2-VL's model input, ours on each decoder beside what others use.

Clips in ``bench.videos.clips`` (60 s of 1280x720 at 30 frames/s, made once into --clips), sides in
``bench.videos.sides`` and ``bench.videos.peers``. Every side takes the same number of evenly spaced frames into the
same pixel budget on the same cores (--threads), from a file in the page cache; of the settings that a side offers the
fastest in warm-up is measured (``settings``, all in ``tried``). Ours has probed the file before, as in every epoch but
the first; ``_cold`` sides have not. ``decode_only`` is the floor: no more than the frames that must be decoded, each
from the keyframe before it (``must``; with its setting ``skip`` fewer), none converted; ``floor`` is its share of a
side's time.

``over`` is a side's videos/s over each rival's, ``over_cpu`` the same by CPU time, for a machine that others load.
``split`` is milliseconds by section (``processor`` rescales, normalises and patchifies, and resizes where no ``resize``
stands), ``host_mib`` and ``peak_mib`` the highest resident memory and torch's CUDA memory (DALI's own pool is not in
it) over what was there before; what an earlier call left in the heap to be used again does not count.
``error`` is against ours on PyAV in levels of 255, at the frames that the side took; ``wrong`` there names another
shape or other frames, and makes the exit code 1.

--loader adds the share of a step (--step-ms, a sleep) that is spent waiting for videos with 0, 1 and 2 workers, the
first video's wait left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.head import NO_TIME
from bench.measure import Deadline, Laps, environment, orders, peak_mib, synchronize, table, write
from bench.videos.clips import CLIPS, Clip
from bench.videos.peers import PEERS
from bench.videos.sides import GEOMETRY, OURS, Absent, Case, Judge, Read, Side
from tempo_fast.errors import InputError
from tempo_fast.video.loader import Prefetcher
from tempo_fast.video.reader import VideoReader

Row = dict[str, Any]
LIBC = ctypes.CDLL(None)
SIDES = {side.name: side for side in (*OURS, *PEERS)}
RIVALS = tuple(side.name for side in PEERS)
PACKAGES = (
    "av", "torchcodec", "decord", "torchvision", "qwen-vl-utils", "llamafactory", "nvidia-dali-cuda130", "pillow",
)  # fmt: skip
COLUMNS = (
    "case", "impl", "videos_per_s", "frames_per_s", "ms", "ms_min", "ms_max", "cpu_s", "floor", "host_mib", "peak_mib",
    "error.shift", "error.max", "error.mean", "settings",
)  # fmt: skip


def measure_case(
    case: Case, sides: Sequence[Side], repetitions: int, deadline: Deadline | None = None, tries: int = 2
) -> list[Row]:
    """A row per side, in order; after the deadline no side starts, and the repetitions end with their round."""
    judge = Judge(case)
    rows: list[Row] = []
    running: list[tuple[Row, Read]] = []
    for side in sides:
        row: Row = {"case": case.name, "impl": side.name, "ours": side.ours}
        rows.append(row)
        if deadline is not None and deadline.left() <= 0:
            row["skipped"] = NO_TIME
            continue
        try:
            read = _fastest(side, case, row, tries)
            row["host_mib"], found = _host_peak(read)
            if case.device == "cuda":
                row["peak_mib"] = peak_mib(read, case.device)
        except Absent as problem:
            row["skipped"] = str(problem)
            continue
        except Exception as problem:  # a peer may fail in any way; the others still run
            row["skipped"] = f"failed: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            continue
        row["route"] = read.route
        if found is not None:
            row["error"] = judge.of(found, read.indices, side.rule)
        del found
        running.append((row, read))
        gc.collect()
    laps = [Laps() for _ in running]
    splits: list[list[dict[str, float]]] = [[] for _ in running]
    for order in orders(len(running), repetitions):
        for i in order:
            read = running[i][1]
            read.sections.ms.clear()
            _lap(read, laps[i])
            splits[i].append(dict(read.sections.ms))
        if deadline is not None and deadline.left() <= 0:
            break
    for (row, read), times, split in zip(running, laps, splits, strict=True):
        read.close()
        row |= {**times.summary(), "repetitions": len(times.wall)}
        row["cpu_s"] = row["ms_cpu"] / 1e3
        row["videos_per_s"], row["frames_per_s"] = 1e3 / row["ms"], 1e3 * case.frames / row["ms"]
        row["split"] = {name: median(parts.get(name, 0.0) for parts in split) for name in split[0]}
        row["must"] = case.clip.must_decode(list(read.indices))
    _ratios(rows)
    return rows


def _ratios(rows: Sequence[Row]) -> None:
    done = {row["impl"]: row for row in rows if "ms" in row}
    for row in done.values():
        for key, clock in (("over", "ms"), ("over_cpu", "ms_cpu")):
            row[key] = {name: done[name][clock] / max(row[clock], 1e-9) for name in RIVALS if name in done}
        if "decode_only" in done:
            row["floor"] = done["decode_only"]["ms"] / row["ms"]


def _lap(read: Read, laps: Laps) -> None:
    device = read.case.device
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    out = read()
    synchronize(device)
    laps.wall.append(1e3 * (time.perf_counter() - wall))
    laps.cpu.append(1e3 * (time.process_time() - cpu))
    del out


def _fastest(side: Side, case: Case, row: Row, tries: int) -> Read:
    """The side with the settings that were fastest, all of them in ``tried``."""
    reads = [(side.open(case, settings), Laps()) for settings in side.choices(case)]
    reads[0][0]()  # imports, caches, the heap: for every side, whatever the number of its settings
    if len(reads) > 1:
        for order in orders(len(reads), tries):
            for i in order:
                _lap(*reads[i])
        row["tried"] = [{**read.settings, "ms": min(laps.wall)} for read, laps in reads]
    best = min(reads, key=lambda entry: min(entry[1].wall, default=0.0))[0]
    for read, _ in reads:
        if read is not best:
            read.close()
    row["settings"] = best.settings
    return best


def _host_peak(read: Read) -> tuple[float | None, torch.Tensor | None]:
    """MiB of resident memory at its highest during one call over before it (Linux), and what the call gave."""

    def resident(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    gc.collect()  # frames may hang in cycles
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)  # what earlier sides left would be used again unseen
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
    except OSError:
        return None, read()
    found = read()
    return resident("VmHWM") - before, found


# -- the loader -------------------------------------------------------------------------------------------------------


def measure_loader(case: Case, backend: str, step_ms: float, videos: int, workers: Sequence[int]) -> list[Row]:
    """A row per number of workers: the share of the time that a step of ``step_ms`` per video spends waiting, and how
    long the first of at least two ``videos``, which is not in that share, was waited for."""
    reader = VideoReader(case.config(backend), GEOMETRY, case.device)
    plans = [reader.plan(case.path)] * videos
    reader.pixels(plans[0])
    rows = []
    for count in workers:
        source: Any = reader
        if count:
            source = Prefetcher(reader, plans, workers=count, ahead=2 * count, timeout_s=600.0)
        waits, steps = list[float](), list[float]()
        cpu = time.process_time()
        for plan in plans:
            asked = time.perf_counter()
            pixels = source.pixels(plan)
            got = time.perf_counter()
            del pixels
            time.sleep(step_ms / 1e3)
            waits.append(got - asked)
            steps.append(time.perf_counter() - got)
        if count:
            source.close()
        rows.append({
            "case": case.name, "impl": f"loader/{backend}", "workers": count, "step_ms": step_ms, "videos": videos,
            "wait_frac": sum(waits[1:]) / (sum(waits[1:]) + sum(steps[1:])), "wait_ms": 1e3 * median(waits[1:]),
            "first_wait_ms": 1e3 * waits[0], "cpu_s": (time.process_time() - cpu) / videos,
        })  # fmt: skip
    return rows


# -- the command ------------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> str:
    """What was measured, its ratio to each rival, where the time went, and what did not run."""
    done = [row for row in rows if "ms" in row]
    parts = [table(done, COLUMNS)]
    rivals = [name for name in RIVALS if any(name in row.get("over", {}) for row in done)]
    ours = [row for row in done if row["ours"]]
    if ours and rivals:
        keys = ("over", "over_cpu")
        parts += [table(ours, ("case", "impl", *(f"{key}.{name}" for name in rivals))) for key in keys]
    names = list(dict.fromkeys(name for row in done for name in row["split"]))
    parts.append(table([{**row, **row["split"]} for row in done], ("case", "impl", *names, "must", "route")))
    loader = [row for row in rows if "workers" in row]
    if loader:
        names = ["workers", "step_ms", "videos", "wait_frac", "wait_ms", "first_wait_ms", "cpu_s"]
        parts.append(table(loader, ("case", "impl", *names)))
    wrong = [f"WRONG {r['case']} {r['impl']}: {r['error']['wrong']}" for r in done if "wrong" in r.get("error", {})]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "skipped" in row:
            reasons.setdefault((row["impl"], row["skipped"]), []).append(row["case"])
    everything = {row["case"] for row in rows}
    skipped = [
        f"skipped {impl}: {why}" + ("" if set(cases) == everything else f" ({', '.join(cases)})")
        for (impl, why), cases in reasons.items()
    ]
    return "\n\n".join(part for part in (*parts, "\n".join(wrong + skipped)) if part)


def failed(rows: Sequence[Row]) -> list[Row]:
    """Rows whose input is wrong, and rows of ours that broke."""
    return [
        row for row in rows
        if "wrong" in row.get("error", {}) or (row.get("ours") and str(row.get("skipped", "")).startswith("failed"))
    ]  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench video", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--clips", help="folder that keeps the clips; default: a temporary one")
    parser.add_argument("--clip", nargs="+", choices=tuple(CLIPS), default=list(CLIPS))
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a clip (default 60)")
    parser.add_argument("--size", nargs=2, type=int, default=[1280, 720], metavar=("WIDTH", "HEIGHT"), help="even")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64], help="frames per video, even")
    parser.add_argument("--max-pixels", type=int, default=602_112, help="of a frame (default 768 * 28 * 28)")
    parser.add_argument("--total-pixels", type=int, default=9_000_000, help="of a video, as video.total_pixels")
    parser.add_argument("--impls", nargs="+", choices=tuple(SIDES), default=list(SIDES), metavar="IMPL",
                        help=f"of {', '.join(SIDES)}")  # fmt: skip
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tries", type=int, default=2, help="warm-up calls that choose a side's settings (default 2)")
    parser.add_argument("--threads", type=int, default=0, help="cores that every side may use; 0 is all of them")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no side after this long; 0 is no limit")
    parser.add_argument("--loader", action="store_true", help="also the loader's waiting times")
    parser.add_argument("--step-ms", nargs="+", type=float, default=[500.0, 2000.0], help="of a step, for --loader")
    parser.add_argument("--videos", type=int, default=8, help="steps of one video, for --loader (default 8)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if min(args.repetitions, args.tries) < 1 or args.videos < 2 or min(args.step_ms) < 0:
        parser.error("--repetitions and --tries must be at least 1, --videos 2, --step-ms 0")
    if min(args.size) < 28 or any(n % 2 for n in args.size):
        parser.error("--size must be even numbers from 28")
    most = round(args.seconds * Clip("", 1).fps)
    if any(n % 2 or not 2 <= n <= most for n in args.frames):
        parser.error(f"--frames must be even numbers from 2 to the {most} of a clip")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 0 <= args.threads <= cores:
        parser.error(f"--threads {args.threads}: there are {cores} cores to use")
    args.threads = args.threads or cores
    return args


def use_cores(count: int) -> None:
    """Leave this process ``count`` of its cores: every decoder then finds no more than those."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    use_cores(args.threads)
    env = environment(args.device)
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    env["packages"] = {**env["packages"], **found}
    env["time"] = "ms is wall clock around a call, the device waited for; ms_cpu is the process's CPU time"
    env["host_mib"] = "VmHWM over VmRSS before the call, the heap trimmed"
    deadline = Deadline(60 * args.minutes) if args.minutes else None
    sides = [SIDES[name] for name in args.impls]
    budget = {"max_pixels": args.max_pixels, "total_pixels": args.total_pixels}
    rows: list[Row] = []
    clips: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, frames in itertools.product(args.clip, args.frames):
            clip = replace(CLIPS[name], seconds=args.seconds, width=args.size[0], height=args.size[1])
            path = clip.make(Path(args.clips or temporary))
            case = Case(clip, path, frames, args.device, args.threads, budget)
            if name not in [told["clip"] for told in clips]:
                mbit = path.stat().st_size * 8 / clip.seconds / 1e6
                clips.append({"clip": name, "mbit_per_s": mbit, "keyframes": len(case.info.keyframes)})
            try:
                rows += measure_case(case, sides, args.repetitions, deadline, args.tries)
                if args.loader:
                    for step_ms in args.step_ms:
                        rows += measure_loader(case, "pyav", step_ms, args.videos, (0, 1, 2))
            except InputError as problem:
                print(f"bench video: {problem}", file=sys.stderr)
                return 1
            write(args.json, env, rows, clips=clips)
    width, height = args.size
    told = ", ".join(f"{c['clip']} {c['mbit_per_s']:.2f} Mbit/s" for c in clips)
    print(f"{args.seconds:g} s of {width}x{height}: {told}; {env['machine']}, {env['threads']} threads")
    print(report(rows))
    return 1 if failed(rows) else 0


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
