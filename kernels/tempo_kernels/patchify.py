"""Frames to the vision tower's input: normalise, then cut into patches in the order Qwen's processors use.

Shapes: F frames, H and W pixels, p patch side, m merge side, k temporal patch, t = ceil(F / k), h = H / p, w = W / p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def patchify(
    frames: Tensor,
    *,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 frames [F, H, W, 3] (RGB, already resized) -> [t*h*w, 3*k*p*p] in ``dtype``.

    A pixel becomes (value / 255 - mean) / std, computed in float32 as (value - 255*mean) / (255*std). An incomplete
    last temporal patch is filled with the last frame. Rows run over time, then over the m x m merge blocks in raster
    order, then inside each block; a row holds channel, frame, y, x. H and W must be multiples of patch*merge.
    Raises ValueError for another dtype or shape.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    f, height, width, _ = frames.shape
    side = patch * merge
    if f == 0 or height == 0 or width == 0 or height % side or width % side:
        raise ValueError(f"frames of {f} x {height} x {width} cannot be cut: sides must be multiples of {side}, F >= 1")
    if missing := -f % temporal:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    scale = torch.tensor(std, dtype=torch.float32, device=frames.device) * 255.0
    shift = torch.tensor(mean, dtype=torch.float32, device=frames.device) * 255.0
    pixels = (frames.to(torch.float32) - shift) / scale
    t, h, w = frames.shape[0] // temporal, height // side, width // side
    cut = pixels.view(t, temporal, h, merge, patch, w, merge, patch, 3)
    #      0 time, 1 frame, 2 block row, 3 row in block, 4 y, 5 block column, 6 column in block, 7 x, 8 channel
    rows = cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w * merge * merge, 3 * temporal * patch * patch)
    return rows.to(dtype)
