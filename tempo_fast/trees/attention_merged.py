"""Attention of packed trees without a mask: every segment attends causally to itself, branches to their prompt as well,
and the two are merged by their log-sum-exp.

With a token's scores in two sets a and b, lse = log(exp(lse_a) + exp(lse_b)) and the output is
exp(lse_a - lse)·out_a + exp(lse_b - lse)·out_b. A flash backward needs of the softmax only the probabilities,
exp(score - lse), and the row sums of grad·out. Given the merged lse and the merged output it therefore returns, for
either set alone, exactly that set's share of the gradients (Dao, arXiv 2307.08691, section 3.1.2; ring attention,
arXiv 2310.01889, rests on the same).

Shapes: T tokens, H query heads, K key heads, d head size. Everything is of one row, [T, heads, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tempo_fast.trees.attention_causal import repeat_heads
from tempo_fast.trees.batch import Extent


class Call(NamedTuple):
    """Queries ``q0 .. q1`` over keys ``k0 .. k1``."""

    q0: int
    q1: int
    k0: int
    k1: int


class Kernel(Protocol):
    """Attention over a list of calls, forward and backward apart, so that merging can stand between them."""

    groups: bool
    """Whether it takes fewer key heads than query heads."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """-> out [Q, H, d] and lse [H, Q] float32 (or wider) of the Q queries of all calls, one call after the other.

        ``causal``: queries and keys of a call are the same tokens, and none sees a later one.
        """
        ...

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
        """Write (or ``add``) the calls' share to ``gradients`` (of q, k, v); grad, out [T, H, d] and lse [H, T] are
        those of the merged attention. Tokens that are in no call are left alone."""
        ...


def calls_of(extents: Sequence[Extent]) -> tuple[list[Call], list[Call]]:
    """Of the trees of one row: the causal calls, which cover every token once and in order, and the calls of branches
    over their prompts. A single branch is no exception: each is computed alike whatever stands beside it, so that the
    reference of an answer does not depend, not even in rounding, on the others of its tree."""
    own: list[Call] = []
    cross: list[Call] = []
    for e in extents:
        at = e.start
        for n in (e.prompt, *e.branches):
            own.append(Call(at, at + n, at, at + n))
            at += n
        cross.append(Call(e.answers, e.end, e.start, e.answers))
    return own, cross


class MergedAttention:
    """The attention of one packed row with one kernel: query [1, H, T, d], key and value [1, K, T, d] ->
    [1, T, H, d]."""

    def __init__(self, extents: Sequence[Extent], kernel: Kernel) -> None:
        self.own, self.cross = calls_of(extents)
        self.kernel = kernel

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if not self.kernel.groups:
            key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out: Tensor = _Merged.apply(q, k, v, self, scale)  # type: ignore[no-untyped-call]
        return out[None]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: MergedAttention, scale: float) -> Tensor:
        out, lse = plan.kernel.forward(q, k, v, plan.own, True, scale)
        of_prompts, lse_of_prompts = plan.kernel.forward(q, k, v, plan.cross, False, scale)
        at = 0
        for call in plan.cross:
            here, there = slice(call.q0, call.q1), slice(at, at + call.q1 - call.q0)
            _merge(out[here], lse[:, here], of_prompts[there], lse_of_prompts[:, there])
            at = there.stop
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        plan: MergedAttention = ctx.plan
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for calls, causal in ((plan.own, True), (plan.cross, False)):
            plan.kernel.backward(grads[0], q, k, v, out, lse, calls, causal, ctx.scale, gradients, not causal)
        return *gradients, None, None


def _merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """In place: ``out`` [n, H, d] and ``lse`` [H, n] become those of both sets of keys."""
    both = torch.logaddexp(lse, other_lse)
    mine, theirs = ((x - both).exp().t().unsqueeze(-1) for x in (lse, other_lse))
    out.copy_(mine * out + theirs * other_out)
    lse.copy_(both)


class CpuKernel:
    """torch's flash attention for CPUs, the one scaled_dot_product_attention runs on; every call on views.

    Its own operators, because the public function neither returns a log-sum-exp nor takes one in the backward.
    """

    groups = False

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for q0, q1, k0, k1 in calls:
            out, lse = run(_heads(q[q0:q1]), _heads(k[k0:k1]), _heads(v[k0:k1]), 0.0, causal, scale=scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

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
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        for q0, q1, k0, k1 in calls:
            parts = (grad[q0:q1], q[q0:q1], k[k0:k1], v[k0:k1], out[q0:q1])
            found = run(*(_heads(x) for x in parts), lse[None, :, q0:q1].contiguous(), 0.0, causal, scale=scale)
            for total, part, a, b in zip(gradients, found, (q0, k0, k0), (q1, k1, k1), strict=True):
                share = part[0].transpose(0, 1)
                _ = total[a:b].add_(share) if add else total[a:b].copy_(share)


def _heads(x: Tensor) -> Tensor:
    """[n, heads, d] -> [1, heads, n, d], a view."""
    return x.transpose(0, 1)[None]
