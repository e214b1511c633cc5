"""Pixels against independent re-derivations: Pillow's bicubic, and patches cut with plain loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tempo_fast.models.family import VideoGeometry
from tempo_fast.video.preprocess import resize, to_patches


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# Up and down, odd sizes, one side only.
@pytest.mark.parametrize(
    "source, target", [((64, 96), (56, 84)), ((37, 53), (56, 84)), ((120, 90), (28, 28)), ((56, 91), (56, 84))]
)
def test_resize_is_pillows_bicubic_up_to_its_rounding(source, target):
    frames = _noise(1, 3, *source, 3)
    got = resize(frames, *target)
    assert got.dtype == torch.uint8 and got.shape == (3, *target, 3)
    for a, b in zip(frames.numpy(), got.numpy(), strict=True):
        want = np.asarray(Image.fromarray(a).resize(target[::-1], Image.Resampling.BICUBIC))
        off = np.abs(b.astype(int) - want.astype(int))  # both work in fixed point, with a rounding after each axis
        assert off.max() <= 2 and off.mean() < 0.05


def test_resize_to_the_same_size_is_the_same():
    frames = _noise(2, 2, 56, 84, 3)
    assert torch.equal(resize(frames, 56, 84), frames)


def test_resize_treats_frames_one_by_one():
    frames = _noise(3, 5, 60, 70, 3)
    together = resize(frames, 28, 56)
    assert all(torch.equal(resize(frames[i : i + 1], 28, 56)[0], together[i]) for i in range(5))


# Up, down, one axis, sides of a pixel, an odd crop of larger frames.
@pytest.mark.parametrize(
    "source, target", [((64, 96), (57, 131)), ((37, 53), (37, 28)), ((5, 1), (9, 3)), ((1, 7), (2, 5))]
)
def test_resize_is_torchs_of_contiguous_channels_too(source, target):
    """As the Hugging Face processors call it; ours is called on channels last, which is faster."""
    whole = _noise(5, 3, source[0] + 2, source[1] + 4, 3)
    for frames in (whole[:, 1:-1, 2:-2], whole[:, 1:-1, 2:-2].contiguous()):
        x = frames.permute(0, 3, 1, 2).contiguous()
        theirs = torch.nn.functional.interpolate(x, size=target, mode="bicubic", antialias=True)
        got = resize(frames, *target)
        assert got.is_contiguous() and torch.equal(got.permute(0, 3, 1, 2), theirs)


@pytest.mark.parametrize("source, target", [((64, 96), (56, 84)), ((33, 47), (84, 56))])
def test_resize_on_other_devices_is_the_same_arithmetic(source, target):
    """The way a device without the CPU's operator takes, run here."""
    from tempo_kernels.resize import resize as on_a_device

    frames = _noise(6, 2, *source, 3)
    assert torch.equal(on_a_device(frames, *target), resize(frames, *target))


def test_chosen_and_black_frames():
    geometry = VideoGeometry(4, 2, 2, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    frames, index, blank = _noise(7, 4, 8, 16, 3), torch.tensor([3, 0, 0]), torch.tensor([False, True, False])
    copied = frames[index]
    copied[1] = 0
    got = to_patches(frames, geometry, torch.bfloat16, index=index, blank=blank)
    assert got.dtype == torch.bfloat16 and torch.equal(got, to_patches(copied, geometry, torch.bfloat16))


def test_resize_refuses_floats():
    with pytest.raises(ValueError, match="uint8"):
        resize(torch.zeros(1, 8, 8, 3), 4, 4)


@pytest.mark.parametrize(
    "n, patch, merge, temporal", [(4, 14, 2, 2), (5, 14, 2, 2), (3, 4, 2, 2), (5, 2, 3, 3), (2, 4, 1, 1)]
)
def test_patches_equal_a_plain_loop(n, patch, merge, temporal):
    geometry = VideoGeometry(patch, merge, temporal, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    height, width = 2 * geometry.factor, 3 * geometry.factor
    frames = _noise(4, n, height, width, 3)
    got = to_patches(frames, geometry)
    grid = geometry.grid(n, height, width)
    assert got.dtype == torch.float32 and got.shape == (grid.t * grid.h * grid.w, 3 * temporal * patch**2)

    x = (frames.numpy().astype(np.float64) / 255 - geometry.mean) / geometry.std
    rows = []
    for t in range(grid.t):
        for block_y in range(grid.h // merge):
            for block_x in range(grid.w // merge):
                for y in range(merge):
                    for xx in range(merge):
                        top, left = (block_y * merge + y) * patch, (block_x * merge + xx) * patch
                        cells = [
                            x[min(t * temporal + k, n - 1), top : top + patch, left : left + patch, c]
                            for c in range(3)
                            for k in range(temporal)
                        ]
                        rows.append(np.stack(cells).reshape(-1))
    assert np.abs(got.numpy() - np.stack(rows)).max() < 1e-6
