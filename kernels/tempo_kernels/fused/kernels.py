"""The Triton kernels of the loss head. Import this module only where Triton is wanted.

Shapes: N token rows, V vocabulary, D hidden size, a slice of C vocabulary columns; tiles of BN rows x BV columns, BK
of D at a time. Scores are z = x·w (+ bias, then cap·tanh(z / cap)).

Per slice, with S = 2 bytes per element:

    kernel           FLOP       bytes read                 bytes written
    exp_slab         2·N·C·D    S·(N·D + C·D)              S·N·C + 8·N·C/BV
    pair_statistics  2·N·C·D    S·(N·D + C·D)              8·N·C/BV       (reference: 2x FLOP and rows, 20·N·C/BV)
    grad_slab        2·N·C·D    S·(N·D + C·D)              S·N·C          (reference: 2x FLOP and rows)
    accumulate       2·N·C·D    S·(N·C + C·D) + 4·N·D      4·N·D

At N = 4096, C = 4096, D = 3584 each is 120 GFLOP, 0.152 ms at 790 TFLOP/s, against 30 to 180 MB, at most 0.042 ms at
4.3 TB/s, of which the slab stays in the L2 cache: all are bound by the tensor cores as long as N exceeds about 200.

All grids are one-dimensional and persistent. Tiles run over tokens first, so that a tile of the head is read from
memory once and the tokens stay in the L2 cache. Nothing is added atomically: every tile writes sums of its own, which
are added in a fixed order afterwards. Columns beyond the slice count as -inf, not as the zeros of a clipped load.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG = tl.constexpr(-1.0e38)
"""A stand-in for -inf that keeps differences finite."""
VARYING = ("n_rows", "first", "n_cols", "stored_rows", "sums_stride")
"""Integers that change from call to call: no new kernel for each of their divisors."""
ANYWHERE = ("labels_ptr", "sums_ptr", "rounded_ptr")
"""Vectors that may begin at any element: no new kernel for those that begin at 16 bytes."""


@triton.jit
def _capped(z, softcap):
    """softcap·tanh(z / softcap); tanh through the exponential, which cannot overflow here."""
    e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E) / softcap)
    t = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(z < 0, -t, t)


@triton.jit
def _load(source, row0, col0, n_rows, n_cols, stride, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """Tile [BR, BC] of a [n_rows, n_cols] matrix of row stride ``stride``, zeros outside: by descriptor, or (sm_80) by
    pointers."""
    if TMA:
        tile = source.load([row0, col0])
    else:
        # 64-bit arithmetic once per tile; inside a tile 32 bits do
        rows = tl.arange(0, BR)
        cols = col0 + tl.arange(0, BC)
        spot = source + row0.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
        tile = tl.load(spot, mask=(rows < n_rows - row0)[:, None] & (cols < n_cols)[None, :], other=0.0)
    return tile


@triton.jit
def _store(target, tile, row0, col0, n_rows, n_cols, stride, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """Store a tile into a matrix of row stride ``stride``; what lies outside [n_rows, n_cols] is dropped."""
    if TMA:
        target.store([row0, col0], tile)
    else:
        rows = tl.arange(0, BR)
        cols = col0 + tl.arange(0, BC)
        spot = target + row0.to(tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
        tl.store(spot, tile, mask=(rows < n_rows - row0)[:, None] & (cols < n_cols)[None, :])


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def exp_slab_kernel(
    x, w, slab, offset_ptr, labels_ptr, target_ptr, sums_ptr, rounded_ptr,
    n_rows, first, n_cols, d, sums_stride, slab_stride, stored_rows,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, STORE: tl.constexpr, SLAB: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab = exp(x·w − offset) of one slice, its row sums per tile, and the label's score where the label is here.

    x [N, D], w [V, D], slab [stored_rows, C] (rows beyond are dropped), offset and target [N] fp32, labels [N] int,
    sums and rounded [C / BV, N] fp32 (of the exponentials as computed, and as stored).
    """
    tiles_n = tl.cdiv(n_rows, BN)
    tiles = tiles_n * tl.cdiv(n_cols, BV)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row0 = (tile % tiles_n) * BN
        tile_v = tile // tiles_n
        col0 = tile_v * BV
        z = tl.zeros((BN, BV), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(d, BK)):
            a = _load(x, row0, k * BK, n_rows, d, d, BN, BK, TMA)
            b = _load(w, first + col0, k * BK, first + n_cols, d, d, BV, BK, TMA)
            z = tl.dot(a, b.T, z, input_precision=PRECISION)
        rows = row0 + tl.arange(0, BN)
        cols = col0 + tl.arange(0, BV)
        inside = rows < n_rows
        label = tl.load(labels_ptr + rows, mask=inside, other=-1).to(tl.int32) - first
        here = (label >= col0) & (label < col0 + BV) & (label < n_cols)
        if tl.max(here.to(tl.int32), 0) > 0:
            picked = tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), 1)
            tl.store(target_ptr + rows, picked, mask=inside & here)
        offset = tl.load(offset_ptr + rows, mask=inside, other=0.0)
        e = tl.exp2((z - offset[:, None]) * LOG2E)
        e = tl.where((cols < n_cols)[None, :], e, 0.0)
        spot = tile_v.to(tl.int64) * sums_stride + rows
        tl.store(sums_ptr + spot, tl.sum(e, 1), mask=inside)
        if STORE:
            stored = e.to(SLAB)
            # weights must sum to one as they are stored, else their mean is off by the rounding
            tl.store(rounded_ptr + spot, tl.sum(stored.to(tl.float32), 1), mask=inside)
            _store(slab, stored, row0, col0, stored_rows, n_cols, slab_stride, BN, BV, TMA)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def accumulate_kernel(
    a, w, out_ptr, n_rows, first, n_cols, d, stride,
    BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, ADD: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [N, D] fp32 = (out if ADD) + a·w of one slice; a [N, C] of row stride ``stride``, w [V, D]."""
    tiles_n = tl.cdiv(n_rows, BN)
    tiles = tiles_n * tl.cdiv(d, BD)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row0 = (tile % tiles_n) * BN
        d0 = (tile // tiles_n) * BD
        if ADD:
            total = _load(out_ptr, row0, d0, n_rows, d, d, BN, BD, False)
        else:
            total = tl.zeros((BN, BD), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(n_cols, BC)):
            e = _load(a, row0, k * BC, n_rows, n_cols, stride, BN, BC, TMA)
            b = _load(w, first + k * BC, d0, first + n_cols, d, d, BC, BD, TMA)
            total = tl.dot(e, b, total, input_precision=PRECISION)
        _store(out_ptr, total, row0, d0, n_rows, d, d, BN, BD, False)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def pair_statistics_kernel(
    x, r, w, bias_ptr, labels_ptr, target_ptr, ref_target_ptr,
    top_ptr, sums_ptr, ref_top_ptr, ref_sums_ptr, cross_ptr,
    n_rows, first, n_cols, d, sums_stride, softcap,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr, CROSS: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Per tile and row: the largest score and Σ exp(z − largest), of the policy and (PAIR) of the reference; with CROSS
    also Σ exp(z_ref − largest)·(z_ref − z). All [C / BV, N] fp32. Labels' scores go to target and ref_target [N].
    """
    tiles_n = tl.cdiv(n_rows, BN)
    tiles = tiles_n * tl.cdiv(n_cols, BV)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row0 = (tile % tiles_n) * BN
        tile_v = tile // tiles_n
        col0 = tile_v * BV
        z = tl.zeros((BN, BV), dtype=tl.float32)
        q = tl.zeros((BN, BV), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(d, BK)):
            b = _load(w, first + col0, k * BK, first + n_cols, d, d, BV, BK, TMA).T
            a = _load(x, row0, k * BK, n_rows, d, d, BN, BK, TMA)
            z = tl.dot(a, b, z, input_precision=PRECISION)
            if PAIR:
                c = _load(r, row0, k * BK, n_rows, d, d, BN, BK, TMA)
                q = tl.dot(c, b, q, input_precision=PRECISION)
        rows = row0 + tl.arange(0, BN)
        cols = col0 + tl.arange(0, BV)
        inside = rows < n_rows
        valid = cols < n_cols
        if BIAS:
            bias = tl.load(bias_ptr + first + cols, mask=valid, other=0.0).to(tl.float32)
            z += bias[None, :]
            q += bias[None, :]
        if CAP:
            z = _capped(z, softcap)
            q = _capped(q, softcap)
        z = tl.where(valid[None, :], z, NEG)
        label = tl.load(labels_ptr + rows, mask=inside, other=-1).to(tl.int32) - first
        here = (label >= col0) & (label < col0 + BV) & (label < n_cols)
        any_here = tl.max(here.to(tl.int32), 0) > 0
        spot = tile_v.to(tl.int64) * sums_stride + rows
        if any_here:
            picked = tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), 1)
            tl.store(target_ptr + rows, picked, mask=inside & here)
        top = tl.max(z, 1)
        tl.store(top_ptr + spot, top, mask=inside)
        tl.store(sums_ptr + spot, tl.sum(tl.exp2((z - top[:, None]) * LOG2E), 1), mask=inside)
        if PAIR:
            q = tl.where(valid[None, :], q, NEG)
            if any_here:
                picked = tl.sum(tl.where(cols[None, :] == label[:, None], q, 0.0), 1)
                tl.store(ref_target_ptr + rows, picked, mask=inside & here)
            ref_top = tl.max(q, 1)
            e = tl.exp2((q - ref_top[:, None]) * LOG2E)
            tl.store(ref_top_ptr + spot, ref_top, mask=inside)
            tl.store(ref_sums_ptr + spot, tl.sum(e, 1), mask=inside)
            if CROSS:
                tl.store(cross_ptr + spot, tl.sum(e * (q - z), 1), mask=inside)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def grad_slab_kernel(
    x, r, w, slab, bias_ptr, labels_ptr, lse_ptr, ref_lse_ptr, d_logp_ptr, d_kl_ptr,
    n_rows, first, n_cols, d, slab_stride, softcap,
    BN: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, PAIR: tl.constexpr, KL: tl.constexpr, SLAB: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """slab = ∂loss/∂(x·w) of one slice: d_logp·(1[label] − p) + d_kl·(p − q), times 1 − (z / cap)² under a cap.

    The difference p − q is taken before rounding. KL without PAIR (cached statistics) leaves q to the caller.
    """
    tiles_n = tl.cdiv(n_rows, BN)
    tiles = tiles_n * tl.cdiv(n_cols, BV)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        row0 = (tile % tiles_n) * BN
        col0 = (tile // tiles_n) * BV
        z = tl.zeros((BN, BV), dtype=tl.float32)
        q = tl.zeros((BN, BV), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(d, BK)):
            b = _load(w, first + col0, k * BK, first + n_cols, d, d, BV, BK, TMA).T
            a = _load(x, row0, k * BK, n_rows, d, d, BN, BK, TMA)
            z = tl.dot(a, b, z, input_precision=PRECISION)
            if PAIR:
                c = _load(r, row0, k * BK, n_rows, d, d, BN, BK, TMA)
                q = tl.dot(c, b, q, input_precision=PRECISION)
        rows = row0 + tl.arange(0, BN)
        cols = col0 + tl.arange(0, BV)
        inside = rows < n_rows
        valid = cols < n_cols
        if BIAS:
            bias = tl.load(bias_ptr + first + cols, mask=valid, other=0.0).to(tl.float32)
            z += bias[None, :]
            q += bias[None, :]
        if CAP:
            z = _capped(z, softcap)
            q = _capped(q, softcap)
        lse = tl.load(lse_ptr + rows, mask=inside, other=0.0)
        label = tl.load(labels_ptr + rows, mask=inside, other=-1).to(tl.int32) - first
        d_logp = tl.load(d_logp_ptr + rows, mask=inside, other=0.0)
        p = tl.exp2((z - lse[:, None]) * LOG2E)
        g = d_logp[:, None] * (tl.where(cols[None, :] == label[:, None], 1.0, 0.0) - p)
        if KL:
            d_kl = tl.load(d_kl_ptr + rows, mask=inside, other=0.0)
            if PAIR:
                ref_lse = tl.load(ref_lse_ptr + rows, mask=inside, other=0.0)
                p -= tl.exp2((q - ref_lse[:, None]) * LOG2E)
            g += d_kl[:, None] * p
        if CAP:
            t = z / softcap
            g *= 1.0 - t * t
        g = tl.where(valid[None, :] & inside[:, None], g, 0.0)
        _store(slab, g.to(SLAB), row0, col0, n_rows, n_cols, slab_stride, BN, BV, TMA)
