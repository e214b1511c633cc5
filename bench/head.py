"""``python -m bench head``: what a preference step pays in the loss head, ours beside every peer that is installed.

Cases in ``bench.cases``, implementations in ``bench.impls``, where each states its matmuls over the head: F = 2·N·V·D
FLOP. ``tflops`` divides those by the median time, so it compares how well each uses the machine, not the methods; times
compare the methods. A combination that does not exist here is a row with ``skipped`` and the reason.

``error`` is against float64 on --error-tokens tokens: ``logp`` and ``kl`` largest absolute errors (the mean one where
only a sum comes out), ``d_logp``, ``d_kl``, ``d_loss`` and ``d_weight`` relative errors (norms) of the gradients of
their sums and of the case's loss. ``kl`` and ``d_kl`` stand per level of KL.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bench.cases import CASES, KL_LEVELS, PAIRS, Case, Inputs, make_inputs, make_weight, truth_of
from bench.impls import ALL, Impl, select
from bench.impls.base import Refused, Step
from bench.measure import Deadline, Laps, environment, interleaved, limit, peak_mib, synchronize, table, write
from tempo_kernels.oracle import Truth

COLUMNS = (
    "case", "impl", "ms", "ms_min", "ms_max", "ms_cpu", "forward.ms", "backward.ms", "tflops", "peak_mib",
    "error.logp", "error.d_logp", "error.d_loss",
)  # fmt: skip
Row = dict[str, Any]
NO_TIME = "no time left"
AGAIN = "_again"
"""Behind the name of an implementation in the row of its second run."""


@dataclass
class Setting:
    """Where and how long to measure."""

    device: str
    repetitions: int
    deadline: Deadline | None = None
    warm_up_s: float = 600.0
    """Most that one implementation may take to compile and run first."""

    def seconds(self) -> float:
        """That, or what is left of the time."""
        return self.warm_up_s if self.deadline is None else min(self.warm_up_s, self.deadline.left())


class ErrorCheck:
    """A few tokens at every KL level, and float64's word on them."""

    def __init__(self, weight: Tensor, tokens: int) -> None:
        self.inputs = make_inputs(tokens, weight, mixed=True)
        self.truth: Truth = truth_of(self.inputs)
        self._gradients: dict[str, tuple[Tensor, ...]] = {}

    def gradients(self, case: Case) -> tuple[Tensor, ...]:
        """Of the case's loss, in float64."""
        if case.name not in self._gradients:
            step = ALL["eager"].step(case, self.inputs.double())
            self._gradients = {case.name: step()}  # one case's are large enough
        return self._gradients[case.name]

    def of(self, impl: Impl, case: Case) -> dict[str, Any]:
        inputs, truth = self.inputs, self.truth
        step = impl.step(case, inputs)
        gradients, expected = step(), self.gradients(case)
        found: dict[str, Any] = {"d_loss": relative(step.unpack(gradients[0]), expected[0])}
        if case.trained:
            found["d_weight"] = relative(gradients[1], expected[1])
        del gradients, step
        hidden = inputs.hidden.detach().requires_grad_()
        logp = impl.outputs(case, hidden, inputs.weight, inputs)[0]
        if logp is not None:
            per_token = logp.ndim == 1
            off = logp.double() - (truth.logp if per_token else truth.logp.sum())
            found["logp"] = off.abs().max().item() / (1 if per_token else len(truth.logp))
            found["d_logp"] = relative(torch.autograd.grad(logp.sum(), hidden)[0], truth.d_logp)
        kl = impl.outputs(case, hidden, inputs.weight, inputs)[2] if case.kl else None
        if kl is not None:
            assert truth.kl is not None and truth.d_kl is not None and inputs.levels is not None
            d_kl = torch.autograd.grad(kl.sum(), hidden)[0]
            found["kl_levels"] = [
                {
                    "kl_mean": truth.kl[at].mean().item(),
                    "kl": (kl.double() - truth.kl)[at].abs().max().item(),
                    "d_kl": relative(d_kl[at], truth.d_kl[at]),
                }
                for at in (inputs.levels == level for level in range(len(KL_LEVELS)))
            ]
        return found


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def measure_case(
    case: Case,
    impls: Sequence[Impl],
    inputs: Inputs,
    check: ErrorCheck | None,
    setting: Setting,
    again: Sequence[str] = (),
) -> list[Row]:
    """A row per implementation, in order. Those named in ``again`` run twice; the second row shows the noise."""
    device, deadline = setting.device, setting.deadline
    shape = (inputs.hidden.shape[0], *inputs.weight.shape)
    torch._dynamo.reset()  # its limit of recompilations would otherwise turn later cases into eager ones
    rows: list[Row] = []
    running: list[tuple[Row, Impl, Step]] = []
    for impl in impls:
        row = new_row(case, impl, shape, inputs.weight.dtype)
        rows.append(row)
        step, reason = _warm(impl, case, inputs, setting)
        if step is None:
            row["skipped"] = reason
            continue
        running.append((row, impl, step))
        if impl.name in again:
            rows.append({**row, "impl": impl.name + AGAIN})
            running.append((rows[-1], impl, step))
    for entry in list(running):  # what compiles may do so anew once the others have run
        if setting.seconds() <= 0:
            break
        try:
            with limit(setting.warm_up_s):
                entry[2]()
        except Exception as problem:
            entry[0]["skipped"] = _sentence(problem)
            running.remove(entry)
    until = None if deadline is None else lambda: deadline.left() <= 0
    times = interleaved([step for _, _, step in running], setting.repetitions, device, until)
    f = 2.0 * shape[0] * shape[1] * shape[2]
    for (row, impl, step), measured in zip(running, times, strict=True):
        forward, backward = impl.gemms(case)
        row["repetitions"] = len(measured.both.wall)
        row["gemms"] = [forward, backward]
        row.update(_summary(measured.both, (forward + backward) * f))
        row["forward"] = _summary(measured.forward, forward * f)
        row["backward"] = _summary(measured.backward, backward * f)
        row["peak_mib"] = peak_mib(step, device)
    running.clear()
    for row in rows:
        if check is not None and "ms" in row and row["impl"] in ALL:
            row["error"] = _errors(check, ALL[row["impl"]], case, setting)
    _free(device)
    return rows


def new_row(case: Case, impl: Impl, shape: Sequence[int], dtype: torch.dtype) -> Row:
    name = str(dtype).removeprefix("torch.")
    return {"case": case.name, "impl": impl.name, "shape": list(shape), "dtype": name}


def _summary(laps: Laps, flop: float) -> dict[str, float]:
    found = laps.summary()
    return {**found, "tflops": flop / found["ms"] / 1e9}


def _warm(impl: Impl, case: Case, inputs: Inputs, setting: Setting) -> tuple[Step | None, str]:
    """The step after its first calls, or None and why there is none."""
    if setting.seconds() <= 0:
        return None, NO_TIME
    reason = impl.absent(setting.device, inputs.weight.dtype)
    if reason is not None:
        return None, reason
    try:
        with limit(setting.seconds()):
            step = impl.step(case, inputs)
            for _ in range(2):  # the second may compile for what the first left behind
                step()
            synchronize(setting.device)
        return step, ""
    except Exception as problem:  # a peer may fail in any way; the others still run
        _free(setting.device)
        return None, _sentence(problem)


def _errors(check: ErrorCheck, impl: Impl, case: Case, setting: Setting) -> dict[str, Any]:
    if setting.seconds() <= 0:
        return {"failed": NO_TIME}
    try:
        with limit(setting.seconds()):
            return check.of(impl, case)
    except Exception as problem:  # the times stand all the same
        return {"failed": _sentence(problem)}


def _sentence(problem: Exception) -> str:
    if isinstance(problem, Refused):
        return str(problem)
    first = next(iter(str(problem).strip().splitlines()), "")
    if isinstance(problem, ValueError):
        return f"refused: {first}"
    if isinstance(problem, torch.OutOfMemoryError):
        return f"out of memory: {first}"
    if isinstance(problem, TimeoutError):
        return f"compiling and the first calls {first}"
    return f"failed: {type(problem).__name__}: {first}"


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def failed(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that broke, which a refusal is not."""

    def words(row: Row) -> str:
        return str(row.get("skipped") or row.get("error", {}).get("failed", ""))

    return [row for row in rows if words(row).startswith("failed") and ALL[row["impl"].removesuffix(AGAIN)].ours]


def report(rows: Sequence[Row]) -> str:
    """Tables of what was measured: times and memory, then the KL's errors, then what was skipped and why."""
    done = [row for row in rows if "ms" in row]
    parts = [table(done, COLUMNS)]
    levels = [
        {"case": row["case"], "impl": row["impl"], **level}
        for row in done
        for level in row.get("error", {}).get("kl_levels", [])
    ]
    if levels:
        parts.append(table(levels, ("case", "impl", "kl_mean", "kl", "d_kl")))
    parts.append(skips(rows))
    return "\n\n".join(part for part in parts if part)


def skips(rows: Sequence[Row]) -> str:
    """A line per implementation and reason, with the cases where it is not all of them."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        if "skipped" in row:
            reasons.setdefault((row["impl"], row["skipped"]), {})[row["case"]] = None
    everything = {row["case"] for row in rows}
    return "\n".join(
        f"skipped {impl}: {why}" + ("" if set(cases) == everything else f" ({', '.join(cases)})")
        for (impl, why), cases in reasons.items()
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--n", type=int, default=128, help="response tokens (default 128)")
    parser.add_argument("--v", type=int, default=32000, help="vocabulary (default 32000)")
    parser.add_argument("--d", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--impls", nargs="+", help=f"of {', '.join(ALL)}; liger_chunked is all of its settings")
    parser.add_argument("--again", nargs="*", default=[], help="implementations to run twice, for the noise")
    parser.add_argument("--error-tokens", type=int, default=24, help="compared with float64 (default 24; 0 is none)")
    args = parser.parse_args(arguments)
    if args.n < 2 * PAIRS or args.v < 2 or args.d < 1 or args.repetitions < 1:
        parser.error(f"--n must be at least {2 * PAIRS}, --v 2, --d 1, --repetitions 1")
    if args.error_tokens and args.error_tokens < 2 * PAIRS:
        parser.error(f"--error-tokens must be 0 or at least {2 * PAIRS}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    try:
        args.impls = select(args.impls)
        select(args.again)
    except ValueError as problem:
        parser.error(str(problem))
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    env = environment(args.device)
    weight = make_weight(args.v, args.d, getattr(torch, args.dtype), args.device)
    inputs = make_inputs(args.n, weight)
    check = ErrorCheck(weight, args.error_tokens) if args.error_tokens else None
    setting = Setting(args.device, args.repetitions)
    rows: list[Row] = []
    for name in args.cases:
        rows += measure_case(CASES[name], args.impls, inputs, check, setting, args.again)
        write(args.json, env, rows)
    print(f"N x V x D = {args.n} x {args.v} x {args.d}, {args.dtype}, {env['machine']}, {env['threads']} threads")
    print(report(rows))
    return 1 if failed(rows) else 0
