"""The flash-attn package as the kernel of merged attention: one varlen call for all segments of a pack, one for all
branches over their prompts.

Shapes: T tokens, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tempo_fast.trees.attention_merged import Call

DTYPES = (torch.float16, torch.bfloat16)


def installed() -> bool:
    return find_spec("flash_attn") is not None


def takes(head_size: int) -> bool:
    return head_size <= 256 and head_size % 8 == 0


class FlashKernel:
    """One per pack: the indices of its calls are made once and kept for all layers.

    ``forward`` and ``backward`` are the two halves of flash-attn's varlen function, as of 2.8: the public one has no
    gradient through the log-sum-exp.
    """

    groups = True

    def __init__(self, forward: Any = None, backward: Any = None) -> None:
        if forward is None or backward is None:
            from flash_attn import flash_attn_interface as flash

            forward = flash._wrapped_flash_attn_varlen_forward
            backward = flash._wrapped_flash_attn_varlen_backward
        self._run, self._run_backward = forward, backward
        self._made: dict[tuple[Call, ...], _Indices] = {}

    def _indices(self, calls: Sequence[Call], device: torch.device) -> _Indices:
        key = tuple(calls)
        if key not in self._made:
            self._made[key] = _Indices(calls, device)
        return self._made[key]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        at = self._indices(calls, q.device)
        out, lse, *_ = self._run(
            at.of_queries(q), at.of_keys(k), at.of_keys(v), *at.sizes, 0.0, scale, causal=causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        calls: Sequence[Call],
        causal: bool,
        scale: float,
        gradients: tuple[Tensor, Tensor, Tensor],
        add: bool,
    ) -> None:
        at = self._indices(calls, q.device)
        parts = at.of_queries(q), at.of_keys(k), at.of_keys(v)
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts)
        self._run_backward(
            at.of_queries(grad), *parts, at.of_queries(out), at.of_queries(lse.t()).t().contiguous(), *found,
            *at.sizes, 0.0, scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        for total, share, index in zip(gradients, found, (at.queries, at.keys, at.keys), strict=True):
            if not add:
                total.copy_(share)
            else:
                assert index is not None  # only the calls over prompts add, and they pick their tokens
                total.index_add_(0, index, share)


class _Indices:
    """The tokens of calls: ``queries`` and ``keys`` [n] int64, None where the calls cover the row in order; ``sizes``
    as flash-attn takes them, cumulative lengths int32 and the longest."""

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        queries, keys = [(c.q0, c.q1) for c in calls], [(c.k0, c.k1) for c in calls]
        whole = queries == keys
        self.queries = None if whole else _tokens(queries).to(device)
        self.keys = None if whole else _tokens(keys).to(device)
        ends = (torch.tensor([0, *(b - a for a, b in spans)]).cumsum(0).int().to(device) for spans in (queries, keys))
        self.sizes = (*ends, *(max(b - a for a, b in spans) for spans in (queries, keys)))

    def of_queries(self, x: Tensor) -> Tensor:
        return (x if self.queries is None else x[self.queries]).contiguous()

    def of_keys(self, x: Tensor) -> Tensor:
        return (x if self.keys is None else x[self.keys]).contiguous()


def _tokens(spans: Sequence[tuple[int, int]]) -> Tensor:
    return torch.cat([torch.arange(a, b) for a, b in spans])
