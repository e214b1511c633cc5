"""The frozen head: values and gradients from one walk over the vocabulary, as custom operators.

Shapes: N tokens, D hidden size, V vocabulary (a rank's rows of it in a vocabulary-parallel head). The formulas stand in
head.py. Saved for the backward are g = W[y] − m and k = m − m_ref, [N, D] each, and no head.

The operators are opaque to torch.compile. Tensors they have no use for are empty; ``group`` is a process group's name
and "" for none; ``start`` is the first row of this rank's part of the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.backend import backend
from tempo_kernels.statistics import HeadOutput, HeadStatistics
from tempo_kernels.sweep import row_dot, sum_dtype


def _sweep(
    hidden: Tensor, weight: Tensor, labels: Tensor, want_mean: bool, group: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """lse [N], label logit [N] and mean head row [N, D] over all ranks; ``labels`` count from this rank's first row."""
    with torch.autocast(hidden.device.type, enabled=False):
        lse, target, mean = backend(hidden, weight).sweep_head(hidden, weight, labels, want_mean=want_mean)
    if not group:
        return lse, target, mean
    from tempo_kernels.shards import add, join_lse, join_target

    whole = join_lse(lse, group)
    if mean is not None:
        mean = add(mean.mul_(torch.exp(lse - whole)[:, None]), group)
    return whole, join_target(target, labels, weight.shape[0], group), mean


@torch.library.custom_op("tempo_kernels::head_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, want_mean: bool, group: str, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp [N], lse [N], mean_logit [N] and mean_embedding [N, D]; the last two are empty without ``want_mean``."""
    lse, target, mean = _sweep(hidden, weight, labels - start if start else labels, want_mean, group)
    if mean is None:
        return target - lse, lse, lse.new_empty(0), lse.new_empty(0)
    return target - lse, lse, row_dot(mean, hidden), mean


@_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, want_mean: bool, group: str, start: int) -> tuple[Tensor, ...]:
    n, dtype = hidden.shape[0], sum_dtype(hidden, weight)
    rows = hidden.new_empty(n, dtype=dtype)
    if not want_mean:
        return rows, torch.empty_like(rows), rows.new_empty(0), rows.new_empty(0)
    return rows, torch.empty_like(rows), torch.empty_like(rows), hidden.new_empty(hidden.shape, dtype=dtype)


@torch.library.custom_op("tempo_kernels::one_pass", mutates_args=())
def _one_pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    differentiate: bool,
    group: str,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp [N], lse [N], kl [N] with a reference's statistics; g and k [N, D] when hidden needs its gradient."""
    labels = labels - start if start else labels
    lse, target, mean = _sweep(hidden, weight, labels, differentiate, group)
    kl, g, k = lse.new_empty(0), lse.new_empty(0), lse.new_empty(0)
    if mean_embedding is not None and mean_logit is not None and ref_lse is not None:
        kl = (mean_logit - row_dot(mean_embedding, hidden)) + (lse - ref_lse)
    if mean is not None:
        if mean_embedding is not None:
            k = mean - mean_embedding
        g = torch.sub(_label_rows(weight, labels, group).to(mean.dtype), mean, out=mean)
    return target - lse, lse, kl, g, k


def _label_rows(weight: Tensor, labels: Tensor, group: str) -> Tensor:
    """W[y] [N, D], from the rank that holds it."""
    if not group:
        return weight[labels]
    from tempo_kernels.shards import add

    inside = (labels >= 0) & (labels < weight.shape[0])
    rows = weight[labels.clamp(0, weight.shape[0] - 1)].to(sum_dtype(weight))
    return add(rows.masked_fill_(~inside[:, None], 0), group)


@_one_pass.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    differentiate: bool,
    group: str,
    start: int,
) -> tuple[Tensor, ...]:
    dtype = sum_dtype(hidden, weight)
    with_kl = mean_embedding is not None

    def rows(wanted: bool) -> Tensor:
        return hidden.new_empty(hidden.shape[0] if wanted else 0, dtype=dtype)

    def vectors(wanted: bool) -> Tensor:
        return hidden.new_empty(hidden.shape if wanted else (0,), dtype=dtype)

    return rows(True), rows(True), rows(with_kl), vectors(differentiate), vectors(differentiate and with_kl)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, _, g, k = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, g, k)
    ctx.save_for_backward(g, k)
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(
    ctx: Any, d_logp: Tensor | None, d_lse: None, d_kl: Tensor | None, d_g: None, d_k: None
) -> tuple[Tensor | None, ...]:
    g, k = ctx.saved_tensors
    d_hidden = None if d_logp is None else d_logp[:, None] * g
    if d_kl is not None and k.ndim == 2:
        d_hidden = d_kl[:, None] * k if d_hidden is None else d_hidden.addcmul_(d_kl[:, None], k)
    return (None if d_hidden is None else d_hidden.to(ctx.dtype)), *(None,) * 8


_one_pass.register_autograd(_backward, setup_context=_save)


@torch.no_grad()
def one_pass_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, kl: bool, group: str = "", start: int = 0
) -> HeadStatistics:
    """As :func:`tempo_kernels.head.head_statistics`, for a head without bias and softcap."""
    logp, lse, mean_logit, mean = _statistics(hidden.detach(), weight.detach(), labels, kl, group, start)
    return HeadStatistics(logp, lse, mean_logit, mean) if kl else HeadStatistics(logp, lse)


def one_pass_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference: HeadStatistics | Tensor | None,
    want_kl: bool,
    group: str = "",
    start: int = 0,
) -> HeadOutput:
    """As :func:`tempo_kernels.head.linear_logp`, for a frozen head without bias and softcap."""
    if isinstance(reference, Tensor):
        # The same walk over the same shapes as the policy's, so that equal inputs give equal bits.
        reference = one_pass_statistics(reference, weight, labels, want_kl, group, start)
    dtype = sum_dtype(hidden, weight)
    ref_logp = None if reference is None else reference.logp.detach().to(dtype)
    stats: tuple[Tensor | None, ...] = (None, None, None)
    if reference is not None and want_kl:
        assert reference.mean_logit is not None and reference.mean_embedding is not None
        stats = tuple(t.detach().to(dtype) for t in (reference.lse, reference.mean_logit, reference.mean_embedding))
    differentiate = hidden.requires_grad and torch.is_grad_enabled()
    logp, lse, kl, _, _ = _one_pass(hidden, weight.detach(), labels, *stats, differentiate, group, start)
    return HeadOutput(logp, lse, ref_logp, kl if want_kl else None)
