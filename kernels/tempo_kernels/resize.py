"""Bicubic resizing of bytes with antialias, in the integer arithmetic of torch's CPU operator, on any device.

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from tempo_kernels.pixels import use_triton


class Taps(NamedTuple):
    """How one axis is resized: output i is the sum over k of weights[k, i] times input first[i] + k, in fixed point."""

    first: Tensor
    """int32 [n_out]; every first[i] + k lies inside the input."""
    weights: Tensor
    """int16 [taps, n_out], in units of 2^-precision."""
    precision: int


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
            frames = resample(frames, dim, _taps_on(frames.shape[dim], size, frames.device))
    return frames


def make_taps(n_in: int, n_out: int) -> Taps:
    """The weights of one axis as torch's CPU operator has them (its ``UpSampleKernel.cpp``), on the CPU.

    Keys' cubic kernel with a = -0.5, stretched by the ratio where that exceeds 1; float64, normalised to a sum of 1,
    then int16 in the largest precision (at most 22 bits) that holds the largest weight, halves away from zero.
    """
    ratio = n_in / n_out
    stretch = max(ratio, 1.0)
    support = 2.0 * stretch
    center = ratio * (torch.arange(n_out, dtype=torch.float64) + 0.5)
    start = (center - support + 0.5).long().clamp_(min=0)
    end = torch.minimum((center + support + 0.5).long().clamp_(max=n_in), start + 2 * math.ceil(support) + 1)
    taps = int((end - start).max())
    first = start.clamp(max=n_in - taps)
    place = first[:, None] + torch.arange(taps)
    x = (place - center[:, None] + 0.5).mul_(1.0 / stretch).abs_()
    a = -0.5
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weights = torch.where((place >= start[:, None]) & (place < end[:, None]), weights, 0.0)
    weights /= weights.cumsum(1)[:, -1:]
    largest = float(weights.max())
    precision = next((p for p in range(22) if int(0.5 + largest * 2 ** (p + 1)) >= 2**15), 22)
    scaled = weights * 2**precision
    rounded = torch.where(scaled < 0, scaled - 0.5, scaled + 0.5).trunc()
    return Taps(first.int(), rounded.to(torch.int16).T.contiguous(), precision)


@functools.lru_cache(maxsize=256)
def _taps_on(n_in: int, n_out: int, device: torch.device) -> Taps:
    first, weights, precision = make_taps(n_in, n_out)
    return Taps(first.to(device), weights.to(device), precision)


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
