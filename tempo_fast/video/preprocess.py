"""Decoded frames to model input: one route for every decoder, bytes until the last step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_fast.models.family import VideoGeometry


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 [F, H, W, 3] -> uint8 [F, height, width, 3]: bicubic with antialias.

    What torch's uint8 operator makes of it on the CPU, which is what the Hugging Face processors run (pixels equal to
    1e-6 after normalising). It is called on frames as they lie in memory, channels last: the same bytes as from
    contiguous channels, several times faster. Other devices run the same integer arithmetic, bit for bit. Raises
    ValueError for another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"resize takes uint8 [F, H, W, 3], got {frames.dtype} {tuple(frames.shape)}")
    if frames.shape[1:3] == (height, width):
        return frames
    if frames.device.type != "cpu":
        from tempo_kernels.resize import resize as resize_exactly

        return resize_exactly(frames, height, width)
    x = frames.contiguous().permute(0, 3, 1, 2)
    y = F.interpolate(x, size=(height, width), mode="bicubic", antialias=True)
    return y.permute(0, 2, 3, 1).contiguous()


def fit(frames: Tensor, height: int, width: int, *, crop: bool) -> Tensor:
    """uint8 [F, H, W, 3] -> uint8 [F, height, width, 3].

    Without ``crop`` both sides are resized. With it the frame keeps its shape: it is made just large enough to cover
    the target and the middle is cut out (transformers' ``shortest_edge`` and ``center_crop``: the longer side and the
    offset are rounded down).
    """
    if not crop:
        return resize(frames, height, width)
    h, w = frames.shape[1:3]
    scale_h, scale_w = (height, int(height * w / h)) if h * width <= w * height else (int(width * h / w), width)
    frames = resize(frames, scale_h, scale_w)
    top, left = (scale_h - height) // 2, (scale_w - width) // 2
    return frames[:, top : top + height, left : left + width]


def to_patches(
    frames: Tensor,
    geometry: VideoGeometry,
    dtype: torch.dtype = torch.float32,
    *,
    index: Tensor | None = None,
    blank: Tensor | None = None,
) -> Tensor:
    """uint8 [F, H, W, 3], sides multiples of the geometry's factor -> [P, 3 * temporal * patch * patch] normalised.

    Where the geometry has a ``side`` each frame is a row, [F, 3 * side * side]: channel, y, x. ``index`` (int64 [S],
    repeats allowed) says which frames are shown and in which order, ``blank`` (bool [S]) which of them are black: see
    ``tempo_kernels.patchify``. Raises ValueError for another dtype or shape.
    """
    from tempo_kernels.patchify import patchify

    return patchify(
        frames,
        patch=geometry.side or geometry.patch,
        merge=1 if geometry.side else geometry.merge,
        temporal=geometry.temporal,
        mean=geometry.mean,
        std=geometry.std,
        dtype=dtype,
        index=index,
        blank=blank,
    )
