"""``python -m bench step``: preference training steps, trees beside rows.

The same records and model; the sides are in ``bench.steps.sides``. A case ``1+k`` has one chosen and k rejected answers
per video: k pairs. A step takes --records videos through forward, backward and AdamW, in micro-batches of one record
(``tree_1``, ``rows_1``), of four (``tree_4``, ``rows_4``), or of one pair (``rows``); ``full_live`` is one pair with
the logits of all positions and a live reference, as TEMPLE was published. ``_live`` runs the reference in the step, the
others read what was kept of it. Every side has the same --checkpointing. Nothing is decoded. With --vision ``encoded``
each video goes through the tower once for trees, and once per row for rows, as TRL's collator repeats it. --liger puts
Liger's model kernels under every side, so that ``rows`` is TRL's set-up with use_liger_kernel.

``records_per_s`` counts videos. ``over`` is its ratio to that of ``rows``, ``rows_live`` and ``full_live``,
``over_cpu`` the same by CPU time, for a machine that others load. ``tokens`` are those of the language model with
gradient, ``reference_tokens`` those without, padding included. ``tflops`` is the ``necessary`` FLOP of
``bench.steps.flops`` over time, ``mfu`` that over the measured matmul rate (CUDA). ``split`` is milliseconds by
section; the head's includes the objective, and its backward. ``error`` is against ``rows``: loss and all adapter
gradients (relative, norms).
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

from bench.head import NO_TIME
from bench.measure import Deadline, environment, orders, peak_mib, synchronize, table, write
from bench.steps.flops import work_of
from bench.steps.shapes import SHAPES
from bench.steps.sides import SIDES, Counts, Rig, Sections, Side
from tempo_fast.training.activations import POLICIES

Row = dict[str, Any]
BASELINE = "rows"
RIVALS = (BASELINE, "rows_live", "full_live")
PEERS = {
    "flash_preference": "flash-pref 0.1.1 shares the prefix of pairs on Qwen-VL; it needs transformers below 4.52, and "
    "the models here come from a later one",
    "ms_swift_padding_free": "ms-swift trains in a program of its own: run its DPO with padding_free on the same "
    "records and compare its log",
}
"""Prior art that cannot run in this process, and why."""
COLUMNS = (
    "case", "vision", "impl", "records_per_s", "ms", "ms_min", "ms_max", "ms_cpu", "over.rows", "over.rows_live",
    "over.full_live", "over_cpu.rows", "over_cpu.rows_live", "over_cpu.full_live", "tokens", "reference_tokens",
    "tflop_run", "tflops", "mfu", "peak_mib", "error.loss", "error.grad",
)  # fmt: skip


def measure_case(
    rig: Rig,
    sides: Sequence[Side],
    rejected: int,
    args: argparse.Namespace,
    ceiling: float,
    deadline: Deadline | None = None,
) -> list[Row]:
    """A row per side, in order; after the deadline no side starts, and the repetitions end with their round."""
    rig.load(args.records, rejected)
    shape = [args.records, 1 + rejected, rig.shape.prefix, rig.shape.answer]
    rows: list[Row] = []
    running: list[tuple[Row, Side]] = []
    expected: tuple[float, torch.Tensor] | None = None
    for side in sorted(sides, key=lambda s: s.name != BASELINE):  # errors are against the first
        row: Row = {
            "case": f"1+{rejected}", "impl": side.name, "shape": shape, "dtype": args.dtype,
            "vision": "cached" if rig.cached_vision else "encoded", "checkpointing": rig.policy,
            "attention": rig.attention if side.trees else "causal", "reference": "live" if side.live else "cached",
        }  # fmt: skip
        rows.append(row)
        gradients: list[torch.Tensor] = []
        counts = Counts()
        if deadline is not None and deadline.left() <= 0:
            row["skipped"] = NO_TIME
            continue
        try:
            loss, _ = rig.step(side, Sections(rig.device), gradients)  # fills the reference, compiles
            row["peak_mib"] = peak_mib(partial(rig.step, side, Sections(rig.device), counts=counts), rig.device)
        except torch.OutOfMemoryError as problem:
            row["skipped"] = f"out of memory: {str(problem).splitlines()[0]}"
            rig.engine.sync_adapter()  # no gradient of a broken step stays
            continue
        flat = torch.cat([g.flatten() for g in gradients]).double()
        if side.name == BASELINE:
            expected = loss, flat
        if expected is not None:
            norm = expected[1].norm().clamp(min=1e-300)
            row["error"] = {
                "loss": abs(loss - expected[0]) / abs(expected[0]),
                "grad": ((flat - expected[1]).norm() / norm).item(),
            }
        work = work_of(rig, side)
        row.update(vars(counts), loss=loss, tflop=work.necessary / 1e12, tflop_run=work.run / 1e12)
        running.append((row, side))
        del gradients, flat
        _free(rig.device)
    laps: list[list[tuple[dict[str, float], float, float]]] = [[] for _ in running]
    for order in orders(len(running), args.repetitions):
        for i in order:
            synchronize(rig.device)
            sections = Sections(rig.device)
            rig.step(running[i][1], sections)
            laps[i].append(sections.milliseconds())
        if deadline is not None and deadline.left() <= 0:
            break
    for (row, _), found in zip(running, laps, strict=True):
        _summarise(row, found, args.records, ceiling)
    done = {row["impl"]: row for row, _ in running}
    for row in done.values():
        for key, clock in (("over", "ms"), ("over_cpu", "ms_cpu")):
            row[key] = {name: done[name][clock] / row[clock] for name in RIVALS if name in done}
    order_of = {side.name: i for i, side in enumerate(sides)}
    return sorted(rows, key=lambda row: order_of[row["impl"]])


def _summarise(row: Row, laps: list[tuple[dict[str, float], float, float]], records: int, ceiling: float) -> None:
    wall = [ms for _, ms, _ in laps]
    row |= {
        "repetitions": len(laps), "ms": median(wall), "ms_min": min(wall), "ms_max": max(wall),
        "ms_cpu": median(cpu for _, _, cpu in laps),
        "split": {name: median(parts[name] for parts, _, _ in laps) for name in laps[0][0]},
    }  # fmt: skip
    row["records_per_s"] = 1e3 * records / row["ms"]
    row["tflops"] = 1e3 * row["tflop"] / row["ms"]
    if ceiling:
        row["mfu"] = row["tflops"] / ceiling


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def report(rows: Sequence[Row]) -> str:
    """What was measured, where its time went, and what did not run."""
    done = [row for row in rows if "ms" in row]
    split = [{**row, **{f"{k} ms": v for k, v in row["split"].items()}} for row in done]
    names = [f"{k} ms" for k in done[0]["split"]] if done else []
    lines = [f"skipped {row['impl']}: {row['skipped']}" for row in rows if "skipped" in row]
    return "\n\n".join([table(done, COLUMNS), table(split, ("case", "vision", "impl", *names)), "\n".join(lines)])


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: tiny on a CPU, 7b on CUDA")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--impls", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--rejected", nargs="+", type=int, default=[1, 3], help="answers beside the chosen one")
    parser.add_argument("--records", type=int, default=4, help="videos per step (default 4)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--checkpointing", choices=POLICIES, default="full", help="of every side")
    parser.add_argument("--vision", nargs="+", choices=("cached", "encoded"), default=["cached"])
    parser.add_argument("--attention", default="auto", help="of the trees, as train.attention")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no side after this long; 0 is no limit")
    parser.add_argument("--liger", action="store_true", help="Liger's model kernels under every side (CUDA)")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    args.shape = args.shape or ("7b" if args.device == "cuda" else "tiny")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if SHAPES[args.shape].cuda_only and args.device != "cuda":
        parser.error(f"--shape {args.shape} needs --device cuda")
    if args.liger and args.device != "cuda":
        parser.error("--liger: Liger's model kernels need --device cuda")
    if args.liger and find_spec("liger_kernel") is None:
        parser.error("--liger: liger-kernel is not installed")
    if min(args.rejected) < 1 or args.records < 1 or args.repetitions < 1:
        parser.error("--rejected, --records and --repetitions must be at least 1")
    return args


def matmul_tflops(device: str) -> float:
    """The measured bfloat16 matmul rate; 0 on a CPU, where no share of it is given."""
    if device != "cuda":
        return 0.0
    from bench.gpu import Plan, ceilings

    return ceilings(Plan())["matmul_tflops"]


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(args.device)
    deadline = Deadline(60 * args.minutes) if args.minutes else None
    ceiling = matmul_tflops(args.device)
    rows: list[Row] = [{"case": "all", "impl": name, "skipped": why} for name, why in PEERS.items()]
    sides = [SIDES[name] for name in args.impls]
    more = {"matmul_tflops": ceiling, "liger": args.liger}
    rig = Rig(
        SHAPES[args.shape], args.device, getattr(torch, args.dtype), policy=args.checkpointing, cached_vision=True,
        attention=args.attention, liger=args.liger,
    )  # fmt: skip
    for vision in args.vision:
        rig.cached_vision = vision == "cached"
        for rejected in args.rejected:
            rows += measure_case(rig, sides, rejected, args, ceiling, deadline)
            write(args.json, env, rows, **more)
    print(
        f"{args.shape}: {args.records} records a step, prefix {rig.shape.prefix}, answers of {rig.shape.answer}, "
        f"{args.dtype}, checkpointing {args.checkpointing} on every side, {env['machine']}, {env['threads']} threads"
    )
    print(report(rows))
    return 0
