"""Families with frames of one size: squeezed or cut, whatever the file's shape and the pixel budget."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tempo_fast.config import GenerationConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import make_engine
from tempo_fast.models.family import VideoGeometry
from tempo_fast.video.preprocess import fit, to_patches
from tempo_fast.video.reader import VideoReader

SQUEEZED = VideoGeometry(
    8, 2, 1, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), sampling="hf_internvl", side=48, frame_tokens=9
)  # fmt: skip
CUT = dataclasses.replace(SQUEEZED, crop=True, sampling="hf_uniform")
CONFIG = VideoConfig(backend="pyav", min_frames=5, max_frames=5, max_pixels=100, min_pixels=50)


@pytest.mark.parametrize(
    "geometry, indices", [(SQUEEZED, (6, 18, 30, 42, 54)), (CUT, (0, 12, 24, 36, 48))], ids=["squeezed", "cut"]
)
def test_plan_and_pixels(plain: Any, geometry: VideoGeometry, indices: tuple[int, ...]) -> None:
    reader = VideoReader(CONFIG, geometry)
    plan = reader.plan(plain)
    assert plan.indices == indices and (plan.height, plan.width) == (48, 48) and plan.grid == (5, 6, 6)
    shown = reader.resized(plan)
    assert shown.shape == (5, 48, 48, 3) and shown.dtype == torch.uint8
    pixels = reader.pixels(plan).view(5, 3, 48, 48)
    by_hand = (shown.permute(0, 3, 1, 2) / 255 - torch.tensor(geometry.mean).view(3, 1, 1)) / torch.tensor(
        geometry.std
    ).view(3, 1, 1)
    torch.testing.assert_close(pixels, by_hand, rtol=0, atol=1e-5)
    assert geometry.tokens(plan.grid) == 45


def test_what_is_cut_shows_the_middle(plain: Any, counter: Any) -> None:
    """64 x 192 pixels: squeezed the number can be read, cut out of the middle only its middle bits are there."""
    squeezed, cut = VideoReader(CONFIG, SQUEEZED), VideoReader(CONFIG, CUT)
    plan = squeezed.plan(plain)
    wide = fit(squeezed.frames(plan), 64, 192, crop=True)
    assert counter.read(wide) == list(plan.indices)
    middle = cut.resized(cut.plan(plain, plan.indices))
    third = fit(squeezed.frames(plan)[:, :, 64:128].contiguous(), 48, 48, crop=False)
    # away from the cut, where the antialias sees other neighbours
    assert torch.equal(middle[:, :, 4:-4], third[:, :, 4:-4])
    assert not torch.equal(middle, squeezed.resized(plan))


@pytest.mark.parametrize("height, width", [(50, 73), (90, 41), (20, 25), (33, 33), (48, 200)])
def test_cutting_is_pillows(height: int, width: int) -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8))
    got = fit(frames, 40, 40, crop=True)
    short = min(height, width)
    size = (40 * height // short, 40 * width // short)
    top, left = (size[0] - 40) // 2, (size[1] - 40) // 2
    for a, b in zip(frames.numpy(), got.numpy(), strict=True):
        image = Image.fromarray(a).resize(size[::-1], Image.Resampling.BICUBIC)
        off = np.abs(np.asarray(image.crop((left, top, left + 40, top + 40))).astype(int) - b.astype(int))
        # of noise one pixel beside is tens of levels; torch and Pillow round differently, most at scales near 1
        assert off.mean() < 1


def test_repeats_are_the_same(plain: Any) -> None:
    reader = VideoReader(CONFIG, CUT)
    plan = reader.plan_clips(plain, [(30, 60), (0, 30), (30, 60)])
    by_hand = to_patches(fit(reader.frames(plan), 48, 48, crop=True), CUT)
    assert len(set(plan.indices)) < len(plan.indices) and torch.equal(reader.pixels(plan), by_hand)


def test_the_key_tells_cut_from_squeezed_and_no_pixel_budget(plain: Any) -> None:
    frames = [0, 10, 20]

    def key(geometry: VideoGeometry, **config: Any) -> str:
        return (
            VideoReader(dataclasses.replace(CONFIG, sampling="hf_uniform", **config), geometry).plan(plain, frames).key
        )

    assert key(SQUEEZED) == key(SQUEEZED, max_pixels=10**6)
    assert len({key(SQUEEZED), key(CUT), key(dataclasses.replace(CUT, side=64))}) == 3


def test_vllm_is_refused(frames: Any) -> None:
    with pytest.raises(InputError, match=f"prompts of {frames.family.name} itself"):
        make_engine(GenerationConfig(engine="vllm"), frames, None, None, 0)
