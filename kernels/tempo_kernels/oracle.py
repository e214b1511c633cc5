"""The slow truth: log-prob, KL and their gradients in float64 from whole softmaxes. For tests and benches only."""

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
