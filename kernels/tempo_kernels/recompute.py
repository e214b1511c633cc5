"""The head by two passes: values first, and logits computed again in the backward, as custom operators.

For a head that trains, a bias, a softcap, and the KL's gradient from the difference p − q. Shapes: N tokens, D hidden
size, V vocabulary (a rank's rows of it in a vocabulary-parallel head). Saved for the backward are the inputs and two
[N] sums. Conventions as in one_pass.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_kernels.backend import backend
from tempo_kernels.statistics import HeadOutput, HeadStatistics, output, reference_tensors
from tempo_kernels.sweep import of_known_labels, row_dot, sum_dtype


@torch.library.custom_op("tempo_kernels::recompute", mutates_args=())
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    reference: Tensor | None,
    cached_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    want_kl: bool,
    group: str,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, lse, kl, and the live reference's ref_logp and ref_lse: [N] or empty."""
    labels = labels - start if start else labels
    with torch.autocast(hidden.device.type, enabled=False):
        walk = backend(hidden, weight, reference).pair_forward
        lse, target, ref_lse, ref_target, cross = walk(hidden, reference, weight, labels, bias, softcap, want_kl)
    rows = weight.shape[0]
    if not group:
        target = of_known_labels(target, labels, rows)
        ref_target = None if ref_target is None else of_known_labels(ref_target, labels, rows)
    else:
        from tempo_kernels.shards import add, join_lse, join_target

        lse, target = join_lse(lse, group), join_target(target, labels, rows, group)
        if ref_lse is not None and ref_target is not None:
            whole = join_lse(ref_lse, group)
            if cross is not None:
                cross = add(cross * torch.exp(ref_lse - whole), group)
            ref_lse, ref_target = whole, join_target(ref_target, labels, rows, group)
    kl, none = lse.new_empty(0), lse.new_empty(0)
    if cross is not None and ref_lse is not None:
        kl = cross + (lse - ref_lse)
    elif want_kl and mean_embedding is not None and mean_logit is not None and cached_lse is not None:
        kl = (mean_logit - row_dot(mean_embedding, hidden)) + (lse - cached_lse)
    if ref_lse is None or ref_target is None:
        return target - lse, lse, kl, none, torch.empty_like(none)
    return target - lse, lse, kl, ref_target - ref_lse, ref_lse


@_recompute.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    reference: Tensor | None,
    cached_lse: Tensor | None,
    mean_logit: Tensor | None,
    mean_embedding: Tensor | None,
    want_kl: bool,
    group: str,
    start: int,
) -> tuple[Tensor, ...]:
    dtype = sum_dtype(hidden, weight)
    wanted = (True, True, want_kl, reference is not None, reference is not None)
    return tuple(hidden.new_empty(hidden.shape[0] if w else 0, dtype=dtype) for w in wanted)


@torch.library.custom_op("tempo_kernels::recompute_backward", mutates_args=())
def _recompute_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    reference: Tensor | None,
    mean_embedding: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor | None,
    d_logp: Tensor,
    d_kl: Tensor | None,
    wanted: list[bool],
    group: str,
    start: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (as summed), and of weight and bias in their dtypes; those not ``wanted`` are empty."""
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden, d_weight, d_bias = backend(hidden, weight, reference).pair_backward(
            hidden, reference, weight, labels - start if start else labels, bias, softcap, lse, ref_lse, d_logp, d_kl,
            want_hidden=wanted[0], want_weight=wanted[1], want_bias=wanted[2],
        )  # fmt: skip
    if d_hidden is not None:
        if group:
            from tempo_kernels.shards import add

            d_hidden = add(d_hidden, group)
        if d_kl is not None and mean_embedding is not None:
            d_hidden = d_hidden.addcmul_(d_kl[:, None], mean_embedding, value=-1)
    found = (d_hidden, d_weight, d_bias)
    return tuple(lse.new_empty(0) if d is None else d for d in found)  # type: ignore[return-value]


@_recompute_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None,
    reference: Tensor | None,
    mean_embedding: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor | None,
    d_logp: Tensor,
    d_kl: Tensor | None,
    wanted: list[bool],
    group: str,
    start: int,
) -> tuple[Tensor, ...]:
    sums = hidden.new_empty(hidden.shape, dtype=lse.dtype)  # contiguous, whatever hidden is
    pairs = zip((sums, weight, bias), wanted, strict=True)
    return tuple(torch.empty_like(t) if w and t is not None else lse.new_empty(0) for t, w in pairs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, softcap, reference, _, _, mean_embedding, want_kl, group, start = inputs
    _, lse, _, ref_logp, ref_lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, ref_logp, ref_lse)
    if not want_kl:
        reference = mean_embedding = None
    ctx.save_for_backward(hidden, weight, bias, labels, reference, mean_embedding, lse, ref_lse)
    ctx.softcap, ctx.want_kl, ctx.group, ctx.start = softcap, want_kl, group, start


@once_differentiable
def _backward(
    ctx: Any, d_logp: Tensor | None, d_lse: None, d_kl: Tensor | None, d_ref_logp: None, d_ref_lse: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, reference, mean_embedding, lse, ref_lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:3])
    d_kl = d_kl if ctx.want_kl else None
    if d_logp is None and d_kl is None:
        return (None,) * 12
    d_hidden, d_weight, d_bias = _recompute_backward(
        hidden, weight, bias, labels, ctx.softcap, reference, mean_embedding, lse,
        None if reference is None else ref_lse, torch.zeros_like(lse) if d_logp is None else d_logp, d_kl, wanted,
        ctx.group, ctx.start,
    )  # fmt: skip
    found = (d_hidden.to(hidden.dtype) if wanted[0] else None, d_weight if wanted[1] else None)
    return *found, d_bias if wanted[2] else None, *(None,) * 9


_recompute.register_autograd(_backward, setup_context=_save)


def recompute_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference: HeadStatistics | Tensor | None,
    want_kl: bool,
    group: str = "",
    start: int = 0,
) -> HeadOutput:
    """As :func:`tempo_kernels.head.linear_logp`, for any head."""
    logp, lse, kl, ref_logp, _ = _recompute(
        hidden, weight, bias, labels, softcap, *reference_tensors(reference, want_kl, sum_dtype(hidden, weight)),
        want_kl, group, start,
    )  # fmt: skip
    return output(logp, lse, ref_logp, kl, reference, want_kl)


@torch.no_grad()
def recompute_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    kl: bool,
    group: str = "",
    start: int = 0,
) -> HeadStatistics:
    """As :func:`tempo_kernels.head.head_statistics`, for any head; its mean row is the gradient of logsumexp."""
    logp, lse, _, _, _ = _recompute(
        hidden, weight, bias, labels, softcap, None, None, None, None, False, group, start
    )
    if not kl:
        return HeadStatistics(logp, lse)
    ones, zeros = torch.ones_like(lse), torch.zeros_like(lse)
    wanted = [True, False, False]
    mean, _, _ = _recompute_backward(
        hidden, weight, bias, labels, None, None, None, lse, None, zeros, ones, wanted, group, start
    )
    return HeadStatistics(logp, lse, row_dot(mean, hidden), mean)
