"""The Triton kernels of the pixel path. Import this module only where Triton is wanted.

Shapes: F frames, S frames shown, H and W pixels, h and w patches; p patch side, m merge side, k temporal patch. Bytes,
each counted once (what programs read twice they find in the caches), with E bytes per element of the output:

    kernel     bytes read             bytes written               per output element
    patchify   3·S·H·W                3·E·k·ceil(S/k)·H·W         one load of a byte, 6 operations in float32
    resize_x   3·F·H·W                3·F·H·W'                    per tap one load of a byte, one product
    resize_y   3·F·H·W'               3·F·H'·W'                   the same

patchify should be bound by memory. Its loads are single bytes, three apart, but the 32 threads of a warp read
neighbouring pixels and a thread the three channels of its pixels, so that each sector comes once. A resize has about
4·max(1, ratio) taps per axis and works in the caches. Nothing here has been timed on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

VARYING = (
    "n_frames", "n_shown", "patches_y", "patches_x", "strips", "stride_f", "stride_y", "n_lines", "height", "n_out",
    "n_bytes", "taps", "precision",
)  # fmt: skip
"""Integers that change with the video: no new kernel for each of their divisors."""
ANYWHERE = ("frames_ptr", "index_ptr", "blank_ptr")
"""What may begin at any element: no new kernel for what begins at 16 bytes."""


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def patchify_kernel(
    frames_ptr, index_ptr, blank_ptr, out_ptr,
    n_frames, n_shown, patches_y, patches_x, strips, stride_f, stride_y,
    shift_r, shift_g, shift_b, scale_r, scale_g, scale_b, inverse_r, inverse_g, inverse_b,
    PATCH: tl.constexpr, MERGE: tl.constexpr, TEMPORAL: tl.constexpr, BLOCK: tl.constexpr, STRIP: tl.constexpr,
    INDEXED: tl.constexpr, BLANKED: tl.constexpr,
):  # fmt: skip
    """frames [F, H, W, 3] uint8 with packed lines -> out [t·h·w, 3·k·p·p]; index [S] int64, blank [S] uint8.

    A program has BLOCK positions (frame, y, x) of a patch, and takes STRIP patches beside each other, a multiple of
    MERGE: where its positions lie is worked out once, and each patch is a constant further. Frames that index names and
    are not there become NaN.
    """
    POSITIONS: tl.constexpr = TEMPORAL * PATCH * PATCH
    BLOCKS: tl.constexpr = (POSITIONS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    position = (program % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    left = (program // BLOCKS) % strips * STRIP
    patch_y = program // BLOCKS // strips % patches_y
    t = program // BLOCKS // strips // patches_y

    inside = position < POSITIONS
    shown = tl.minimum(t * TEMPORAL + position // (PATCH * PATCH), n_shown - 1)
    frame = shown.to(tl.int64)
    known = inside
    if INDEXED:
        frame = tl.load(index_ptr + shown, mask=inside, other=0)
        known = inside & (frame >= 0) & (frame < n_frames)
    read = known
    if BLANKED:
        read = known & (tl.load(blank_ptr + shown, mask=inside, other=1) == 0)
    y = (patch_y * PATCH + position // PATCH % PATCH).to(tl.int64)
    source = frames_ptr + frame * stride_f + y * stride_y + (left * PATCH + position % PATCH) * 3
    block = (t.to(tl.int64) * (patches_y // MERGE) + patch_y // MERGE) * (patches_x // MERGE) + left // MERGE
    row = (block * MERGE + patch_y % MERGE) * MERGE
    target = out_ptr + row * (3 * POSITIONS) + position
    for i in tl.static_range(STRIP):
        if left + i < patches_x:
            r = _byte(source + i * PATCH * 3, read)
            g = _byte(source + i * PATCH * 3 + 1, read)
            b = _byte(source + i * PATCH * 3 + 2, read)
            if INDEXED:
                r = tl.where(known, r, float("nan"))
                g = tl.where(known, g, float("nan"))
                b = tl.where(known, b, float("nan"))
            further = (i // MERGE * MERGE * MERGE + i % MERGE) * 3 * POSITIONS
            r = _quotient(r - shift_r, scale_r, inverse_r)
            g = _quotient(g - shift_g, scale_g, inverse_g)
            b = _quotient(b - shift_b, scale_b, inverse_b)
            tl.store(target + further, r, mask=inside)
            tl.store(target + further + POSITIONS, g, mask=inside)
            tl.store(target + further + 2 * POSITIONS, b, mask=inside)


@triton.jit
def _byte(pointer, mask):
    return tl.load(pointer, mask=mask, other=0).to(tl.float32)


@triton.jit
def _quotient(a, b, inverse):
    """a / b, correctly rounded, as torch has it; inverse = 1 / b, correctly rounded.

    Two corrections by the exact remainder (Markstein 1990): the first leaves less than a unit in the last place, from
    where the second is exact. A division by itself would compute the reciprocal again for every pixel.
    """
    q = a * inverse
    q = tl.fma(tl.fma(-q, b, a), inverse, q)
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def _to_byte(total, precision):
    """Fixed point to uint8: the half that rounds is in ``total`` already."""
    return tl.minimum(tl.maximum(total >> precision, 0), 255).to(tl.uint8)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def resize_x_kernel(
    frames_ptr, out_ptr, first_ptr, weights_ptr, n_lines, height, n_out, taps, precision, stride_f, stride_y,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """frames [F, height, W, 3] uint8 with packed lines -> out [F·height, n_out, 3]; see `taps.Taps` for first [n_out]
    and weights [taps, n_out]. A program has LINES lines x BLOCK bytes of the output, so that weights serve all lines.
    """
    blocks = tl.cdiv(3 * n_out, BLOCK)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    line = tl.program_id(0) // blocks * LINES + tl.arange(0, LINES)
    column = place // 3
    valid = place < 3 * n_out
    both = (line < n_lines)[:, None] & valid[None, :]
    first = tl.load(first_ptr + column, mask=valid, other=0)
    start = frames_ptr + (line // height).to(tl.int64) * stride_f + (line % height).to(tl.int64) * stride_y
    source = start[:, None] + (first * 3 + place % 3)[None, :]
    total = tl.zeros((LINES, BLOCK), dtype=tl.int32) + (1 << (precision - 1))
    for k in tl.range(0, taps):
        weight = tl.load(weights_ptr + k * n_out + column, mask=valid, other=0).to(tl.int32)
        total += weight[None, :] * tl.load(source + 3 * k, mask=both, other=0).to(tl.int32)
    target = out_ptr + line.to(tl.int64)[:, None] * (3 * n_out) + place[None, :]
    tl.store(target, _to_byte(total, precision), mask=both)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=ANYWHERE)
def resize_y_kernel(
    frames_ptr, out_ptr, first_ptr, weights_ptr, n_out, n_bytes, taps, precision, stride_f, stride_y,
    LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """frames [F, H, n_bytes] uint8 with packed lines -> out [F, n_out, n_bytes]; a program has LINES x BLOCK of it."""
    blocks = tl.cdiv(n_bytes, BLOCK)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    line_blocks = tl.cdiv(n_out, LINES)
    line = tl.program_id(0) // blocks % line_blocks * LINES + tl.arange(0, LINES)
    frame = (tl.program_id(0) // blocks // line_blocks).to(tl.int64)
    valid = line < n_out
    both = valid[:, None] & (place < n_bytes)[None, :]
    first = tl.load(first_ptr + line, mask=valid, other=0).to(tl.int64)
    source = (frames_ptr + frame * stride_f + first * stride_y)[:, None] + place[None, :]
    total = tl.zeros((LINES, BLOCK), dtype=tl.int32) + (1 << (precision - 1))
    for k in tl.range(0, taps):
        weight = tl.load(weights_ptr + k * n_out + line, mask=valid, other=0).to(tl.int32)
        total += weight[:, None] * tl.load(source, mask=both, other=0).to(tl.int32)
        source += stride_y
    target = out_ptr + (frame * n_out + line)[:, None] * n_bytes + place[None, :]
    tl.store(target, _to_byte(total, precision), mask=both)
