"""Image augmentation of a whole video: one crop, jitter, grey, blur and flip for all of its frames, on any device.

What LeanPO shows for its rejected answers (arXiv 2506.05260; Wang-Xiaodong1899/LLaVA-NeXT,
``scripts/process/self_generate_preference_sample_aug_only.py``), in the same order: a crop of .08 to .3 of the picture
made a square, colour jitter in 8 of 10 videos, grey in 2 of 10, a blur, a flip in every second one. There one state of
torch's generator serves all frames of a video; only the blur's width, which Python's generator draws, differs between
frames, and here it does not. The formulas are those of torchvision's ``transforms.v2.functional`` for tensors; the crop
is resized as every frame of ours is (bicubic; torchvision's default is bilinear).

Shapes: F frames, H and W pixels.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from tempo_fast.video.preprocess import resize

SCALE = (0.08, 0.3)
RATIO = (3 / 4, 4 / 3)  # torchvision's default
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
P_JITTER, P_GREY, P_FLIP = 0.8, 0.2, 0.5
SIGMA = (0.1, 2.0)
_LUMA = (0.2989, 0.587, 0.114)


class Augmentation(NamedTuple):
    """What is done to every frame, in this order.

    The crop [top, top + height) x [left, left + width) in pixels of the decoded frame; ``jitter`` the names and amounts
    of the colour changes, in turn (factors, and for hue a part of the circle); ``grey``; ``sigma`` of the Gaussian blur
    in pixels of the resized crop (0: none); ``flip`` left to right.
    """

    top: int
    left: int
    height: int
    width: int
    jitter: tuple[tuple[str, float], ...] = ()
    grey: bool = False
    sigma: float = 0.0
    flip: bool = False


def draw_augmentation(seed: int, height: int, width: int) -> Augmentation:
    """The augmentation of a video of height x width pixels: nothing but the arguments decides it.

    The crop as torchvision's ``RandomResizedCrop.get_params``: ten tries at an area and a shape, then the middle.
    """
    rng = random.Random(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * rng.random()

    top, left, h, w = _crop(rng, height, width)
    jitter: tuple[tuple[str, float], ...] = ()
    if rng.random() < P_JITTER:
        amounts = {n: uniform(-x, x) if n == "hue" else uniform(1 - x, 1 + x) for n, x in JITTER.items()}
        order = sorted(JITTER, key=lambda name: rng.random())
        jitter = tuple((name, amounts[name]) for name in order)
    return Augmentation(
        top, left, h, w, jitter, rng.random() < P_GREY, uniform(*SIGMA), rng.random() < P_FLIP
    )  # fmt: skip


def _crop(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    for _ in range(10):
        area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * rng.random())
        ratio = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w
    h, w = height, width
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


def augment(frames: Tensor, how: Augmentation, height: int, width: int) -> Tensor:
    """uint8 [F, H, W, 3] -> uint8 [F, height, width, 3] on the frames' device.

    Every step works on bytes, as there. Sums are over whole numbers and products stand alone, so that no device has a
    reason to round otherwise; not run on a GPU yet.

    Raises:
        ValueError: the crop is not inside the frames, or another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"augment takes uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    bottom, right = how.top + how.height, how.left + how.width
    if not (0 <= how.top < bottom <= frames.shape[1] and 0 <= how.left < right <= frames.shape[2]):
        raise ValueError(f"a crop of rows {how.top}..{bottom}, columns {how.left}..{right} of {tuple(frames.shape)}")
    frames = resize(frames[:, how.top : bottom, how.left : right].contiguous(), height, width)
    for name, amount in how.jitter:
        frames = _COLOUR[name](frames, amount)
    if how.grey:
        frames = _luma(frames).byte().expand(-1, -1, -1, 3)
    if how.sigma > 0:
        frames = blur(frames, how.sigma)
    return (frames.flip(2) if how.flip else frames).contiguous()


def _luma(frames: Tensor) -> Tensor:
    """float32 [F, H, W, 1], whole numbers: ``rgb_to_grayscale``, rounded down."""
    r, g, b = frames.float().unbind(-1)
    return (r * _LUMA[0] + g * _LUMA[1] + b * _LUMA[2]).floor().unsqueeze(-1)


def _blend(frames: Tensor, other: Tensor, ratio: float) -> Tensor:
    return (frames.float() * ratio + other * (1.0 - ratio)).clamp(0, 255).byte()


def brightness(frames: Tensor, factor: float) -> Tensor:
    """``adjust_brightness``: every value times ``factor``, cut off to a byte. uint8 [F, H, W, 3] in and out."""
    return (frames.float() * factor).clamp(0, 255).byte()


def contrast(frames: Tensor, factor: float) -> Tensor:
    """``adjust_contrast``: away from (above 1) or towards a frame's mean grey. uint8 [F, H, W, 3] in and out."""
    grey = _luma(frames).long()
    mean = grey.sum((1, 2, 3), keepdim=True).double() / grey[0].numel()
    return _blend(frames, mean.float(), factor)


def saturation(frames: Tensor, factor: float) -> Tensor:
    """``adjust_saturation``: away from (above 1) or towards each pixel's grey. uint8 [F, H, W, 3] in and out."""
    return _blend(frames, _luma(frames), factor)


def hue(frames: Tensor, amount: float) -> Tensor:
    """``adjust_hue``: every hue turned by ``amount`` of the circle (-.5 to .5). uint8 [F, H, W, 3] in and out.

    In HSV, of which only hue changes: with v the largest channel, c = v - smallest, and h the hue in sixths of the
    circle, a channel is v - c * clamp(min(k, 4 - k), 0, 1), k = (n + h) mod 6, n = 5, 3, 1 for red, green and blue.
    """
    r, g, b = frames.float().unbind(-1)
    v, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    c = v - low
    by = torch.where(c == 0, 1.0, c)
    h = torch.where(v == r, (g - b) / by, torch.where(v == g, (b - r) / by + 2, (r - g) / by + 4))
    h = h + 6 * amount
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(h + n, 6)
        channels.append(v - c * torch.minimum(k, 4 - k).clamp(0, 1))
    # from [0, 1] back to bytes as torchvision's to_dtype: times (256 - 1e-3), cut off
    return (torch.stack(channels, -1) * ((256 - 1e-3) / 255)).clamp(0, 255).byte()


_COLOUR = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def blur(frames: Tensor, sigma: float) -> Tensor:
    """``gaussian_blur``: a Gaussian of ``sigma`` pixels, three of them to each side, the border mirrored.

    uint8 [F, H, W, 3] in and out; rounded once, at the end.
    """
    shape, x = frames.shape, frames.float()
    for dim in (1, 2):
        reach = min(math.ceil(3 * sigma), shape[dim] - 1)
        weights = [math.exp(-0.5 * (k / sigma) ** 2) for k in range(-reach, reach + 1)]
        index = torch.arange(-reach, shape[dim] + reach, device=frames.device).abs()
        index = torch.where(index < shape[dim], index, 2 * (shape[dim] - 1) - index)
        padded = x.index_select(dim, index)
        x = torch.zeros_like(x)
        for k, weight in enumerate(weights):
            x = x + padded.narrow(dim, k, shape[dim]) * (weight / sum(weights))
    return x.round().clamp(0, 255).byte()
