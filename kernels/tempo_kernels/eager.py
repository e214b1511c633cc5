"""The plain twin: whole logits, and autograd does the rest. For tests, benches and reading."""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_kernels.statistics import HeadOutput, HeadStatistics
from tempo_kernels.sweep import row_dot, sum_dtype


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, dtype: torch.dtype) -> Tensor:
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def eager_logp(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    reference: HeadStatistics | Tensor | None,
    want_kl: bool,
) -> HeadOutput:
    """As :func:`tempo_kernels.head.linear_logp`, with logits [N, V] in float32 (float64 from float64 inputs)."""
    dtype = sum_dtype(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden.to(dtype)  # one conversion: the gradients that meet in it cancel before they are rounded
        logits = _logits(x, weight, bias, softcap, dtype)
        lse = torch.logsumexp(logits, -1)
        logp = logits.gather(-1, labels[:, None].long()).squeeze(-1) - lse
        ref_logp = kl = None
        if isinstance(reference, HeadStatistics):
            ref_logp = reference.logp.detach().to(dtype)
            if want_kl:
                assert reference.mean_logit is not None and reference.mean_embedding is not None
                mean = reference.mean_embedding.detach().to(dtype)
                kl = (reference.mean_logit.detach().to(dtype) - row_dot(mean, x)) + (lse - reference.lse.to(dtype))
        elif reference is not None:
            with torch.no_grad():
                ref_logits = _logits(reference, weight, bias, softcap, dtype)
                ref_lse = torch.logsumexp(ref_logits, -1)
                ref_logp = ref_logits.gather(-1, labels[:, None].long()).squeeze(-1) - ref_lse
            if want_kl:
                # Differences of logits, not of log-probs: exactly 0 on equal inputs, with gradient p - q exactly 0.
                probs = torch.exp(ref_logits - ref_lse[:, None])
                kl = (probs * (ref_logits - logits)).sum(-1) + (lse - ref_lse)
        return HeadOutput(logp, lse.detach(), ref_logp, kl)


@torch.no_grad()
def eager_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, kl: bool
) -> HeadStatistics:
    """As :func:`tempo_kernels.head.head_statistics`, from whole logits."""
    out = eager_logp(hidden, weight, labels, bias, softcap, None, False)
    if not kl:
        return HeadStatistics(out.logp, out.lse)
    dtype = out.lse.dtype
    with torch.autocast(hidden.device.type, enabled=False):
        mean = torch.softmax(_logits(hidden, weight, bias, None, dtype), -1) @ weight.to(dtype)
    return HeadStatistics(out.logp, out.lse, row_dot(mean, hidden), mean)
