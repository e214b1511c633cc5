"""One rank of a vocabulary-parallel head; run by ``torchrun`` from test_vocab_parallel.py, which also calls ``run``."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_kernels import sweep
from tempo_kernels.head import head_statistics, linear_logp

N, V, D = 37, 334, 24
SPLITS = {"even": None, "odd": 131}
"""First row of rank 1; None leaves it to the default."""
CASES = {
    "one_pass": {"impl": "one_pass"},
    "one_pass_live": {"impl": "one_pass", "reference": "live"},
    "one_pass_cached": {"impl": "one_pass", "reference": "cached"},
    "recompute_trained": {"impl": "recompute", "reference": "live", "trains": True},
    "recompute_bias_cap": {"impl": "recompute", "reference": "live", "trains": True, "bias": True, "softcap": 4.0},
    "recompute_bias_cached": {"impl": "recompute", "reference": "cached", "bias": True},
    "exact_kl": {"impl": "auto", "reference": "live", "exact_kl": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make(dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(N, D, generator=g)
    weight = 4 * torch.randn(V, D, generator=g) / math.sqrt(D)
    weight[200] *= 6  # one word towers over the rest, on rank 1
    out = {"ref": ref, "hidden": ref + 0.1 * torch.randn(N, D, generator=g), "weight": weight}
    out["bias"] = torch.randn(V, generator=g)
    out = {k: v.to(dtype) for k, v in out.items()}
    out["labels"] = torch.randint(0, V, (N,), generator=g)
    out["labels"][:6] = torch.tensor([0, V - 1, 130, 131, 166, 167])  # each side of both borders
    return out | {"d_logp": torch.randn(N, generator=g), "d_kl": torch.randn(N, generator=g)}


def run(case: str, dtype: str, rows: slice, shard: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients with these rows of the head; ``shard`` holds group and vocab_start, or nothing."""
    options = dict(CASES[case])
    x = make(DTYPES[dtype])
    trains, kind = options.pop("trains", False), options.pop("reference", None)
    hidden = x["hidden"].requires_grad_()
    weight = x["weight"][rows].clone().requires_grad_(trains)
    bias = x["bias"][rows].clone().requires_grad_(trains) if options.pop("bias", False) else None
    reference: Any = None
    if kind == "cached":
        reference = head_statistics(x["ref"], weight, x["labels"], bias=bias, **shard)
    elif kind == "live":
        reference = x["ref"]
    out = linear_logp(hidden, weight, x["labels"], bias=bias, reference=reference, **options, **shard)
    loss = (x["d_logp"] * out.logp).sum()
    if out.kl is not None:
        loss = loss + (x["d_kl"] * out.kl).sum()
    loss.backward()
    found = {k: v for k, v in out._asdict().items() if v is not None} | {"d_hidden": hidden.grad}
    found |= {"d_weight": weight.grad} if trains else {}
    found |= {"d_bias": bias.grad} if trains and bias is not None else {}
    equal = linear_logp(
        hidden, weight, x["labels"], bias=bias, reference=hidden.detach().clone(), **options, **shard
    )  # fmt: skip
    zeros = [equal.kl, torch.autograd.grad(equal.kl.sum(), hidden)[0]]
    return {k: v.detach() for k, v in found.items()} | {"zeros": torch.cat([z.float().flatten() for z in zeros])}


def main(out: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    group = dist.new_group([0, 1])
    results: dict[str, Any] = {}
    for split, start in SPLITS.items():
        border = V // 2 if start is None else start
        rows = slice(0, border) if rank == 0 else slice(border, V)
        shard = {"group": group} if start is None else {"group": group, "vocab_start": rows.start}
        for case in CASES:
            for dtype in DTYPES:
                results[f"{split}-{case}-{dtype}"] = run(case, dtype, rows, shard)
    x = make(torch.float32)
    for impl in ("one_pass", "recompute"):  # rows 160..167 lie on no rank
        try:
            linear_logp(x["hidden"], x["weight"][:160], x["labels"], impl=impl, group=group, vocab_start=167 * rank)
            results[f"gap-{impl}"] = "no error"
        except ValueError as e:
            results[f"gap-{impl}"] = str(e)
    torch.save(results, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sweep.SLICE, sweep.ROWS = 64, 16
    main(sys.argv[1])
