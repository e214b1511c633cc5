"""Which frames, and how large: index and size rules, equal to the ones the models were trained with.

``qwen_vl_utils`` is qwen-vl-utils' rule (linspace and round), ``hf_qwen2_vl`` is transformers'
``Qwen2VLVideoProcessor.sample_frames`` (arange and truncation), ``hf_uniform`` its ``default_sample_indices_fn`` (whole
numbers), ``hf_internvl`` its ``InternVLVideoProcessor.sample_frames`` (the middle of each part), ``hf_qwen3_vl`` its
``Qwen3VLVideoProcessor.sample_frames`` (linspace and round in float64, odd counts too). Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch

from tempo_fast.config import VideoConfig
from tempo_fast.models.family import VideoGeometry

T = TypeVar("T")

RULES = ("qwen_vl_utils", "hf_qwen2_vl", "hf_qwen3_vl", "hf_uniform", "hf_internvl")
_MAX_ASPECT = 200


def _floor_to(x: float, factor: int) -> int:
    return math.floor(x / factor) * factor


def _ceil_to(x: float, factor: int) -> int:
    return math.ceil(x / factor) * factor


def sample_frames(
    rule: str,
    n_total: int,
    fps_source: float,
    *,
    fps: float,
    min_frames: int,
    max_frames: int,
    temporal: int = 2,
) -> list[int]:
    """Indices of the sampled frames, ascending, in [0, n_total).

    The count is n_total / fps_source * fps, clamped to [min_frames, max_frames] and to what the file has, then floored
    to a multiple of ``temporal`` (``hf_qwen3_vl``: to a whole number). A file with fewer than ``temporal`` frames gives
    all of them (the originals refuse).
    transformers' arange can return one index too many, past the last frame, when the step is no binary fraction; that
    one is left out here.

    Args:
        rule: one of ``RULES``.
        n_total: presented frames, >= 1.
        fps_source: average frames per second, > 0.
        fps: wanted frames per second, > 0.
        min_frames, max_frames: bounds on the count.
        temporal: frames per temporal patch.

    Raises:
        ValueError: an unknown rule, or numbers out of range.
    """
    if rule not in RULES:
        raise ValueError(f"unknown sampling rule {rule!r}; known: {', '.join(RULES)}")
    if n_total < 1 or fps_source <= 0 or fps <= 0 or temporal < 1 or not 1 <= min_frames <= max_frames:
        raise ValueError(
            f"sample_frames: n_total {n_total}, fps_source {fps_source}, fps {fps}, frames {min_frames}..{max_frames}"
        )
    if n_total < temporal:
        return list(range(n_total))
    wanted = n_total / fps_source * fps
    if rule == "hf_qwen3_vl":
        n = min(max(int(wanted), min_frames), max_frames, n_total)
        return [round(i * ((n_total - 1) / max(n - 1, 1))) for i in range(n)]
    most = max(temporal, _floor_to(min(max_frames, n_total), temporal))
    if rule == "qwen_vl_utils":
        n = _floor_to(min(max(wanted, _ceil_to(min_frames, temporal)), most), temporal)
    else:
        n = _floor_to(min(max(wanted, min_frames), most), temporal)
    n = max(n, temporal)
    if rule == "qwen_vl_utils":
        return spread(0, n_total, n)
    if rule == "hf_uniform":
        return [i * n_total // n for i in range(n)]
    first = n_total / n / 2 if rule == "hf_internvl" else 0
    indices = torch.arange(first, n_total, n_total / n).int().tolist()
    return [min(i, n_total - 1) for i in indices[:n]]


def spread(start: int, end: int, n: int) -> list[int]:
    """n indices evenly over [start, end): torch's linspace over the closed range, rounded half to even."""
    return torch.linspace(start, end - 1, n).round().long().tolist()


def thin(shown: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of what is shown, evenly chosen, order kept."""
    if len(shown) <= most:
        return list(shown)
    return [shown[i] for i in spread(0, len(shown), most)]


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Nearest size (height, width) in pixels whose sides are multiples of ``factor`` and whose area is in range.

    Aspect ratio is kept as closely as the factor allows; rounding is Python's (half to even), as in both originals.
    No side goes below one factor (qwen-vl-utils; transformers differs for sides of at most half a factor).

    Raises:
        ValueError: a side below 1 pixel, or an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise ValueError(f"frame of {height}x{width} pixels")
    if max(height, width) / min(height, width) > _MAX_ASPECT:
        raise ValueError(f"aspect ratio of {height}x{width} is above {_MAX_ASPECT}")
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, _floor_to(height / beta, factor))
        w = max(factor, _floor_to(width / beta, factor))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = _ceil_to(height * beta, factor), _ceil_to(width * beta, factor)
    return h, w


def video_max_pixels(config: VideoConfig, n_frames: int, geometry: VideoGeometry) -> int:
    """Most pixels of one resized frame: the per-frame cap, lowered to an even share of the total budget.

    qwen-vl-utils' rule: max(min(max_pixels, total_pixels / n_frames * temporal), 1.05 * min_pixels); the budget counts
    temporal patches, so ``temporal`` frames share one frame's worth.
    """
    share = config.total_pixels / max(n_frames, 1) * geometry.temporal
    return int(max(min(config.max_pixels, share), int(config.min_pixels * 1.05)))
