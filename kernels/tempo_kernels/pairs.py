"""Two walks over the vocabulary for what one walk cannot do: a head that trains, a bias, a softcap, and the gradient of
the KL from the difference p − q. Plain torch.

Shapes: N tokens, D hidden size, V vocabulary, C columns of a slice, B rows of a block. Logits are
z = softcap(hidden · Wᵀ + bias); p is the policy's softmax, q that of the reference's hidden states under the same head.

FLOP: 2·N·V·D forward, 4·N·V·D backward, 2·N·V·D more for the head's gradient; with a reference the logits count twice.
Bytes beside the inputs and outputs: at most three slabs [B, C], float32 copies of 16-bit hidden states [N, D], and one
slice [C, D] of the head and one of its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tempo_kernels import sweep
from tempo_kernels.sweep import LabelSpots, sum_dtype


class PairStats(NamedTuple):
    """[N] each; the last three are None without a reference, ``cross`` without the KL."""

    lse: Tensor
    target: Tensor
    """logit of the label; 0 for labels outside 0..V-1."""
    ref_lse: Tensor | None
    ref_target: Tensor | None
    cross: Tensor | None
    """Σ_v q_v (z_q,v − z_p,v), so that KL = cross + lse − ref_lse."""


class _Head:
    """A head read slice by slice, and the logits of a block of rows under the current slice."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.softcap = weight, bias, softcap
        self.width = min(sweep.SLICE, weight.shape[0])
        self._cast = None if weight.dtype == dtype else weight.new_empty(self.width, weight.shape[1], dtype=dtype)
        self.first, self.rows = 0, weight[:0]

    def slices(self) -> Iterator[int]:
        """First columns of the slices; ``rows`` [C, D] is the slice."""
        for first in range(0, self.weight.shape[0], self.width):
            rows = self.weight[first : first + self.width]
            self.first, self.rows = first, rows if self._cast is None else self._cast[: rows.shape[0]].copy_(rows)
            yield first

    def logits(self, x: Tensor, slab: Tensor) -> Tensor:
        """z [B, C] of x [B, D], written into the memory of ``slab``."""
        columns = self.rows.shape[0]
        z = slab[: x.shape[0] * columns].view(x.shape[0], columns)
        torch.mm(x, self.rows.T, out=z)
        if self.bias is not None:
            z.add_(self.bias[self.first : self.first + columns])
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z


class _Sums:
    """Running Σ exp(z − offset) [N] with the offset the largest logit so far, and a sum weighted by the same."""

    def __init__(self, like: Tensor, weighted: bool) -> None:
        n = like.shape[0]
        self.offset, self.total = like.new_full((n,), -torch.inf), like.new_zeros(n, dtype=torch.float64)
        self.target = like.new_zeros(n)
        self.weighted = torch.zeros_like(self.total) if weighted else None

    def add(self, rows: slice, z: Tensor, first: int, spots: LabelSpots, values: Tensor | None = None) -> None:
        """Add a slice's z [B, C], and with ``values`` [B, C] their sum weighted by exp(z); both are overwritten."""
        spots.pick(z, first, self.target[rows])
        higher = torch.maximum(self.offset[rows], z.amax(1))
        shrink = torch.exp(self.offset[rows] - higher)
        self.offset[rows] = higher
        e = z.sub_(higher[:, None]).exp_()
        self.total[rows] = self.total[rows] * shrink + e.sum(1)
        if values is not None and self.weighted is not None:
            self.weighted[rows] = self.weighted[rows] * shrink + values.mul_(e).sum(1)

    def lse(self) -> Tensor:
        return (self.offset + torch.log(self.total)).to(self.offset.dtype)


def _blocks(labels: Tensor, head: _Head) -> list[tuple[slice, LabelSpots]]:
    """Rows that are walked together, and where their labels [N] lie."""
    n, vocabulary = labels.shape[0], head.weight.shape[0]
    blocks = [slice(start, min(start + sweep.ROWS, n)) for start in range(0, n, sweep.ROWS)]
    return [(rows, LabelSpots(labels[rows], vocabulary, head.width)) for rows in blocks]


def _slabs(count: int, head: _Head, n: int, like: Tensor) -> list[Tensor]:
    return [like.new_empty(min(sweep.ROWS, n) * head.width) for _ in range(count)]


@torch.no_grad()
def pair_forward(
    hidden: Tensor,
    reference: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    want_kl: bool,
) -> PairStats:
    """Sums over the vocabulary of the policy and of a reference under the same head, float32 (float64 from float64).

    hidden and reference [N, D], weight [V, D], labels [N] (may lie outside 0..V-1, in another rank's rows), bias [V].
    Equal hidden and reference give equal bits, and a cross of exactly 0. Deterministic.
    """
    dtype = sum_dtype(hidden, weight)
    x, ref = hidden.to(dtype), None if reference is None else reference.to(dtype)
    want_kl = want_kl and ref is not None
    policy, other = _Sums(x, False), None if ref is None else _Sums(x, want_kl)
    if x.shape[0]:
        head = _Head(weight, bias, softcap, dtype)
        slabs = _slabs(3 if want_kl else 1, head, x.shape[0], x)
        blocks = _blocks(labels, head)
        for first in head.slices():
            for rows, spots in blocks:
                z = head.logits(x[rows], slabs[0])
                if ref is not None and other is not None and want_kl:
                    ref_z = head.logits(ref[rows], slabs[1])
                    difference = torch.sub(ref_z, z, out=slabs[2][: z.numel()].view(z.shape))
                    other.add(rows, ref_z, first, spots, difference)
                policy.add(rows, z, first, spots)
                if ref is not None and other is not None and not want_kl:
                    other.add(rows, head.logits(ref[rows], slabs[0]), first, spots)
    if other is None:
        return PairStats(policy.lse(), policy.target, None, None, None)
    cross = None if other.weighted is None else (other.weighted / other.total).to(dtype)
    return PairStats(policy.lse(), policy.target, other.lse(), other.target, cross)


@torch.no_grad()
def pair_backward(
    hidden: Tensor,
    reference: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    lse: Tensor,
    ref_lse: Tensor | None,
    d_logp: Tensor,
    d_kl: Tensor | None,
    *,
    want_hidden: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ_n d_logp_n logp_n + d_kl_n kl_n, the logits computed again slice by slice.

    Inputs as in :func:`pair_forward`; lse and ref_lse [N] over the whole vocabulary, d_logp and d_kl [N]. The gradient
    in the logits is d_logp·(1[v = y] − p) + d_kl·(p − q). Without a reference d_kl·p stands for the last term: what the
    gradient of logsumexp adds to the KL of a cached reference.

    Returns d_hidden [N, D] as summed (float32 or float64), d_weight [V, D] in the head's dtype, every slice of it
    written once, and d_bias [V] in its dtype; None for what is not wanted. Equal hidden and reference give d_kl no
    weight at all, exactly. Deterministic.
    """
    dtype = sum_dtype(hidden, weight)
    x = hidden.to(dtype)
    ref = None if reference is None or d_kl is None else reference.to(dtype)
    d_hidden = x.new_zeros(x.shape) if want_hidden else None
    d_weight = torch.empty_like(weight) if want_weight else None
    d_bias = torch.zeros_like(bias) if want_bias and bias is not None else None
    if x.shape[0] == 0:
        return d_hidden, None if d_weight is None else d_weight.zero_(), d_bias
    head = _Head(weight, bias, softcap, dtype)
    slabs = _slabs(1 + (ref is not None) + (softcap is not None), head, x.shape[0], x)
    slice_sum = x.new_empty(head.width, x.shape[1]) if want_weight else None
    bias_sum = x.new_zeros(weight.shape[0]) if d_bias is not None else None
    d_p = -d_logp if d_kl is None or ref is not None else d_kl - d_logp
    blocks = _blocks(labels, head)
    for first in head.slices():
        columns = head.rows.shape[0]
        for rows, spots in blocks:
            p = head.logits(x[rows], slabs[0])
            slope = None
            if softcap is not None:  # d softcap(z) / dz = 1 − (softcap(z) / softcap)²
                slope = torch.div(p, softcap, out=slabs[-1][: p.numel()].view(p.shape)).square_().neg_().add_(1)
            p.sub_(lse[rows, None]).exp_()
            if ref is not None and ref_lse is not None and d_kl is not None:
                q = head.logits(ref[rows], slabs[1]).sub_(ref_lse[rows, None]).exp_()
                change = torch.sub(p, q, out=q).mul_(d_kl[rows, None])
                g = p.mul_(d_p[rows, None]).add_(change)
            else:
                g = p.mul_(d_p[rows, None])
            labelled, columns_of = spots.inside(first)
            if labelled.numel():
                g[labelled, columns_of] += d_logp[rows][labelled]
            if slope is not None:
                g.mul_(slope)
            if d_hidden is not None:
                d_hidden[rows].addmm_(g, head.rows)
            if slice_sum is not None:
                slice_sum[:columns].addmm_(g.T, x[rows], beta=1.0 if rows.start else 0.0)
            if bias_sum is not None:
                bias_sum[first : first + columns] += g.sum(0)
        if d_weight is not None and slice_sum is not None:
            d_weight[first : first + columns] = slice_sum[:columns]
    if d_bias is not None and bias_sum is not None:
        d_bias.copy_(bias_sum)
    return d_hidden, d_weight, d_bias
