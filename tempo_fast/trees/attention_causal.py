"""Scaled dot-product attention of rows that are one causal sequence each.

Shapes: B rows, H query heads, K key heads (H a multiple of K), T tokens, d head size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [B, H, T, d], key and value [B, K, T, d] -> [B, T, H, d]."""
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()
