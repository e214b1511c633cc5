"""The weights of a resize: which inputs make an output, in fixed point. No Triton."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """How one axis is resized: output i is the sum over k of weights[k, i] times input first[i] + k, in fixed point."""

    first: Tensor
    """int32 [n_out]; every first[i] + k lies inside the input."""
    weights: Tensor
    """int16 [taps, n_out], in units of 2^-precision."""
    precision: int


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
def taps_on(n_in: int, n_out: int, device: torch.device) -> Taps:
    """`make_taps` on a device, kept for the sizes of a run."""
    first, weights, precision = make_taps(n_in, n_out)
    return Taps(first.to(device), weights.to(device), precision)
