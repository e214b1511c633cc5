"""``python -m bench head``: what a preference step pays in the loss head, one_pass against eager.

A case is forward and backward of one loss over N response tokens in 4 pairs: dpo needs log-ratios, rrpo also the exact
KL of every token; ``live`` evaluates the reference's hidden states under the head, ``cached`` reads its statistics.
Inputs (hidden states, head, statistics) are made before and not counted.

FLOP a method has to spend, F = 2·N·V·D (one matmul over the head):

              eager                                 one_pass
  dpo_live    3F  logits, ref logits, dX            3F  sums + mean, ref sums
  dpo_cached  2F  logits, dX                        2F  sums + mean
  rrpo_live   3F  logits, ref logits, dX            4F  sums + mean, ref sums + mean
  rrpo_cached 2F  logits, dX                        2F  sums + mean

``tflops`` divides these by the median time, so it compares how well each method uses the machine, not the methods.
``error`` is against float64 on the first tokens: largest absolute error of logp and kl, relative error (norms) of the
gradients of logp and kl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.measure import environment, interleaved, peak_mib, table, write
from tempo_kernels.head import HeadStatistics, head_statistics, linear_logp
from tempo_kernels.objectives import BranchBatch, make_objective
from tempo_kernels.oracle import oracle

PASSES = {
    "dpo_live": {"eager": 3, "one_pass": 3},
    "dpo_cached": {"eager": 2, "one_pass": 2},
    "rrpo_live": {"eager": 3, "one_pass": 4},
    "rrpo_cached": {"eager": 2, "one_pass": 2},
}
IMPLS = ("eager", "one_pass")
PAIRS = 4


def make_inputs(n: int, v: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Random policy and reference states with logits of unit size and a KL of about 1e-3, on ``device``."""
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(n, d, generator=g)
    hidden = ref + 0.045 * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) / d**0.5
    labels = torch.randint(0, v, (n,), generator=g).to(device)
    ref, hidden, weight = (t.to(dtype).to(device) for t in (ref, hidden, weight))
    branch = (torch.arange(n) * 2 * PAIRS // n).to(device)
    ids = torch.arange(PAIRS, device=device)
    spans = torch.randint(0, 3, (n,), generator=g).to(device)
    batch = BranchBatch(branch, 2 * PAIRS, 2 * ids, 2 * ids + 1, spans=spans)
    return {"hidden": hidden, "weight": weight, "labels": labels, "ref": ref, "batch": batch}


def one_call(case: str, impl: str, inputs: dict[str, Any], cached: HeadStatistics) -> Callable[[], Tensor]:
    """Forward and backward of the case; returns the gradient of the hidden states."""
    objective = make_objective(case.split("_")[0], beta=0.1)
    reference = cached if case.endswith("cached") else inputs["ref"]

    def call() -> Tensor:
        hidden = inputs["hidden"].detach().requires_grad_()
        out = linear_logp(
            hidden, inputs["weight"], inputs["labels"], reference=reference, impl=impl, kl=objective.needs_kl
        )
        loss = objective(out.logp, out.ref_logp, out.kl, inputs["batch"]).losses.mean()
        return torch.autograd.grad(loss, hidden)[0]

    return call


def errors(case: str, impl: str, inputs: dict[str, Any], cached: HeadStatistics, truth: Any) -> dict[str, float]:
    """On the tokens the truth covers. Statistics are row-wise, so the first rows of them serve."""
    m = truth.logp.shape[0]
    hidden = inputs["hidden"][:m].detach().requires_grad_()
    reference: Any = inputs["ref"][:m]
    if case.endswith("cached"):
        reference = HeadStatistics(*(t[:m] for t in cached))
    kl = case.startswith("rrpo")
    out = linear_logp(hidden, inputs["weight"], inputs["labels"][:m], reference=reference, impl=impl, kl=kl)
    d_logp = torch.autograd.grad(out.logp.sum(), hidden, retain_graph=True)[0].double()
    found = {
        "logp": (out.logp.double() - truth.logp).abs().max().item(),
        "d_logp": ((d_logp - truth.d_logp).norm() / truth.d_logp.norm()).item(),
    }
    if kl and out.kl is not None:
        d_kl = torch.autograd.grad(out.kl.sum(), hidden)[0].double()
        found["kl"] = (out.kl.double() - truth.kl).abs().max().item()
        found["d_kl"] = ((d_kl - truth.d_kl).norm() / truth.d_kl.norm()).item()
        found["mean_kl"] = truth.kl.mean().item()
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench head", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--n", type=int, default=128, help="response tokens (default 128)")
    parser.add_argument("--v", type=int, default=32000, help="vocabulary (default 32000)")
    parser.add_argument("--d", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--cases", nargs="+", choices=tuple(PASSES), default=list(PASSES))
    parser.add_argument("--error-tokens", type=int, default=16, help="tokens compared with float64 (default 16)")
    args = parser.parse_args(arguments)
    if args.n < 2 * PAIRS or args.v < 2 or args.d < 1 or args.repetitions < 1:
        parser.error(f"--n must be at least {2 * PAIRS}, --v 2, --d 1, --repetitions 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)

    env = environment(args.device)
    inputs = make_inputs(args.n, args.v, args.d, getattr(torch, args.dtype), args.device)
    cached = head_statistics(inputs["ref"], inputs["weight"], inputs["labels"])
    m = min(args.error_tokens, args.n)
    truth = oracle(inputs["hidden"][:m], inputs["weight"], inputs["labels"][:m], inputs["ref"][:m])
    pairs = [(case, impl) for case in args.cases for impl in IMPLS]
    calls = [one_call(case, impl, inputs, cached) for case, impl in pairs]
    times = interleaved(calls, args.repetitions, args.device)
    rows = []
    for (case, impl), call, ms in zip(pairs, calls, times, strict=True):
        median = statistics.median(ms.wall)
        flop = PASSES[case][impl] * 2 * args.n * args.v * args.d
        rows.append(
            {
                "case": case, "impl": impl, "shape": [args.n, args.v, args.d], "dtype": args.dtype,
                "repetitions": args.repetitions, "ms": median, "ms_min": min(ms.wall), "ms_max": max(ms.wall),
                "ms_cpu": statistics.median(ms.cpu),
                "peak_mib": peak_mib(call, args.device), "tflops": flop / median / 1e9,
                "error": errors(case, impl, inputs, cached, truth),
            }
        )
    print(f"N x V x D = {args.n} x {args.v} x {args.d}, {args.dtype}, {env['machine']}, {env['threads']} threads")
    print(table(rows, ("case", "impl", "ms", "ms_min", "ms_max", "ms_cpu", "peak_mib", "tflops", "error")))
    write(args.json, env, rows)
    return 0
