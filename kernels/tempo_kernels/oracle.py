"""The slow truth: log-prob, KL and their gradients in float64 from whole softmaxes. For tests and benches only.

``oracle`` walks the tokens with the gradients written out, for large heads; ``oracle_gradients`` leaves them to
autograd, over whole logits, and knows a bias, a softcap and the gradients of the head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Truth(NamedTuple):
    """float64. kl and d_kl are None without a reference."""

    logp: Tensor
    """[N]"""
    lse: Tensor
    """[N]"""
    d_logp: Tensor
    """[N, D] ∂logp_n/∂hidden_n"""
    ref_logp: Tensor | None
    """[N]"""
    kl: Tensor | None
    """[N] Σ_v q_v (log q_v − log p_v)"""
    d_kl: Tensor | None
    """[N, D] ∂kl_n/∂hidden_n"""


@torch.no_grad()
def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor | None = None) -> Truth:
    """hidden [N, D], weight [V, D], labels [N], reference [N, D]; any dtype, read exactly as it stands.

    Holds one [V, D] copy of the head in float64 and walks the tokens one by one.
    """
    head = weight.double()
    logp, lse, d_logp, ref_logp, kl, d_kl = [], [], [], [], [], []
    for i, label in enumerate(labels.tolist()):
        logits = head @ hidden[i].double()
        total = torch.logsumexp(logits, 0)
        log_p = logits - total
        logp.append(log_p[label])
        lse.append(total)
        mean = head.T @ log_p.exp()
        d_logp.append(head[label] - mean)
        if reference is not None:
            log_q = torch.log_softmax(head @ reference[i].double(), 0)
            ref_logp.append(log_q[label])
            kl.append((log_q.exp() * (log_q - log_p)).sum())
            d_kl.append(mean - head.T @ log_q.exp())

    def stack(values: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        return torch.stack(values) if values else head.new_empty(shape)

    n, d = hidden.shape
    return Truth(
        stack(logp, (n,)),
        stack(lse, (n,)),
        stack(d_logp, (n, d)),
        None if reference is None else stack(ref_logp, (n,)),
        None if reference is None else stack(kl, (n,)),
        None if reference is None else stack(d_kl, (n, d)),
    )


class Gradients(NamedTuple):
    """float64. Values as in :class:`Truth`; gradients of Σ_n d_logp_n·logp_n + d_kl_n·kl_n."""

    logp: Tensor
    lse: Tensor
    ref_logp: Tensor | None
    kl: Tensor | None
    d_hidden: Tensor
    """[N, D]"""
    d_weight: Tensor
    """[V, D]"""
    d_bias: Tensor | None
    """[V]"""


def oracle_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    d_logp: Tensor,
    d_kl: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    reference: Tensor | None = None,
) -> Gradients:
    """hidden and reference [N, D], weight [V, D], labels, d_logp and d_kl [N], bias [V]. Holds logits [N, V]."""
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    b = None if bias is None else bias.detach().double().requires_grad_()

    def scores(rows: Tensor) -> Tensor:
        z = rows @ w.T if b is None else rows @ w.T + b
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    with torch.enable_grad():
        z = scores(x)
        log_p = torch.log_softmax(z, -1)
        logp = log_p.gather(-1, labels[:, None].long())[:, 0]
        loss, ref_logp, kl = (d_logp.double() * logp).sum(), None, None
        if reference is not None:
            log_q = torch.log_softmax(scores(reference.detach().double()), -1).detach()
            ref_logp = log_q.gather(-1, labels[:, None].long())[:, 0]
            kl = (log_q.exp() * (log_q - log_p)).sum(-1)
            if d_kl is not None:
                loss = loss + (d_kl.double() * kl).sum()
        found = torch.autograd.grad(loss, [x, w] if b is None else [x, w, b])
    lse = torch.logsumexp(z.detach(), -1)
    kl = None if kl is None else kl.detach()
    return Gradients(logp.detach(), lse, ref_logp, kl, found[0], found[1], None if b is None else found[2])
