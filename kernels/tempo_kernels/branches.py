"""From tokens to answers to pairs: who belongs to whom, and the per-answer sums every objective is made of.

Shapes: N response tokens, B branches (answers), Q pairs, S marks of chosen tokens.
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
    pair_spans: Tensor | None = None
    """[S, 3] int64 rows (pair, token, k): inside the k-th span of that pair's chosen answer, k >= 1. A chosen answer
    that several pairs share differs from each rejected one elsewhere. None takes the chosen marks from ``spans``."""
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
        if self.pair_spans is not None:
            self._check_pair_spans(self.pair_spans)

    def _check_pair_spans(self, marks: Tensor) -> None:
        if marks.ndim != 2 or marks.shape[1] != 3 or marks.is_floating_point():
            raise ValueError(f"BranchBatch.pair_spans must be [S, 3] integers, got {list(marks.shape)} {marks.dtype}")
        if not marks.numel() or marks.device.type != "cpu":
            return
        for column, (name, low, end) in enumerate(
            (("pair", 0, len(self.chosen)), ("token", 0, len(self.branch)), ("span number", 1, 2**62))
        ):
            if int(marks[:, column].min()) < low or int(marks[:, column].max()) >= end:
                raise ValueError(f"BranchBatch.pair_spans names a {name} that is not there")
        if not torch.equal(self.branch[marks[:, 1]], self.chosen[marks[:, 0]]):
            raise ValueError("BranchBatch.pair_spans marks a token outside its pair's chosen answer")

    @property
    def n_spans(self) -> int:
        """The largest span number, 0 without spans."""
        numbers = [t for t in (self.spans, None if self.pair_spans is None else self.pair_spans[:, 2]) if t is not None]
        return max((int(t.max()) for t in numbers if t.numel()), default=0)

    def span_sums(self, values: Tensor, width: int = 1) -> tuple[Tensor, Tensor]:
        """Sums of ``values`` [N] over the marked tokens of each pair: chosen, rejected, each [Q, width], width >= 1.

        Column k - 1 holds the k-th span, the last column all that follow too: width 1 sums every marked token.
        Differentiable; ``spans`` and ``rejected`` must be there.
        """
        assert self.spans is not None and self.rejected is not None

        def table(rows: int, row: Tensor, k: Tensor, marked: Tensor) -> Tensor:
            cell = row * width + (k - 1).clamp(0, width - 1)
            return marked.new_zeros(rows * width).index_add(0, cell, marked).view(rows, width)

        of_branch = table(self.n_branches, self.branch, self.spans.long(), values * (self.spans > 0))
        if self.pair_spans is None:
            return of_branch[self.chosen], of_branch[self.rejected]
        pair, token, k = self.pair_spans.unbind(1)
        return table(len(self.chosen), pair, k, values[token]), of_branch[self.rejected]

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
