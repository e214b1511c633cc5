"""The oracle of the attention tests, and a stand-in for flash-attn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tempo_fast.models.family import Prompt
from tempo_fast.trees.batch import PackedBatch, collate
from tempo_fast.trees.layout import Branch, ResponseTree


def packed_of(layout: Sequence[tuple[int, Sequence[int]]]) -> PackedBatch:
    """Trees of (prompt tokens, tokens of each branch)."""
    trees = []
    for i, (prompt, branches) in enumerate(layout):
        positions = torch.arange(prompt).expand(3, -1)
        visual = torch.zeros(prompt, dtype=torch.bool)
        made = Prompt(torch.ones(prompt, dtype=torch.int64), positions, visual)
        trees.append(ResponseTree(f"t{i}", made, [Branch.of([1] * n) for n in branches]))
    return collate(trees)


def whole_softmax(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """[B, heads, T, d] -> [B, T, H, d] by the whole matrix of scores; ``allowed`` [B, T, T] bool."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.mT * scale).masked_fill(~allowed[:, None], float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _pieces(cu_q: Tensor, cu_k: Tensor) -> list[tuple[slice, slice]]:
    q, k = cu_q.tolist(), cu_k.tolist()
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(q) == len(k)
    return [(slice(*x), slice(*y)) for x, y in zip(zip(q, q[1:]), zip(k, k[1:]))]  # noqa: B905


def _probabilities(q: Tensor, k: Tensor, lse: Tensor | None, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """exp(score - lse) [H, n, m], and the scores' own lse [H, n]."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale
    if causal:
        assert len(q) == len(k)
        scores = scores.masked_fill(~torch.ones(len(q), len(q), dtype=torch.bool).tril(), float("-inf"))
    own = scores.logsumexp(-1)
    return (scores - (own if lse is None else lse)[..., None]).exp(), own


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, scale: float,
    causal: bool, **options: Any,
) -> tuple[Tensor, Tensor, None, None]:  # fmt: skip
    """As flash-attn's: q [n, H, d], k and v [m, K, d] -> out [n, H, d], lse [H, n]."""
    assert dropout == 0 and options["softcap"] == 0 and all(x.is_contiguous() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for a, b in _pieces(cu_q, cu_k):
        assert a.stop - a.start <= max_q and b.stop - b.start <= max_k
        p, lse = _probabilities(q[a], k[b].repeat_interleave(groups, 1), None, scale, causal)
        outs.append(torch.einsum("hnm,mhd->nhd", p, v[b].repeat_interleave(groups, 1)))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1), None, None


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float, scale: float, causal: bool, **options: Any,
) -> Tensor:  # fmt: skip
    """As flash-attn's: probabilities from the lse that is given, row sums from the output that is given."""
    groups, d = q.shape[1] // k.shape[1], q.shape[2]
    rows = (grad * out).sum(-1)
    for a, b in _pieces(cu_q, cu_k):
        many_k, many_v = k[b].repeat_interleave(groups, 1), v[b].repeat_interleave(groups, 1)
        p, _ = _probabilities(q[a], many_k, lse[:, a], scale, causal)
        of_p = torch.einsum("nhd,mhd->hnm", grad[a], many_v)
        of_scores = p * (of_p - rows[a].t()[..., None]) * scale
        dq[a] = torch.einsum("hnm,mhd->nhd", of_scores, many_k)
        for total, found in (
            (dk, torch.einsum("hnm,nhd->mhd", of_scores, q[a])),
            (dv, torch.einsum("hnm,nhd->mhd", p, grad[a])),
        ):
            total[b] = found.view(len(found), -1, groups, d).sum(2)
    return rows
