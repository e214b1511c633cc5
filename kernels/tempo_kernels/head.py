"""The loss head: per-token log-probs and the exact KL(ref || policy) of a language-model head, without full logits.

Shapes: N response tokens (already gathered), D hidden size, V vocabulary.

Two paths give the same numbers. ``eager`` writes the logits [N, V] in float32 and lets autograd do the rest.
``one_pass`` walks the vocabulary in slices and holds one slice of logits; it needs a frozen head without bias or
softcap. With A(x) = logsumexp(W x), m(x) = softmax(W x)ᵀ W and the reference's q over the same head:

    logp_t = W[y_t]·x_t − A(x_t)                                  ∂logp_t/∂x_t = W[y_t] − m(x_t)
    KL_t   = (mean_logit_t − m_ref,t·x_t) + (A(x_t) − lse_ref,t)    ∂KL_t/∂x_t   = m(x_t) − m_ref,t

where m_ref = Σ_v q_v W_v and mean_logit = m_ref·x_ref. So values and gradients come from one walk, the backward is
elementwise and never touches the head, and four small statistics replace the reference model.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempo_kernels.sweep import row_dot, sweep_head

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "one_pass", "eager")


class HeadStatistics(NamedTuple):
    """What a reference model leaves behind per response token; float32 (float64 from float64 inputs), no gradient.

    ``mean_logit`` [N] and ``mean_embedding`` [N, D] are only needed for the KL and are None without it.
    """

    logp: Tensor
    """[N] log-prob of the label."""
    lse: Tensor
    """[N] logsumexp of the logits."""
    mean_logit: Tensor | None = None
    """[N] mean_embedding · hidden_ref."""
    mean_embedding: Tensor | None = None
    """[N, D] head rows averaged with the reference's probabilities."""


class HeadOutput(NamedTuple):
    """Per-token values, float32 (float64 from float64 inputs)."""

    logp: Tensor
    """[N] log-prob of the label; differentiable."""
    lse: Tensor
    """[N] logsumexp of the logits; carries no gradient."""
    ref_logp: Tensor | None
    """[N] the reference's log-prob of the label; no gradient. None without a reference."""
    kl: Tensor | None
    """[N] KL(ref || policy) over the whole vocabulary; differentiable. None without what it needs."""


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reference: HeadStatistics | Tensor | None = None,
    impl: str = "auto",
    kl: bool = True,
) -> HeadOutput:
    """Log-prob of each label under ``softcap(hidden @ weight.T + bias)``, and the KL to a reference.

    Args:
        hidden: [N, D] floating point; gather valid positions before calling, N = 0 is allowed.
        weight: [V, D], the dtype of ``hidden`` or another; sums run in float32 (float64 if either is float64).
        labels: [N] integers in 0..V-1.
        bias: [V] or None. eager only.
        softcap: logits become softcap * tanh(logits / softcap); > 0, or None. eager only.
        reference: statistics of :func:`head_statistics` (the reference's head is this frozen head), or the live
            reference's hidden states [N, D], evaluated under the same weight, bias and softcap without gradient.
        impl: ``one_pass`` (frozen head), ``eager``, or ``auto``, which logs once what it took and why.
        kl: False skips the KL to a live or cached reference (a live reference then costs one matmul less).

    Equal policy and reference inputs in equal shapes give KL and gradient of exactly 0. Raises ValueError for shapes,
    labels or combinations that cannot work, saying what to do instead.
    """
    _check(hidden, weight, labels, bias, softcap, reference)
    chosen = _choose(impl, weight, bias, softcap)
    want_kl = kl and reference is not None
    if isinstance(reference, HeadStatistics):
        want_kl = kl and reference.mean_embedding is not None
    if isinstance(reference, HeadStatistics) and want_kl:
        if _trains(weight, bias):
            raise ValueError(
                "the KL of cached statistics holds only while the head is frozen: freeze the head, pass the live "
                "reference's hidden states, or pass kl=False"
            )
        if softcap is not None:
            raise ValueError("cached statistics give no KL under a softcap: pass the live reference's hidden states")
    with torch.autocast(hidden.device.type, enabled=False):
        if chosen == "one_pass":
            return _one_pass(hidden, weight, labels, reference, want_kl)
        return _eager(hidden, weight, labels, bias, softcap, reference, want_kl)


@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    kl: bool = True,
) -> HeadStatistics:
    """All that log-ratios (and with ``kl`` the exact KL) need of a reference model.

    hidden [N, D], weight [V, D], labels [N], bias [V]: as in :func:`linear_logp`. ``kl=False`` leaves mean_logit and
    mean_embedding None and saves half the work. Raises ValueError for ``kl`` with a softcap.
    """
    _check(hidden, weight, labels, bias, softcap, None)
    if softcap is not None and kl:
        raise ValueError("statistics for the KL do not exist under a softcap: pass kl=False, or use a live reference")
    with torch.autocast(hidden.device.type, enabled=False):
        if bias is not None or softcap is not None:
            out = _eager(hidden, weight, labels, bias, softcap, None, False)
            if not kl:
                return HeadStatistics(out.logp, out.lse)
            dtype = out.lse.dtype
            logits = _logits(hidden, weight, bias, None, dtype)
            mean = torch.softmax(logits, -1) @ weight.to(dtype)
            return HeadStatistics(out.logp, out.lse, row_dot(mean, hidden), mean)
        swept = sweep_head(hidden, weight, labels, want_mean=kl)
    mean_logit = None if swept.mean is None else row_dot(swept.mean, hidden)
    return HeadStatistics(swept.target - swept.lse, swept.lse, mean_logit, swept.mean)


# -- choosing ---------------------------------------------------------------------------------------------------------

_said: set[str] = set()


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _choose(impl: str, weight: Tensor, bias: Tensor | None, softcap: float | None) -> str:
    reasons = []
    if _trains(weight, bias):
        reasons.append("the head trains")
    if bias is not None:
        reasons.append("the head has a bias")
    if softcap is not None:
        reasons.append("the logits are soft-capped")
    if impl == "recompute":
        raise ValueError("impl 'recompute' is not in this version: use 'eager' for a trained, biased or capped head")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "one_pass" and reasons:
        raise ValueError(f"impl 'one_pass' cannot be used because {' and '.join(reasons)}: use 'eager' or 'auto'")
    if impl != "auto":
        return impl
    chosen = "eager" if reasons else "one_pass"
    why = " and ".join(reasons) or "the head is frozen, without bias and softcap"
    line = f"linear_logp: {chosen} ({why})"
    if line not in _said:
        _said.add(line)
        logger.info(line)
    return chosen


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, reference: Any
) -> None:
    if isinstance(weight, torch.nn.Module):
        raise ValueError("weight must be the head's [V, D] tensor, not a module: pass head.weight of a plain Linear")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "a head sharded by ZeRO-3 or FSDP has to be gathered first"
        )
    n, v = hidden.shape[0], weight.shape[0]
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"expected integer labels [{n}], got {tuple(labels.shape)} of {labels.dtype}")
    if n and labels.device.type == "cpu" and not (0 <= int(labels.min()) and int(labels.max()) < v):
        raise ValueError(
            f"labels must lie in 0..{v - 1}, got {int(labels.min())}..{int(labels.max())}; "
            "gather the valid positions (label != -100) first"
        )
    if bias is not None and bias.shape != (v,):
        raise ValueError(f"expected bias [{v}], got {tuple(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap}")
    if isinstance(reference, HeadStatistics):
        if (reference.mean_logit is None) != (reference.mean_embedding is None):
            raise ValueError("reference has only one of mean_logit and mean_embedding")
        for name in HeadStatistics._fields:
            value, shape = getattr(reference, name), tuple(hidden.shape) if name == "mean_embedding" else (n,)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"reference.{name} must be {list(shape)}, got {list(value.shape)}")
    elif isinstance(reference, Tensor):
        if reference.shape != hidden.shape:
            raise ValueError(f"reference hidden states must be {list(hidden.shape)}, got {list(reference.shape)}")
    elif reference is not None:
        raise ValueError(f"reference must be HeadStatistics or a tensor [N, D], got {type(reference).__name__}")


# -- eager: the plain twin --------------------------------------------------------------------------------------------


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> Tensor:
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _eager(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference: HeadStatistics | Tensor | None,
    want_kl: bool,
) -> HeadOutput:
    dtype = _sum_dtype(hidden, weight)
    logits = _logits(hidden, weight, bias, softcap, dtype)
    lse = torch.logsumexp(logits, -1)
    logp = logits.gather(-1, labels[:, None].long()).squeeze(-1) - lse
    ref_logp = kl = None
    if isinstance(reference, HeadStatistics):
        ref_logp = reference.logp.detach().to(dtype)
        if want_kl:
            assert reference.mean_logit is not None and reference.mean_embedding is not None
            mean = reference.mean_embedding.detach().to(dtype)
            kl = (reference.mean_logit.detach().to(dtype) - row_dot(mean, hidden)) + (lse - reference.lse.to(dtype))
    elif reference is not None:
        with torch.no_grad():
            ref_logits = _logits(reference, weight, bias, softcap, dtype)
            ref_lse = torch.logsumexp(ref_logits, -1)
            ref_logp = ref_logits.gather(-1, labels[:, None].long()).squeeze(-1) - ref_lse
        if want_kl:
            # Differences of logits, not of log-probs: exactly 0, and with gradient p - q exactly 0, on equal inputs.
            probs = torch.exp(ref_logits - ref_lse[:, None])
            kl = (probs * (ref_logits - logits)).sum(-1) + (lse - ref_lse)
    return HeadOutput(logp, lse.detach(), ref_logp, kl)


# -- one pass ---------------------------------------------------------------------------------------------------------


class _OnePass(torch.autograd.Function):
    """(hidden, weight, labels, statistics) -> logp, lse, kl. Saves g = W[y] − m and k = m − m_ref, not the head."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_lse: Tensor | None,
        mean_logit: Tensor | None,
        mean_embedding: Tensor | None,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        swept = sweep_head(hidden, weight, labels, want_mean=differentiate)
        kl = None
        if mean_embedding is not None and mean_logit is not None and ref_lse is not None:
            kl = (mean_logit - row_dot(mean_embedding, hidden)) + (swept.lse - ref_lse)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(swept.lse)
        if differentiate:
            assert swept.mean is not None
            k = None if mean_embedding is None else swept.mean - mean_embedding
            g = torch.sub(weight[labels].to(swept.mean.dtype), swept.mean, out=swept.mean)
            ctx.save_for_backward(g, k)
            ctx.dtype = hidden.dtype
        return swept.target - swept.lse, swept.lse, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_logp: Tensor | None, d_lse: None, d_kl: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g, k = ctx.saved_tensors
        d_hidden = None if d_logp is None else d_logp[:, None] * g
        if d_kl is not None:
            d_hidden = d_kl[:, None] * k if d_hidden is None else d_hidden.addcmul_(d_kl[:, None], k)
        return (None if d_hidden is None else d_hidden.to(ctx.dtype)), None, None, None, None, None, None


def _one_pass(
    hidden: Tensor, weight: Tensor, labels: Tensor, reference: HeadStatistics | Tensor | None, want_kl: bool
) -> HeadOutput:
    dtype = _sum_dtype(hidden, weight)
    if isinstance(reference, Tensor):
        # The same walk over the same shapes as the policy's, so that equal inputs give equal bits.
        reference = head_statistics(reference.detach(), weight.detach(), labels, kl=want_kl)
    ref_logp = None if reference is None else reference.logp.detach().to(dtype)
    stats: tuple[Tensor | None, ...] = (None, None, None)
    if reference is not None and want_kl:
        assert reference.mean_logit is not None and reference.mean_embedding is not None
        stats = tuple(t.detach().to(dtype) for t in (reference.lse, reference.mean_logit, reference.mean_embedding))
    differentiate = hidden.requires_grad and torch.is_grad_enabled()
    logp, lse, kl = _OnePass.apply(hidden, weight.detach(), labels, *stats, differentiate)
    return HeadOutput(logp, lse, ref_logp, kl)
