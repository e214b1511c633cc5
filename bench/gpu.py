"""``python -m bench gpu``: everything to run in the minutes that a GPU is at hand.

Part ``kernels``: the tests that need CUDA, what the machine reaches at best, then ``bench.head`` at the shapes below
with every peer that is installed. Most wanted first; what the time does not reach is in the JSON as skipped, and said.
The JSON is complete after every case, so an interrupted run keeps what it had.

A floor is the larger of FLOP over the measured matmul rate and bytes over the measured copy rate, where a case costs at
least ``Case.floor`` matmuls of 2·N·V·D, reads the head and the hidden states once and writes its gradients.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case, make_inputs, make_weight
from bench.head import NO_TIME, ErrorCheck, Row, Setting, failed, measure_case, new_row, skips
from bench.impls import Impl, select
from bench.measure import Deadline, Laps, Marks, environment, synchronize, table, write

ROOT = Path(__file__).parents[1]
VOCABULARY = 152064
SHAPES = ((4096, 3584), (512, 3584), (16384, 3584), (4096, 896))
"""(N, D), the most wanted first."""
CASE_ORDER = ("rrpo_cached", "rrpo_live", "dpo_live", "dpo_cached", "sft_trained")
IMPL_ORDER = (
    "one_pass", "recompute", "plain", "liger_sm90", "quack", "liger_chunked", "trl_chunked", "cce", "cce_unfiltered",
    "cce_exact", "torch_lce_1024", "compile", "liger_flce_16", "liger_flce", "torch_lce", "eager",
)  # fmt: skip
AGAIN = ("one_pass",)
WARM_UP_S = 60.0
TEST_SHARE = 0.35
"""Of the time, at most for the tests."""
COLUMNS = (
    "shape", "case", "impl", "ms", "ms_min", "ms_max", "forward.ms", "tflops", "over_floor", "peak_mib", "error.d_loss",
)  # fmt: skip


@dataclass
class Plan:
    """What to measure; the CPU's tests use a small one."""

    device: str = "cuda"
    vocabulary: int = VOCABULARY
    shapes: Sequence[tuple[int, int]] = SHAPES
    cases: Sequence[str] = CASE_ORDER
    impls: Sequence[str] = IMPL_ORDER
    dtype: torch.dtype = torch.bfloat16
    repetitions: int = 10
    error_tokens: int = 24
    matmul: int = 8192
    copy_mib: int = 2048


def ceilings(plan: Plan) -> dict[str, float]:
    """Best of ten: TFLOP/s of a square matmul of normal numbers in the plan's dtype, TB/s a copy reads and writes."""

    def best_ms(call: Any) -> float:
        call()
        laps = Laps()
        for _ in range(10):
            marks = Marks(plan.device)
            synchronize(plan.device)
            marks.mark()
            call()
            marks.mark()
            marks.lap(laps, 0, 1)
        return min(laps.wall)

    size = plan.matmul
    a, b = (torch.randn(size, size, device=plan.device).to(plan.dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul_ms = best_ms(lambda: torch.mm(a, b, out=out))
    source = torch.empty(plan.copy_mib * 2**20, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    copy_ms = best_ms(lambda: target.copy_(source))
    return {"matmul_tflops": 2 * size**3 / matmul_ms / 1e9, "copy_tb_s": 2 * source.numel() / copy_ms / 1e9}


def floor(case: Case, shape: tuple[int, int, int], width: int, ceiling: dict[str, float]) -> dict[str, float]:
    """FLOP, bytes (``width`` per number) and the milliseconds below which nothing can go."""
    n, v, d = shape
    flop = case.floor * 2.0 * n * v * d
    head, states = v * d * width, n * d * width
    moved = head * (2 if case.trained else 1) + states * (2 + case.live)
    ms = max(flop / ceiling["matmul_tflops"] / 1e9, moved / ceiling["copy_tb_s"] / 1e9)
    return {"tflop": flop / 1e12, "gb": moved / 1e9, "floor_ms": ms}


def run_tests(out: Path, seconds: float) -> dict[str, Any]:
    """The CUDA half of the kernels' tests, in a process of its own; its words go to tests.txt."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with open(out / "tests.txt", "w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=seconds,
                env={**os.environ, "PYTHONPATH": paths},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"ok": False, "last": f"stopped after {seconds:.0f} s"}
    lines = (out / "tests.txt").read_text().strip().splitlines()
    return {"ok": code == 0, "code": code, "last": lines[-1] if lines else ""}


def measure(plan: Plan, out: Path, env: dict[str, Any], tests: dict[str, Any], deadline: Deadline) -> list[Row]:
    """Ceilings, then shape by shape and case by case; rewrites kernels.json after each."""
    ceiling = ceilings(plan)
    print(f"at best: {ceiling['matmul_tflops']:.4g} TFLOP/s matmul, {ceiling['copy_tb_s']:.3g} TB/s copy", flush=True)
    impls: list[Impl] = select(plan.impls)
    rows: list[Row] = []
    weight: torch.Tensor | None = None
    for n, d in plan.shapes:
        inputs = check = None
        if deadline.left() > 0:
            if weight is None or weight.shape[1] != d:
                weight = make_weight(plan.vocabulary, d, plan.dtype, plan.device)
                check = ErrorCheck(weight, plan.error_tokens)  # errors once per head
            inputs = make_inputs(n, weight)
        for name in plan.cases:
            case, shape = CASES[name], (n, plan.vocabulary, d)
            least = floor(case, shape, plan.dtype.itemsize, ceiling)
            print(f"{name} {n}x{plan.vocabulary}x{d}: ", end="")
            print(f"{least['tflop']:.4g} TFLOP, {least['gb']:.3g} GB, floor {least['floor_ms']:.4g} ms", flush=True)
            if inputs is None:
                found = [new_row(case, impl, shape, plan.dtype) | {"skipped": NO_TIME} for impl in impls]
            else:
                setting = Setting(plan.device, plan.repetitions, deadline, WARM_UP_S)
                found = measure_case(case, impls, inputs, check, setting, AGAIN)
            for row in found:
                row.update(least)
                if "ms" in row:
                    row["over_floor"] = row["ms"] / least["floor_ms"]
            rows += found
            write(out / "kernels.json", env, rows, ceilings=ceiling, tests=tests)
    return rows


def kernels(plan: Plan, out: Path, seconds: float, with_tests: bool = True) -> int:
    """The part: 0, or 1 where a test failed or a path of ours broke."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(seconds)
    env = environment(plan.device)
    tests = run_tests(out, TEST_SHARE * seconds) if with_tests else {"ok": True, "last": "not asked for"}
    print(f"tests: {tests['last']}", flush=True)
    rows = measure(plan, out, env, tests, deadline)
    done = [row for row in rows if "ms" in row]
    late = [row for row in rows if row.get("skipped") == NO_TIME]
    broken = failed(rows)
    print("\n" + table(done, COLUMNS))
    print(skips([row for row in rows if row not in late]))
    for row in broken:
        print(f"broken: {row['impl']} on {row['case']}: {row.get('skipped') or row['error']['failed']}")
    if late:
        where = dict.fromkeys(f"{row['case']} {'x'.join(map(str, row['shape']))}" for row in late)
        print(f"{len(late)} rows were dropped for time, in: {', '.join(where)}")
    print(f"all rows: {out / 'kernels.json'}")
    return 0 if tests["ok"] and not broken else 1


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=("kernels",), default="kernels")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for kernels.json and tests.txt")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole part (default 9)")
    parser.add_argument("--impls", nargs="+", default=IMPL_ORDER, help="as in python -m bench head")
    parser.add_argument("--no-tests", action="store_true", help="benches only")
    args = parser.parse_args(arguments)
    try:
        select(args.impls)
    except ValueError as problem:
        parser.error(str(problem))
    if not torch.cuda.is_available():
        print("bench gpu: this torch sees no CUDA device", file=sys.stderr)
        return 2
    # a case's last rows, errors and the table come after its deadline
    return kernels(Plan(impls=args.impls), args.out, 60 * args.minutes - 30, not args.no_tests)
