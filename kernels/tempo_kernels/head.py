"""The loss head: per-token log-probs and the exact KL(ref || policy) of a language-model head, without full logits.

Shapes: N response tokens (already gathered), D hidden size, V vocabulary.

Three paths give the same numbers. ``eager`` writes the logits [N, V] in float32 and lets autograd do the rest. The
others walk the vocabulary in slices and hold one slice of logits. ``one_pass`` needs a frozen head without bias or
softcap. With A(x) = logsumexp(W x), m(x) = softmax(W x)ᵀ W and the reference's q over the same head:

    logp_t = W[y_t]·x_t − A(x_t)                                  ∂logp_t/∂x_t = W[y_t] − m(x_t)
    KL_t   = (mean_logit_t − m_ref,t·x_t) + (A(x_t) − lse_ref,t)    ∂KL_t/∂x_t   = m(x_t) − m_ref,t

where m_ref = Σ_v q_v W_v and mean_logit = m_ref·x_ref. So values and gradients come from one walk, the backward is
elementwise and never touches the head, and four small statistics replace the reference model.

``recompute`` takes every head. It walks once for the values and once more in the backward, which forms the gradient in
the logits, d_logp·(1[v = y] − p) + d_kl·(p − q), slice by slice, and from it those of hidden states, weight and bias.
KL_t = Σ_v q_v (z_q,v − z_p,v) + A(x_t) − A(x_ref,t).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tempo_kernels.eager import eager_logp, eager_statistics
from tempo_kernels.one_pass import one_pass_logp, one_pass_statistics
from tempo_kernels.recompute import recompute_logp, recompute_statistics
from tempo_kernels.statistics import HeadOutput, HeadStatistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["IMPLEMENTATIONS", "HeadOutput", "HeadStatistics", "head_statistics", "linear_logp"]

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "one_pass", "recompute", "eager")


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
    exact_kl: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> HeadOutput:
    """Log-prob of each label under ``softcap(hidden @ weight.T + bias)``, and the KL to a reference.

    Args:
        hidden: [N, D] floating point; gather valid positions before calling, N = 0 is allowed.
        weight: [V, D], the dtype of ``hidden`` or another; sums run in float32 (float64 if either is float64).
        labels: [N] integers in 0..V-1. Others raise on the CPU; on a GPU and under torch.compile their logp is NaN.
        bias: [V] or None.
        softcap: logits become softcap * tanh(logits / softcap); > 0, or None.
        reference: statistics of :func:`head_statistics` (the reference's head is this frozen head), or the live
            reference's hidden states [N, D], evaluated under the same weight, bias and softcap without gradient.
        impl: ``one_pass`` (frozen head without bias and softcap), ``recompute`` (any), ``eager`` (any, whole logits),
            or ``auto``: one_pass where it can, else recompute, said once in the log with the reason.
        kl: False skips the KL to a live or cached reference (a live reference then costs one matmul less).
        exact_kl: form the KL's gradient from the difference p − q, where one_pass subtracts two means: for a KL so
            small that their rounding shows in 16-bit kernels. Needs a live reference; costs one matmul more.
        group: the head is split over the vocabulary: ``weight`` (and ``bias``) are this rank's V rows of it, ``labels``
            count over the whole. Every rank passes the same hidden states and reference and receives the same outputs
            and the full gradient of ``hidden``; that of ``weight`` and ``bias`` stays with its rows. All ranks call.
        vocab_start: first row of this rank's part; by default rank * V, for parts of equal size.

    ``hidden``, ``weight`` and ``bias`` receive gradients, once: a second derivative raises RuntimeError. Equal policy
    and live reference in equal shapes give KL and gradient of exactly 0; so do one_pass's own statistics. Raises
    ValueError for shapes, labels or combinations that cannot work, saying what to do instead.
    """
    name, start = _shard(weight, group, vocab_start)
    _check(hidden, weight, labels, bias, softcap, reference, whole=not name)
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
        if exact_kl:
            raise ValueError(
                "exact_kl needs p − q for every word, which cached statistics do not hold: pass the live reference's "
                "hidden states, or leave exact_kl out"
            )
    chosen = _choose(impl, weight, bias, softcap, exact_kl and want_kl, bool(name))
    if chosen == "one_pass":
        return one_pass_logp(hidden, weight, labels, reference, want_kl, name, start)
    if chosen == "recompute":
        return recompute_logp(hidden, weight, labels, bias, softcap, reference, want_kl, name, start)
    return eager_logp(hidden, weight, labels, bias, softcap, reference, want_kl)


@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    kl: bool = True,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> HeadStatistics:
    """All that log-ratios (and with ``kl`` the exact KL) need of a reference model.

    hidden [N, D], weight [V, D], labels [N], bias [V], impl, group, vocab_start: as in :func:`linear_logp`.
    ``kl=False`` leaves mean_logit and mean_embedding None and saves half the work. Raises ValueError as there, and for
    ``kl`` with a softcap.
    """
    name, start = _shard(weight, group, vocab_start)
    _check(hidden, weight, labels, bias, softcap, None, whole=not name)
    if softcap is not None and kl:
        raise ValueError("statistics for the KL do not exist under a softcap: pass kl=False, or use a live reference")
    chosen = _choose(impl, weight, bias, softcap, False, bool(name))
    if chosen == "one_pass":
        return one_pass_statistics(hidden, weight, labels, kl, name, start)
    if chosen == "recompute":
        return recompute_statistics(hidden, weight, labels, bias, softcap, kl, name, start)
    return eager_statistics(hidden, weight, labels, bias, softcap, kl)


# -- choosing ---------------------------------------------------------------------------------------------------------

_said: set[str] = set()


def _trains(weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))


def _choose(
    impl: str, weight: Tensor, bias: Tensor | None, softcap: float | None, exact_kl: bool, sharded: bool
) -> str:
    reasons = []
    if _trains(weight, bias):
        reasons.append("the head trains")
    if bias is not None:
        reasons.append("the head has a bias")
    if softcap is not None:
        reasons.append("the logits are soft-capped")
    if exact_kl:
        reasons.append("exact_kl is asked for")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "one_pass" and reasons:
        raise ValueError(f"impl 'one_pass' cannot be used because {' and '.join(reasons)}: use 'recompute' or 'auto'")
    if impl == "eager" and sharded:
        raise ValueError("impl 'eager' knows no group: use 'one_pass', 'recompute' or 'auto'")
    if impl != "auto":
        return impl
    chosen = "recompute" if reasons else "one_pass"
    if not torch.compiler.is_compiling():
        why = " and ".join(reasons) or "the head is frozen, without bias and softcap"
        line = f"linear_logp: {chosen} ({why})"
        if line not in _said:
            _said.add(line)
            logger.info(line)
    return chosen


def _shard(weight: Tensor, group: ProcessGroup | None, vocab_start: int | None) -> tuple[str, int]:
    """The group's name, or "" without one, and the first row of this rank's part of the head."""
    if group is None:
        if vocab_start is not None:
            raise ValueError("vocab_start is the place of this rank's part of the head: pass the group as well")
        return "", 0
    return group.group_name, group.rank() * weight.shape[0] if vocab_start is None else vocab_start


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference: Any,
    *,
    whole: bool,
) -> None:
    if isinstance(weight, torch.nn.Module):
        raise ValueError("weight must be the head's [V, D] tensor, not a module: pass head.weight of a plain Linear")
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if hasattr(value, "full_tensor"):
            raise ValueError(
                f"{name} is a DTensor: gather it with full_tensor(), or pass the rows of to_local() and the group over "
                "which they are split"
            )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}; "
            "a head sharded by ZeRO-3 or FSDP has to be gathered first"
        )
    n, v = hidden.shape[0], weight.shape[0]
    if labels.shape != (n,) or labels.is_floating_point():
        raise ValueError(f"expected integer labels [{n}], got {tuple(labels.shape)} of {labels.dtype}")
    # joining the ranks' parts checks the labels of a split head
    check_labels = whole and n and labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if check_labels and not (0 <= int(labels.min()) and int(labels.max()) < v):
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
