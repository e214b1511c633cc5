"""Frames to the vision tower's input: normalise, then cut into patches in the order Qwen's processors use.

Shapes: F frames, S frames shown, H and W pixels, p patch side, m merge side, k temporal patch, t = ceil(S / k),
h = H / p, w = W / p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tempo_kernels.pixels import use_triton


def patchify(
    frames: Tensor,
    *,
    patch: int,
    merge: int,
    temporal: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
    blank: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """uint8 frames [F, H, W, 3] (RGB, already resized, any strides) -> [t*h*w, 3*k*p*p] in ``dtype``.

    A pixel becomes (value / 255 - mean) / std, computed in float32 as (value - 255*mean) / (255*std). An incomplete
    last temporal patch is filled with the last frame shown. Rows run over time, then over the m x m merge blocks in
    raster order, then inside each block; a row holds channel, frame, y, x. H and W must be multiples of patch*merge.

    Args:
        index: int64 [S], the frames to show, in this order, repeats allowed; else all, as they come. On the CPU it is
            checked; on CUDA a frame that is not there becomes NaN, so that nobody waits for the device.
        blank: bool [S], frames shown black (value 0); they are not read.
        impl: ``triton`` (CUDA), ``torch`` (any device), or ``auto``: the first where it can. Equal bits.

    Reads 3*S*H*W bytes and writes 3*t*k*H*W elements. Beside the result the torch way needs memory for one temporal
    patch, the kernel none (it copies the bytes of frames whose pixels are not packed, which no decoder makes).

    Raises ValueError for another dtype, shape or impl, or an index outside [0, F).
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"expected uint8 frames [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    f, height, width, _ = frames.shape
    side = patch * merge
    if f == 0 or height == 0 or width == 0 or height % side or width % side:
        raise ValueError(f"frames of {f} x {height} x {width} cannot be cut: sides must be multiples of {side}, F >= 1")
    if index is not None and (index.dtype != torch.int64 or index.ndim != 1 or not len(index)):
        raise ValueError(f"expected int64 index [S] of at least one frame, got {index.dtype} {list(index.shape)}")
    shown = f if index is None else len(index)
    if blank is not None and (blank.dtype != torch.bool or blank.shape != (shown,)):
        raise ValueError(f"expected bool blank [{shown}], got {blank.dtype} {list(blank.shape)}")
    triton = use_triton(frames, impl)
    if index is not None and not (triton and index.is_cuda):
        index = index.cpu()
        least, most = (int(i) for i in index.aminmax())
        if least < 0 or most >= f:
            raise ValueError(f"index {least if least < 0 else most} is outside the {f} frames")
    shift = torch.tensor(mean, dtype=torch.float32) * 255.0
    scale = torch.tensor(std, dtype=torch.float32) * 255.0
    if not triton:
        order = list(range(f)) if index is None else index.tolist()
        dark = [False] * shown if blank is None else blank.tolist()
        return _in_torch(frames, order, dark, shift, scale, patch, merge, temporal, dtype)
    from tempo_kernels.pixels import launch

    index, blank = (None if x is None else x.to(frames.device, non_blocking=True) for x in (index, blank))
    sizes = {"patch": patch, "merge": merge, "temporal": temporal}
    return launch.patchify(frames, index, blank, shift, scale, **sizes, dtype=dtype)


def _in_torch(
    frames: Tensor, order: list[int], dark: list[bool], shift: Tensor, scale: Tensor,
    patch: int, merge: int, temporal: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Each temporal patch is cut as bytes, which is the slow walk through memory, and normalised in place."""
    height, width = frames.shape[1:3]
    t, h, w = -(-len(order) // temporal), height // (patch * merge), width // (patch * merge)
    rows, area = h * w * merge * merge, patch * patch
    out = torch.empty(t * rows, 3 * temporal * area, dtype=dtype, device=frames.device)
    cut = torch.empty(h, w, merge, merge, 3, temporal, patch, patch, dtype=torch.uint8, device=frames.device)
    flat = cut.view(rows, 3, temporal * area)
    floats = None if dtype == torch.float32 else torch.empty_like(flat, dtype=torch.float32)
    shift, scale = shift.to(frames.device)[:, None], scale.to(frames.device)[:, None]
    for i, part in enumerate(out.view(t, *flat.shape)):
        for k in range(temporal):
            at = min(i * temporal + k, len(order) - 1)
            target = cut.select(5, k)
            if dark[at]:
                target.zero_()
                continue
            tiles = frames[order[at]].unflatten(1, (w, merge, patch)).unflatten(0, (h, merge, patch))
            #       0 block row, 1 row in block, 2 y, 3 block column, 4 column in block, 5 x, 6 channel
            target.copy_(tiles.permute(0, 3, 1, 4, 6, 2, 5))
        values = part if floats is None else floats
        values.copy_(flat).sub_(shift).div_(scale)
        if floats is not None:
            part.copy_(floats)
    return out
