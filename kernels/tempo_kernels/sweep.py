"""One walk over the vocabulary in slices, in plain torch with preallocated buffers.

Shapes: N tokens, D hidden size, V vocabulary, C columns of a slice, B rows of a block.

FLOP: 2·N·V·D for the sums, twice that with the mean. Bytes beside the inputs and outputs: one slab [B, C] of logits,
and for heads in 16 bit one slice [C, D] in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLICE = 512
"""Most columns of a slice: a slab of 2048 rows is 16 MiB in float32."""
ROWS = 2048
"""Most rows walked together; the head is read once per block of rows."""
LARGEST = 1e26
"""A row of a slice may sum to e^60 before its offset moves: float32 ends at e^88, and later sums need room too."""


class Swept(NamedTuple):
    lse: Tensor
    """[N] logsumexp(W x)."""
    target: Tensor
    """[N] logit of the label, from the same matmul as the sums, so that it never exceeds lse; 0 for labels outside."""
    mean: Tensor | None
    """[N, D] softmax(W x)ᵀ W."""


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ_d a[n, d] b[n, d] in the dtype of ``a``: [N, D], [N, D] -> [N]. One spelling, so that equal rows cancel."""
    return (a * b.to(a.dtype)).sum(-1)


def of_known_labels(target: Tensor, labels: Tensor, vocabulary: int) -> Tensor:
    """target [N], NaN where the label lies outside 0..V-1: to raise, the host would have to wait for the GPU."""
    return target.masked_fill((labels < 0) | (labels >= vocabulary), torch.nan)


class LabelSpots:
    """Which rows' labels [B] lie in which slice of the vocabulary, found once; labels may lie outside 0..V-1."""

    def __init__(self, labels: Tensor, vocabulary: int, width: int) -> None:
        borders = torch.arange(0, vocabulary + width, width, device=labels.device).clamp_(max=vocabulary)
        self._labels, self._rows = labels.long().sort()
        self._ends: list[int] = torch.searchsorted(self._labels, borders).tolist()
        self._width = width

    def inside(self, first: int) -> tuple[Tensor, Tensor]:
        """Rows [M] whose label lies in the slice that begins at ``first``, and their columns [M] in it."""
        i = first // self._width
        found = slice(self._ends[i], self._ends[i + 1])
        return self._rows[found], self._labels[found] - first

    def pick(self, z: Tensor, first: int, target: Tensor) -> None:
        """target [B] = the label's logit, for the labels inside the slice z [B, C] that begins at ``first``."""
        rows, columns = self.inside(first)
        if rows.numel():
            target[rows] = z[rows, columns]


@torch.no_grad()
def sweep_head(hidden: Tensor, weight: Tensor, labels: Tensor, *, want_mean: bool) -> Swept:
    """logsumexp, label logit and (``want_mean``) mean head row of every token; float32, float64 from float64 inputs.

    hidden [N, D], weight [V, D], labels [N], which may lie outside 0..V-1 (in another rank's rows). Every sum runs over
    slices in one order, so results are deterministic.
    """
    dtype = sum_dtype(hidden, weight)
    n, d = hidden.shape
    lse, target = hidden.new_empty(n, dtype=dtype), hidden.new_empty(n, dtype=dtype)
    mean = hidden.new_empty(n, d, dtype=dtype) if want_mean else None
    if n == 0:
        return Swept(lse, target, mean)
    width = min(SLICE, weight.shape[0])
    slab = hidden.new_empty(min(ROWS, n) * width, dtype=dtype)
    cast = None if weight.dtype == dtype else hidden.new_empty(width, d, dtype=dtype)
    for start in range(0, n, ROWS):
        rows = slice(start, min(start + ROWS, n))
        block_mean = None if mean is None else mean[rows]
        _sweep_block(hidden[rows].to(dtype), weight, labels[rows], lse[rows], target[rows], block_mean, slab, cast)
    return Swept(lse, target, mean)


def sweep_pair(
    hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor, *, want_mean: bool, want_ref_mean: bool
) -> tuple[Swept, Swept]:
    """:func:`sweep_head` of policy and reference [N, D]: the same walk twice, so that equal rows give equal bits."""
    policy = sweep_head(hidden, weight, labels, want_mean=want_mean)
    return policy, sweep_head(reference, weight, labels, want_mean=want_ref_mean)


def _sweep_block(
    x: Tensor, weight: Tensor, labels: Tensor, lse: Tensor, target: Tensor, mean: Tensor | None, slab: Tensor,
    cast: Tensor | None,
) -> None:
    """Fill lse [B], target [B] and mean [B, D] for the rows x [B, D]."""
    rows, vocabulary, width = x.shape[0], weight.shape[0], min(SLICE, weight.shape[0])
    spots = LabelSpots(labels, vocabulary, width)
    target.zero_()
    offset = total = None
    for first in range(0, vocabulary, width):
        head = weight[first : first + width]
        if cast is not None:
            head = cast[: head.shape[0]].copy_(head)
        z = slab[: rows * head.shape[0]].view(rows, head.shape[0])
        torch.mm(x, head.T, out=z)
        spots.pick(z, first, target)
        if offset is None or total is None:
            # A fixed offset is exact while no logit rises far above it: a float keeps its relative precision.
            offset = z.amax(1)
            total = torch.zeros_like(offset, dtype=torch.float64)  # hundreds of slices' sums, of which float32 shows
            if mean is not None:
                mean.zero_()
        sums = z.sub_(offset[:, None]).exp_().sum(1)
        if bool((sums > LARGEST).any()):  # infinities too; NaN passes and reaches the result
            torch.mm(x, head.T, out=z)
            higher = torch.maximum(offset, z.amax(1))
            shrink = torch.exp(offset - higher)
            total.mul_(shrink)
            if mean is not None:
                mean.mul_(shrink[:, None])
            offset = higher
            sums = z.sub_(offset[:, None]).exp_().sum(1)
        total.add_(sums)
        if mean is not None:
            mean.addmm_(z, head)
    assert offset is not None and total is not None
    lse.copy_(offset + torch.log(total))
    if mean is not None:
        mean.div_(total[:, None].to(mean.dtype))
