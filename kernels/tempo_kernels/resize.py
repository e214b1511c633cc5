"""Bicubic resizing of bytes with antialias, in the integer arithmetic of torch's CPU operator, on any device.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tempo_kernels.pixels import use_triton
from tempo_kernels.pixels.taps import Taps, taps_on


def resize(frames: Tensor, height: int, width: int, *, impl: str = "auto") -> Tensor:
    """uint8 frames [F, H, W, 3] -> uint8 [F, height, width, 3].

    Bit for bit what ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)`` makes of bytes on a CPU, in
    either memory format, which is what the Hugging Face processors run: columns first, then rows, each with int16
    weights, rounded and clamped to bytes in between; an axis that keeps its size is left alone. (Where torch itself
    differs it is wrong: on CPUs without AVX2 its contiguous format mixes up the channels of frames that become one
    pixel wide; with AVX2 it refuses to make a single pixel of them.)

    Beyond the result, memory for one uint8 [F, H, width, 3]. ``impl``: ``triton`` (CUDA), ``torch`` (any device,
    slower), or ``auto``. Raises ValueError for another dtype, shape or impl, or an empty size.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"resize takes uint8 frames [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    if min(height, width, *frames.shape[1:3]) < 1:
        raise ValueError(f"frames of {frames.shape[1]} x {frames.shape[2]} cannot be made {height} x {width}")
    if use_triton(frames, impl):
        from tempo_kernels.pixels.launch import resample
    else:
        resample = _resample
    for dim, size in ((2, width), (1, height)):
        if frames.shape[dim] != size:
            frames = resample(frames, dim, taps_on(frames.shape[dim], size, frames.device))
    return frames


def _resample(frames: Tensor, dim: int, taps: Taps) -> Tensor:
    """One axis of [F, H, W, 3] in int32, frame by frame."""
    shape = list(frames.shape)
    shape[dim] = taps.first.shape[0]
    out = frames.new_empty(shape)
    weights = taps.weights.int().view(-1, *[shape[1] if dim == 1 else 1, shape[2] if dim == 2 else 1, 1])
    for frame, target in zip(frames, out, strict=True):
        total = torch.full(shape[1:], 1 << (taps.precision - 1), dtype=torch.int32, device=frames.device)
        for k, weight in enumerate(weights):
            total += frame.index_select(dim - 1, taps.first + k).int() * weight
        target.copy_((total >> taps.precision).clamp_(0, 255))
    return out
