"""Running the kernels on the current stream. Shapes as in kernels.py; arguments are checked by the callers."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from tempo_kernels.fused import interpreted
from tempo_kernels.pixels.specs import KERNELS, options, patchify_constants, resize_constants
from tempo_kernels.pixels.taps import Taps


def _launch(kind: str, programs: int, *arguments: Any, **constexprs: Any) -> None:
    if programs:
        KERNELS[kind][(programs,)](*arguments, **constexprs, **options(constexprs))


def _packed_lines(frames: Tensor) -> Tensor:
    """The frames; a copy only where the bytes of a line do not follow each other, as no decoder leaves them."""
    return frames if frames.stride()[2:] == (3, 1) else frames.contiguous()


def patchify(
    frames: Tensor, index: Tensor | None, blank: Tensor | None, shift: Tensor, scale: Tensor, *,
    patch: int, merge: int, temporal: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `tempo_kernels.patchify.patchify`; pixels become (value - shift) / scale, float32 [3] on the CPU; index and
    blank are where the frames are."""
    frames = _packed_lines(frames)
    n_frames, height, width, _ = frames.shape
    n_shown = n_frames if index is None else index.shape[0]
    t, h, w = -(-n_shown // temporal), height // patch, width // patch
    # small enough in the interpreter that tests meet several blocks and strips
    small = {"positions": 64, "large": 64, "strip": 3} if interpreted() else {}
    with_index, with_blank = index is not None, blank is not None
    constexprs = patchify_constants(patch, merge, temporal, index=with_index, blank=with_blank, **small)
    strips, blocks = triton.cdiv(w, constexprs["STRIP"]), triton.cdiv(temporal * patch * patch, constexprs["BLOCK"])
    out = torch.empty(t * h * w, 3 * temporal * patch * patch, dtype=dtype, device=frames.device)
    with torch.cuda.device_of(frames):
        _launch(
            "patchify", t * h * strips * blocks,
            frames, frames if index is None else index.contiguous(),
            frames if blank is None else blank.contiguous().view(torch.uint8), out,
            n_frames, n_shown, h, w, strips, *frames.stride()[:2],
            *shift.tolist(), *scale.tolist(), *(1.0 / scale).tolist(), **constexprs,
        )  # fmt: skip
    return out


def resample(frames: Tensor, dim: int, taps: Taps) -> Tensor:
    """Axis 1 or 2 of uint8 frames [F, H, W, 3], resized; taps on the frames' device."""
    frames = _packed_lines(frames)
    shape, n_out = list(frames.shape), taps.first.shape[0]
    shape[dim] = n_out
    f, height, width, _ = shape
    out = frames.new_empty(shape)
    constexprs = resize_constants(lines=4, block=32) if interpreted() else resize_constants()
    table = (taps.first, taps.weights)
    varying = (taps.weights.shape[0], taps.precision, *frames.stride()[:2])
    blocks = triton.cdiv(3 * width, constexprs["BLOCK"])
    with torch.cuda.device_of(frames):
        if dim == 2:
            programs = blocks * triton.cdiv(f * height, constexprs["LINES"])
            _launch("resize_x", programs, frames, out, *table, f * height, height, n_out, *varying, **constexprs)
        else:
            programs = blocks * triton.cdiv(height, constexprs["LINES"]) * f
            _launch("resize_y", programs, frames, out, *table, n_out, 3 * width, *varying, **constexprs)
    return out
