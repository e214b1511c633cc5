"""Running the kernels: the Triton backend's `sweep_head`, `sweep_pair`, `pair_forward` and `pair_backward`.

Shapes as in kernels.py. Everything is enqueued on the current stream; `sweep_*` reads one flag back at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from tempo_kernels.fused import interpreted
from tempo_kernels.fused.specs import KERNELS, constants, options
from tempo_kernels.fused.tiles import ROWS, Tile, architecture, slice_width, tile_of
from tempo_kernels.pairs import PairStats
from tempo_kernels.sweep import LARGEST, Swept

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4 has no host descriptors: pointers then
    TensorDescriptor = None

T = TypeVar("T")
PROBE = 256
"""Columns whose largest score bounds a row's offset from below."""
HALF_MARGIN = 8.0
"""float16 slabs hold exp(z − lse + 8): at most e^8, and probabilities down to 2e-11 before they vanish."""


class _Plan:
    """Device facts and tiles for one call."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        if interpreted():
            # few programs, so that each has several tiles
            self.programs, self.row = 3, "interpreter"
        else:
            properties = torch.cuda.get_device_properties(weight.device)
            self.programs = properties.multi_processor_count
            self.row = architecture((properties.major, properties.minor))
        aligned = weight.shape[1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
        self.tma = TensorDescriptor is not None and self.row != "sm80" and aligned

    def tile(self, kind: str, cap: bool = False) -> Tile:
        return tile_of(self.row, kind, cap)

    def matrix(self, t: Tensor, rows: int, cols: int) -> Any:
        """A kernel argument for row-major t, read or written in tiles [rows, cols]."""
        return TensorDescriptor.from_tensor(t, [rows, cols]) if self.tma else t

    def launch(self, kind: str, n_rows: int, n_cols: int, *arguments: Any, **flags: bool) -> None:
        """Run a kernel over [n_rows, n_cols]."""
        tile = self.tile(kind, flags.get("cap", False))
        programs = min(self.programs, triton.cdiv(n_rows, tile.rows) * triton.cdiv(n_cols, tile.cols))
        constexprs = constants(kind, tile, self.weight.dtype, self.tma, **flags)
        KERNELS[kind][(programs,)](*arguments, **constexprs, **options(tile))


def _slices(vocabulary: int, width: int) -> list[tuple[int, int]]:
    """(first column, columns) of each slice."""
    return [(first, min(width, vocabulary - first)) for first in range(0, vocabulary, width)]


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows are contiguous and start where TMA can read them."""
    # a single row counts as contiguous whatever its stride, which a descriptor reads all the same
    x = x.contiguous().view(-1).view(x.shape)
    return x.clone() if x.data_ptr() % 16 else x


def _on_its_device(function: Callable[..., T]) -> Callable[..., T]:
    """Triton launches on the current device, whatever device the tensors are on."""

    @functools.wraps(function)
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> T:
        with torch.cuda.device_of(hidden):
            return function(hidden, *args, **kwargs)

    return run


def _slab(plan: _Plan, rows: int, width: int) -> Tensor:
    # rows of a slab start at multiples of 16 bytes: width is a multiple of a tile
    return plan.weight.new_empty(rows, width)


# -- one pass ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@_on_its_device
def sweep_head(hidden: Tensor, weight: Tensor, labels: Tensor, *, want_mean: bool) -> Swept:
    """logsumexp, label score (0 where the label lies outside) and (``want_mean``) mean head row of every token.

    hidden [N, D] and weight [V, D] of one dtype, labels [N]; float32 results. Deterministic.
    """
    return _sweep([hidden], weight, labels, [want_mean])[0]


@torch.no_grad()
@_on_its_device
def sweep_pair(
    hidden: Tensor, reference: Tensor, weight: Tensor, labels: Tensor, *, want_mean: bool, want_ref_mean: bool
) -> tuple[Swept, Swept]:
    """`sweep_head` of policy and reference [N, D] with one read of the head; equal rows give equal bits."""
    if want_ref_mean and not want_mean:
        want_mean = True  # stored rows come first in a slab
    policy, ref = _sweep([hidden, reference], weight, labels, [want_mean, want_ref_mean])
    return policy, ref


def _sweep(parts: Sequence[Tensor], weight: Tensor, labels: Tensor, want: Sequence[bool]) -> list[Swept]:
    n, d = parts[0].shape
    results = [
        Swept(
            torch.empty(n, dtype=torch.float32, device=weight.device),
            torch.zeros(n, dtype=torch.float32, device=weight.device),
            torch.empty(n, d, dtype=torch.float32, device=weight.device) if wanted else None,
        )
        for wanted in want
    ]
    if n == 0:
        return results
    plan, labels = _Plan(weight), labels.contiguous()
    half = weight.dtype == torch.float16
    height = max(1, ROWS // len(parts))
    blocks = [slice(start, min(start + height, n)) for start in range(0, n, height)]
    totals = []
    for block in blocks:
        # one matmul per part: equal parts must meet equal shapes, and equal layouts
        xs = [_aligned(part[block]) for part in parts]
        find = _safe_offset if half and any(want) else _offset
        offsets = [find(plan, x, labels[block]) for x in xs]
        totals.append(_sweep_block(plan, xs, labels[block], offsets, [_rows(r, block) for r in results]))
    overflowed = torch.stack([(total > LARGEST).any() for total in totals])  # a NaN row beside it hides none
    if bool(overflowed.any()):
        for block, again in zip(blocks, overflowed.tolist(), strict=True):
            if again:
                xs = [_aligned(part[block]) for part in parts]
                offsets = [_safe_offset(plan, x, labels[block]) for x in xs]
                _sweep_block(plan, xs, labels[block], offsets, [_rows(r, block) for r in results])
    return results


def _rows(swept: Swept, block: slice) -> Swept:
    return Swept(swept.lse[block], swept.target[block], None if swept.mean is None else swept.mean[block])


def _offset(plan: _Plan, x: Tensor, labels: Tensor) -> Tensor:
    """[B] about the largest of the label's score and the first scores: exp(z − offset) overflows only for a label of
    probability below e^-60 that is also that far below some other token."""
    head = plan.weight
    probe = torch.mm(x, head[:PROBE].T).float().amax(1)
    inside = (labels >= 0) & (labels < head.shape[0])
    own = (x * head[labels.clamp(0, head.shape[0] - 1)]).sum(1, dtype=torch.float32)
    return torch.where(inside, torch.maximum(probe, own), probe)


def _safe_offset(plan: _Plan, x: Tensor, labels: Tensor) -> Tensor:
    """[B] the row's logsumexp, by a pass of its own."""
    lse = _statistics(plan, x, None, labels, None, None, False).lse
    return lse - HALF_MARGIN if plan.weight.dtype == torch.float16 else lse


def _sweep_block(
    plan: _Plan, xs: Sequence[Tensor], labels: Tensor, offsets: Sequence[Tensor], into: Sequence[Swept]
) -> Tensor:
    """Fill `into`, one per part of rows [B, D]; returns the sums [B * parts], which say whether anything overflowed."""
    weight, tile = plan.weight, plan.tile("exp_slab")
    vocabulary, d = weight.shape
    height = xs[0].shape[0]
    if len(xs) == 1:
        x, offset, pitch = xs[0], offsets[0], height
    else:
        # every part starts at a tile: equal rows then meet equal arithmetic whatever the matmul's inner order
        pitch = triton.cdiv(height, tile.rows) * tile.rows
        x, offset = xs[0].new_zeros(len(xs) * pitch, d), offsets[0].new_zeros(len(xs) * pitch)
        for i, (part, its_offset) in enumerate(zip(xs, offsets, strict=True)):
            x[i * pitch : i * pitch + height], offset[i * pitch : i * pitch + height] = part, its_offset
        labels = torch.nn.functional.pad(labels, (0, pitch - height), value=-1).repeat(len(xs))
    rows = x.shape[0]
    target = torch.zeros_like(offset)
    wanted = sum(r.mean is not None for r in into)
    stored = 0 if not wanted else (wanted - 1) * pitch + height
    width = slice_width(rows, vocabulary, tile, plan.programs, weight.element_size())
    slab = _slab(plan, max(stored, 1), width)
    tiles_v = triton.cdiv(vocabulary, tile.cols)
    sums = offset.new_empty(tiles_v, rows)
    rounded = offset.new_empty(tiles_v if stored else 1, rows)
    x_arg, w_arg = plan.matrix(x, tile.rows, tile.depth), plan.matrix(weight, tile.cols, tile.depth)
    for first, n_cols in _slices(vocabulary, width):
        t = first // tile.cols
        # rows beyond the slab are clipped: a reference whose mean nobody asked for is not stored
        plan.launch(
            "exp_slab", rows, n_cols,
            x_arg, w_arg, plan.matrix(slab[:, :n_cols], tile.rows, tile.cols), offset, labels, target,
            sums[t:], rounded[t:] if stored else rounded,
            rows, first, n_cols, d, rows, width, stored, store=bool(stored),
        )  # fmt: skip
        if stored:
            for i, result in enumerate(into):
                if result.mean is not None:
                    _accumulate(plan, slab[i * pitch : i * pitch + height, :n_cols], first, result.mean, first > 0)
    total = sums.sum(0)
    lse = offset + torch.log(total)
    weights = rounded.sum(0) if stored else total
    for i, result in enumerate(into):
        its = slice(i * pitch, i * pitch + height)
        result.lse.copy_(lse[its])
        result.target.copy_(target[its])
        if result.mean is not None:
            result.mean.div_(weights[its, None])
    return total


def _accumulate(plan: _Plan, a: Tensor, first: int, out: Tensor, add: bool) -> None:
    """out [B, D] float32 = (out if add) + a [B, C] · weight[first : first + C]."""
    n_cols, d = a.shape[1], plan.weight.shape[1]
    if _library_accumulates(a):
        head = plan.weight[first : first + n_cols]
        if add:
            torch.addmm(out, a, head, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, head, out_dtype=torch.float32, out=out)
        return
    tile = plan.tile("accumulate")
    plan.launch(
        "accumulate", a.shape[0], d,
        plan.matrix(a, tile.rows, tile.depth), plan.matrix(plan.weight, tile.depth, tile.cols), out,
        a.shape[0], first, n_cols, d, a.stride(0), add=add,
    )  # fmt: skip


def _library_accumulates(a: Tensor) -> bool:
    """cuBLAS sums 16-bit products into float32 since torch 2.8; for a plain GEMM the library goes before our kernel."""
    return a.is_cuda and a.dtype != torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out")


# -- two passes -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@_on_its_device
def pair_forward(
    hidden: Tensor, reference: Tensor | None, weight: Tensor, labels: Tensor, bias: Tensor | None,
    softcap: float | None, want_kl: bool,
) -> PairStats:  # fmt: skip
    """logsumexp and label score of policy and reference, and Σ q (z_q − z_p) for the KL; see `pairs.pair_forward`."""
    return _statistics(_Plan(weight), hidden, reference, labels, bias, softcap, want_kl)


def _statistics(
    plan: _Plan, x: Tensor, reference: Tensor | None, labels: Tensor, bias: Tensor | None, softcap: float | None,
    want_kl: bool,
) -> PairStats:  # fmt: skip
    weight, (n, d) = plan.weight, x.shape
    pair = reference is not None
    cross = pair and want_kl
    kind = "pair_statistics" if pair else "statistics"
    tile = plan.tile(kind, softcap is not None)
    vocabulary = weight.shape[0]
    tiles_v = triton.cdiv(vocabulary, tile.cols)
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    x = _aligned(x)
    r = x if reference is None else _aligned(reference)

    def buffer(wanted: bool) -> Tensor:
        return torch.empty(tiles_v if wanted else 1, max(n, 1), dtype=torch.float32, device=weight.device)

    top, sums, ref_top, ref_sums, crosses = (buffer(w) for w in (True, True, pair, pair, cross))
    target = torch.zeros(n, dtype=torch.float32, device=weight.device)
    ref_target = torch.zeros_like(target)
    if n:
        plan.launch(
            kind, n, vocabulary,
            plan.matrix(x, tile.rows, tile.depth), plan.matrix(r, tile.rows, tile.depth),
            plan.matrix(weight, tile.cols, tile.depth), weight if bias is None else bias, labels, target, ref_target,
            top, sums, ref_top, ref_sums, crosses, n, 0, vocabulary, d, top.shape[1], softcap or 1.0,
            cross=cross, bias=bias is not None, cap=softcap is not None,
        )  # fmt: skip
    top, sums = top[:, :n], sums[:, :n]
    lse = torch.logsumexp(top + torch.log(sums), 0)
    if not pair:
        return PairStats(lse, target, None, None, None)
    ref_top, ref_sums = ref_top[:, :n], ref_sums[:, :n]
    ref_lse = torch.logsumexp(ref_top + torch.log(ref_sums), 0)
    total = (torch.exp(ref_top - ref_lse) * crosses[:, :n]).sum(0) if cross else None
    return PairStats(lse, target, ref_lse, ref_target, total)


@torch.no_grad()
@_on_its_device
def pair_backward(
    hidden: Tensor, reference: Tensor | None, weight: Tensor, labels: Tensor, bias: Tensor | None,
    softcap: float | None, lse: Tensor, ref_lse: Tensor | None, d_logp: Tensor, d_kl: Tensor | None, *,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of hidden (float32), weight and bias (their dtypes); see `pairs.pair_backward`."""
    plan = _Plan(weight)
    (n, d), vocabulary = hidden.shape, weight.shape[0]
    d_hidden = torch.zeros(n, d, dtype=torch.float32, device=weight.device) if want_hidden else None
    d_weight = torch.empty_like(weight) if want_weight else None
    d_bias = None if bias is None or not want_bias else torch.zeros_like(bias)
    if n == 0:
        return d_hidden, None if d_weight is None else d_weight.zero_(), d_bias
    # the kernels read vectors without strides
    labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
    lse, ref_lse = lse.contiguous(), None if ref_lse is None else ref_lse.contiguous()
    d_logp = d_logp.float().contiguous()
    d_kl = None if d_kl is None else d_kl.float().contiguous()
    scale = None
    if weight.dtype == torch.float16:  # small gradients would vanish in a float16 slab
        scale = d_logp.abs().max() if d_kl is None else torch.maximum(d_logp.abs().max(), d_kl.abs().max())
        # a power of two, so that scaling rounds nothing
        scale = torch.where(scale > 0, torch.exp2(torch.ceil(torch.log2(scale))), torch.ones_like(scale))
        d_logp = d_logp / scale
        d_kl = None if d_kl is None else d_kl / scale
    factor = float(scale) if scale is not None and want_weight else 1.0
    pair = reference is not None and d_kl is not None
    kind = "pair_gradient" if pair else "gradient"
    tile = plan.tile(kind, softcap is not None)
    x = _aligned(hidden)
    r = _aligned(reference) if pair and reference is not None else x
    width = slice_width(n, vocabulary, tile, plan.programs, weight.element_size())
    slab = _slab(plan, n, width)
    x_arg, r_arg = plan.matrix(x, tile.rows, tile.depth), plan.matrix(r, tile.rows, tile.depth)
    w_arg = plan.matrix(weight, tile.cols, tile.depth)
    for first, n_cols in _slices(vocabulary, width):
        plan.launch(
            kind, n, n_cols,
            x_arg, r_arg, w_arg, plan.matrix(slab[:, :n_cols], tile.rows, tile.cols),
            weight if bias is None else bias, labels, lse, lse if ref_lse is None else ref_lse, d_logp,
            d_logp if d_kl is None else d_kl, n, first, n_cols, d, width, softcap or 1.0,
            kl=d_kl is not None, bias=bias is not None, cap=softcap is not None,
        )  # fmt: skip
        g = slab[:, :n_cols]
        if d_hidden is not None:
            _accumulate(plan, g, first, d_hidden, first > 0)
        if d_weight is not None:
            part = d_weight[first : first + n_cols]
            # scaled before it is rounded: float16 ends at 65504
            torch.addmm(part, g.T, x, beta=0, alpha=factor, out=part)
        if d_bias is not None:
            total = g.sum(0, dtype=torch.float32)
            d_bias[first : first + n_cols] = total if scale is None else total * scale
    if d_hidden is not None and scale is not None:
        d_hidden.mul_(scale)
    return d_hidden, d_weight, d_bias
