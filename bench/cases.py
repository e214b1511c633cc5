"""The cases of ``python -m bench head``, their inputs, and the float64 truth that errors are measured against.

Shapes: N response tokens in 8 answers (4 pairs), V vocabulary, D hidden size.

A case is forward and backward of one loss. ``dpo`` needs log-ratios, ``rrpo`` also the exact KL of every token, with a
frozen head; ``live`` evaluates the reference's hidden states under the head, ``cached`` reads what was kept of them.
``sft_trained`` is the mean negative log-prob with a gradient for the head. All inputs (hidden states, head, cached
statistics, padded copies for those that want them) are made before and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tempo_kernels.head import HeadStatistics, head_statistics
from tempo_kernels.objectives import BranchBatch, make_objective
from tempo_kernels.oracle import Truth, oracle

PAIRS = 4
BETA, ALPHA = 0.1, 0.01
KL_LEVELS = (3e-5, 1e-3, 1e-2)
TIMED_KL = 1e-3


@dataclass(frozen=True)
class Case:
    """``floor``: matmuls of 2·N·V·D FLOP that no known method that keeps no [N, V] logits can go below."""

    name: str
    objective: str
    live: bool
    kl: bool
    trained: bool
    floor: int


CASES = {
    case.name: case
    for case in (
        Case("dpo_live", "dpo", live=True, kl=False, trained=False, floor=3),
        Case("dpo_cached", "dpo", live=False, kl=False, trained=False, floor=2),
        Case("rrpo_live", "rrpo", live=True, kl=True, trained=False, floor=4),
        Case("rrpo_cached", "rrpo", live=False, kl=True, trained=False, floor=2),
        Case("sft_trained", "sft", live=False, kl=False, trained=True, floor=3),
    )
}


@dataclass
class Inputs:
    hidden: Tensor
    """[N, D]"""
    weight: Tensor
    """[V, D]"""
    labels: Tensor
    """[N]"""
    ref: Tensor
    """[N, D] the reference's hidden states."""
    batch: BranchBatch
    cached: HeadStatistics
    levels: Tensor | None = None
    """[N] index into KL_LEVELS of each token; None where all are at TIMED_KL."""

    def double(self) -> Inputs:
        """The same numbers in float64, statistics recomputed there."""
        hidden, weight, ref = self.hidden.double(), self.weight.double(), self.ref.double()
        cached = head_statistics(ref, weight, self.labels)
        return replace(self, hidden=hidden, weight=weight, ref=ref, cached=cached)


def make_weight(v: int, d: int, dtype: torch.dtype, device: str) -> Tensor:
    """[V, D] normal, scaled so that unit hidden states give logits of unit size."""
    g = torch.Generator(device).manual_seed(1)
    return torch.randn(v, d, generator=g, device=device).div_(d**0.5).to(dtype)


def make_inputs(n: int, weight: Tensor, *, mixed: bool = False) -> Inputs:
    """Normal states for ``weight`` [V, D], the reference's at a KL of about TIMED_KL, or (``mixed``) of all KL_LEVELS
    in turn. A difference of ε in unit hidden states is a KL of about ε²/2."""
    v, d = weight.shape
    device = weight.device
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=device)
    levels = torch.arange(n, device=device) % len(KL_LEVELS) if mixed else None
    kl = torch.tensor(KL_LEVELS, device=device)[levels][:, None] if levels is not None else TIMED_KL
    ref = hidden + (2 * kl) ** 0.5 * torch.randn(n, d, generator=g, device=device)
    labels = torch.randint(0, v, (n,), generator=g, device=device)
    spans = torch.randint(0, 3, (n,), generator=g, device=device)
    hidden, ref = hidden.to(weight.dtype), ref.to(weight.dtype)
    branch = torch.arange(n, device=device) * 2 * PAIRS // n
    ids = torch.arange(PAIRS, device=device)
    batch = BranchBatch(branch, 2 * PAIRS, 2 * ids, 2 * ids + 1, spans=spans)
    return Inputs(hidden, weight, labels, ref, batch, head_statistics(ref, weight, labels), levels)


def loss_of(case: Case, logp: Tensor, ref_logp: Tensor | None, kl: Tensor | None, batch: BranchBatch) -> Tensor:
    """The case's loss (a scalar) of per-token values [N]."""
    if case.objective == "sft":
        return -logp.mean()
    options = {"alpha": ALPHA} if case.objective == "rrpo" else {}
    return make_objective(case.objective, beta=BETA, **options)(logp, ref_logp, kl, batch).losses.mean()


def truth_of(inputs: Inputs) -> Truth:
    """The oracle on ``inputs``."""
    return oracle(inputs.hidden, inputs.weight, inputs.labels, inputs.ref)
