"""Attention of packed trees by the public scaled_dot_product_attention, two calls a tree: prompt causally, and all
branches over prompt and branches with a small mask. For devices whose log-sum-exp torch does not give.

Shapes: P prompt tokens, Q branch tokens of one tree, H query heads, K key heads, T tokens, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tempo_fast.trees.attention_causal import causal_attention, repeat_heads
from tempo_fast.trees.batch import Extent


class MaskedAttention:
    """The attention of one packed row: query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""

    def __init__(self, extents: Sequence[Extent], device: torch.device) -> None:
        self.extents = list(extents)
        self.masks = [branch_mask(e).to(device) for e in extents]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        sizes = [e.end - e.start for e in self.extents]
        pieces = []
        # split rather than slices: its backward is one copy of the row, whatever the number of trees
        parts = zip(self.extents, self.masks, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
        for e, mask, q, k, v in parts:
            p = e.prompt
            pieces.append(causal_attention(q[:, :, :p], k[:, :, :p], v[:, :, :p], scale))
            # fused kernels take a mask or grouped heads, not both
            k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
            answers = scaled_dot_product_attention(q[:, :, p:], k, v, attn_mask=mask, scale=scale)
            pieces.append(answers.transpose(1, 2))
        return torch.cat(pieces, dim=1)


def branch_mask(e: Extent) -> Tensor:
    """[Q, P + Q] bool: which of prompt and branches each branch token sees."""
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in e.branches)).bool()
    return torch.cat([torch.ones(len(blocks), e.prompt, dtype=torch.bool), blocks], dim=1)
