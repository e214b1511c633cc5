"""From tokens to answers to pairs: who belongs to whom, and the per-answer sums every objective is made of.

Shapes: N response tokens, B branches (answers), Q pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class BranchBatch:
    """The batch description an objective reads. Several pairs may name the same chosen branch. Raises ValueError."""

    branch: Tensor
    """[N] int64, the branch of each token, 0..n_branches-1, in any order."""
    n_branches: int
    """B."""
    chosen: Tensor
    """[Q] int64, branch of each pair's chosen answer."""
    rejected: Tensor | None
    """[Q] int64, branch of each pair's rejected answer; None for ``sft``."""
    spans: Tensor | None = None
    """[N] int64, 0 outside, k inside the k-th marked span of its branch. For rrpo, dpa, ddpo."""
    weights: Tensor | None = None
    """[N] token weights of ddpo; None derives them from ``spans``."""
    pair_weight: Tensor | None = None
    """[Q] factor of each pair's loss; None is 1."""

    def __post_init__(self) -> None:
        n, q = self.branch.shape, self.chosen.shape
        for name, value, shape in (
            ("branch", self.branch, n), ("chosen", self.chosen, q), ("rejected", self.rejected, q),
            ("spans", self.spans, n), ("weights", self.weights, n), ("pair_weight", self.pair_weight, q),
        ):
            if value is None:
                continue
            if value.ndim != 1 or value.shape != shape:
                raise ValueError(f"BranchBatch.{name} must be {list(shape)}, got {list(value.shape)}")
            ids = name in ("branch", "chosen", "rejected")
            if ids and value.is_floating_point():
                raise ValueError(f"BranchBatch.{name} must hold integers, got {value.dtype}")
            if ids and value.numel() and value.device.type == "cpu":
                if int(value.min()) < 0 or int(value.max()) >= self.n_branches:
                    raise ValueError(f"BranchBatch.{name} must lie in 0..{self.n_branches - 1}")

    def sum(self, values: Tensor) -> Tensor:
        """Per-branch sum: [N] -> [B], differentiable."""
        return values.new_zeros(self.n_branches).index_add(0, self.branch, values)

    def lengths(self, dtype: torch.dtype) -> Tensor:
        """[B] tokens per branch, at least 1, so that an empty branch averages to 0."""
        return torch.bincount(self.branch, minlength=self.n_branches).clamp(min=1).to(dtype)


@dataclass
class ObjectiveOutput:
    """One entry per pair (per record for ``sft``); a step divides ``losses.sum()`` by the global number of pairs."""

    losses: Tensor
    """[Q], differentiable, already times pair_weight."""
    chosen_rewards: Tensor
    """[Q], no gradient."""
    rejected_rewards: Tensor
    """[Q], no gradient."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """name -> [Q], no gradient, to be averaged over pairs."""


class Sums:
    """Per-branch sums of one batch: L log-prob, R reference log-prob, D = L - R, K = KL, each [B]; n lengths [B]."""

    def __init__(self, logp: Tensor, ref_logp: Tensor | None, kl: Tensor | None, batch: BranchBatch) -> None:
        self.batch = batch
        self.L = batch.sum(logp)
        self.ratio = None if ref_logp is None else logp - ref_logp.detach()
        self._D = None if self.ratio is None else batch.sum(self.ratio)
        self._K = None if kl is None else batch.sum(kl)
        self.n = batch.lengths(logp.dtype)

    @property
    def D(self) -> Tensor:
        assert self._D is not None
        return self._D

    @property
    def K(self) -> Tensor:
        assert self._K is not None
        return self._K

    @property
    def has_kl(self) -> bool:
        return self._K is not None

    @property
    def mean_logp(self) -> Tensor:
        """[B] a = L / n."""
        return self.L / self.n
