"""The Triton resize against torch's own on the CPU, bit for bit: on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1), else skipped.

Sizes: up, down, both at once, one axis alone, sides of one pixel, ratios of dozens; rows and bytes that leave ragged
tiles.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tempo_kernels import fused
from tempo_kernels.resize import resize

CUDA = torch.cuda.is_available()
if not (CUDA or fused.interpreted()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [
    ((20, 30), (9, 13)), ((9, 13), (20, 31)), ((7, 30), (15, 11)), ((7, 8), (7, 21)), ((7, 8), (3, 8)),
    ((1, 1), (5, 4)), ((40, 3), (1, 2)), ((3, 90), (2, 1)), ((17, 16), (16, 17)),
]  # fmt: skip
LARGE = [((720, 1280), (476, 840)), ((360, 640), (364, 644)), ((1080, 1920), (448, 448)), ((333, 777), (998, 56))]


def make(f: int, h: int, w: int, edges: bool = False, seed: int = 0) -> Tensor:
    x = torch.randint(0, 256, (f, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (x > 127).to(torch.uint8) * 255 if edges else x


def by_torch(frames: Tensor, height: int, width: int) -> Tensor:
    x = frames.contiguous().permute(0, 3, 1, 2)
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size, target", SIZES + (LARGE if CUDA else []))
@pytest.mark.parametrize("edges", [False, True])
def test_equals_torch_on_the_cpu(size: tuple[int, int], target: tuple[int, int], edges: bool) -> None:
    frames = make(2, *size, edges=edges)
    found = resize(frames.to(DEVICE), *target, impl="triton")
    assert found.device.type == DEVICE and found.is_contiguous()
    assert torch.equal(found.cpu(), by_torch(frames, *target))
    assert torch.equal(resize(frames.to(DEVICE), *target, impl="torch"), found)


def test_strides() -> None:
    frames = make(5, 14, 12)
    for view in (lambda x: x[::2], lambda x: x[1:2, 2:13, 3:11], lambda x: x.transpose(1, 2), lambda x: x.flip(-1)):
        found = resize(view(frames.to(DEVICE)), 5, 7, impl="triton")
        assert torch.equal(found.cpu(), by_torch(view(frames), 5, 7))


def test_no_frames() -> None:
    assert resize(make(0, 6, 6).to(DEVICE), 3, 4, impl="triton").shape == (0, 3, 4, 3)


@pytest.mark.skipif(not CUDA, reason="needs gigabytes of a GPU")
def test_more_than_31_bits() -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB")
    frames = torch.zeros(3600, 448, 448, 3, dtype=torch.uint8, device=DEVICE)
    last = make(1, 448, 448)
    frames[-1:] = last.to(DEVICE)
    assert frames.numel() > 2**31
    for target in ((28, 42), (448, 460), (460, 448)):  # the last two write as much
        assert torch.equal(resize(frames, *target)[-1:].cpu(), by_torch(last, *target))


@pytest.mark.skipif(not CUDA, reason="the other route of the same function")
def test_pixels_of_the_model_are_those_of_the_cpu() -> None:
    from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry
    from tempo_fast.video.preprocess import fit, to_patches

    frames = make(5, 237, 391)
    for geometry in (
        VideoGeometry(14, 2, 2, CLIP_MEAN, CLIP_STD),
        VideoGeometry(14, 2, 1, CLIP_MEAN, CLIP_STD, side=336, crop=True, frame_tokens=1),
    ):
        pixels = [
            to_patches(fit(x, 336, 336, crop=geometry.crop), geometry, torch.bfloat16)
            for x in (frames, frames.to(DEVICE))
        ]
        assert torch.equal(pixels[0], pixels[1].cpu())
