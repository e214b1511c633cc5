"""Scaled dot-product attention of rows that are one causal sequence each.

Shapes: B rows, H query heads, K key heads (H a multiple of K), T tokens, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[B, K, T, d] -> [B, heads, T, d]: each key head for the query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [B, H, T, d], key and value [B, K, T, d] -> [B, T, H, d]."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda and query.dtype == torch.float32:
        # there only the kernels for half precision take grouped heads; the others would make all scores
        key, value, grouped = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1]), False
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
