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
from tempo_kernels.statistics import HeadOutput, HeadStatistics, output, reference_tensors
from tempo_kernels.sweep import Swept, of_known_labels, row_dot, sum_dtype


def _join(swept: Swept, labels: Tensor, rows: int, group: str) -> Swept:
    """What a walk over this rank's rows found, as of the whole head; ``labels`` count from this rank's first row."""
    if not group:
        return swept._replace(target=of_known_labels(swept.target, labels, rows))
    from tempo_kernels.shards import add, join_lse, join_target

    lse, mean = join_lse(swept.lse, group), swept.mean
    if mean is not None:
        mean = add(mean.mul_(torch.exp(swept.lse - lse)[:, None]), group)
    return Swept(lse, join_target(swept.target, labels, rows, group), mean)


@torch.library.custom_op("tempo_kernels::head_statistics", mutates_args=())
def _statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, want_mean: bool, group: str, start: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp [N], lse [N], mean_logit [N] and mean_embedding [N, D]; the last two are empty without ``want_mean``."""
    labels = labels - start if start else labels
    with torch.autocast(hidden.device.type, enabled=False):
        swept = backend(hidden, weight).sweep_head(hidden, weight, labels, want_mean=want_mean)
    lse, target, mean = _join(swept, labels, weight.shape[0], group)
    if mean is None:
        return target - lse, lse, lse.new_empty(0), lse.new_empty(0)
    return target - lse, lse, row_dot(mean, hidden), mean


@_statistics.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, want_mean: bool, group: str, start: int) -> tuple[Tensor, ...]:
    def empty(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return hidden.new_empty(shape, dtype=sum_dtype(hidden, weight))

    rows = hidden.shape[:1]
    return empty(rows), empty(rows), empty(rows if want_mean else (0,)), empty(hidden.shape if want_mean else (0,))


@torch.library.custom_op("tempo_kernels::one_pass", mutates_args=())
def _one_pass(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference: Tensor | None,
    cached_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    want_kl: bool,
    differentiate: bool,
    group: str,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, kl and the live reference's ref_logp [N]; g and k [N, D] when hidden needs its gradient."""
    labels, rows = labels - start if start else labels, weight.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        walks = backend(hidden, weight, reference)
        if reference is None:
            policy, ref = walks.sweep_head(hidden, weight, labels, want_mean=differentiate), None
        else:
            policy, ref = walks.sweep_pair(
                hidden, reference, weight, labels, want_mean=differentiate, want_ref_mean=want_kl
            )
    lse, target, mean = _join(policy, labels, rows, group)
    kl, ref_logp, g, k = (lse.new_empty(0) for _ in range(4))
    if ref is not None and reference is not None:
        cached_lse, ref_target, mean_embedding = _join(ref, labels, rows, group)
        ref_logp = ref_target - cached_lse
        mean_logit = None if mean_embedding is None else row_dot(mean_embedding, reference)
    if want_kl and mean_embedding is not None and mean_logit is not None and cached_lse is not None:
        kl = (mean_logit - row_dot(mean_embedding, hidden)) + (lse - cached_lse)
    if mean is not None and differentiate:
        if want_kl and mean_embedding is not None:
            k = mean - mean_embedding
        g = torch.sub(_label_rows(weight, labels, group).to(mean.dtype), mean, out=mean)
    return target - lse, lse, kl, ref_logp, g, k


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
    reference: Tensor | None,
    cached_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    want_kl: bool,
    differentiate: bool,
    group: str,
    start: int,
) -> tuple[Tensor, ...]:
    rows, shape = hidden.shape[:1], hidden.shape
    wanted = (True, True, want_kl, reference is not None, differentiate, differentiate and want_kl)
    dtype = sum_dtype(hidden, weight)
    shapes = (s if w else (0,) for s, w in zip((rows, rows, rows, rows, shape, shape), wanted, strict=True))
    return tuple(hidden.new_empty(s, dtype=dtype) for s in shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, _, ref_logp, g, k = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, ref_logp, g, k)
    ctx.save_for_backward(g, k)
    ctx.dtype = inputs[0].dtype


@once_differentiable
def _backward(
    ctx: Any, d_logp: Tensor | None, d_lse: None, d_kl: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    g, k = ctx.saved_tensors
    d_hidden = None if d_logp is None else d_logp[:, None] * g
    if d_kl is not None and k.ndim == 2:
        d_hidden = d_kl[:, None] * k if d_hidden is None else d_hidden.addcmul_(d_kl[:, None], k)
    return (None if d_hidden is None else d_hidden.to(ctx.dtype)), *(None,) * 10


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
    differentiate = hidden.requires_grad and torch.is_grad_enabled()
    logp, lse, kl, ref_logp, _, _ = _one_pass(
        hidden, weight.detach(), labels, *reference_tensors(reference, want_kl, sum_dtype(hidden, weight)),
        want_kl, differentiate, group, start,
    )  # fmt: skip
    return output(logp, lse, ref_logp, kl, reference, want_kl)
