"""Plans decide pixels: the same plan the same pixels, another plan another key."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.models.family import VideoGeometry
from tempo_fast.video.preprocess import resize, to_patches
from tempo_fast.video.reader import VideoReader


@pytest.fixture
def reader(geometry):
    return VideoReader(VideoConfig(backend="pyav", fps=4.0, min_frames=4, max_frames=64), geometry)


def test_whole_file(reader, plain, counter):
    plan = reader.plan(plain)
    assert len(plan.indices) == 8 and plan.indices[0] == 0 and plan.indices[-1] == 59
    assert plan.timestamps == pytest.approx([i / 30 for i in plan.indices])
    assert (plan.height, plan.width) == (56, 196) and plan.grid == (4, 4, 14)
    assert counter.read(reader.frames(plan)) == list(plan.indices)
    pixels = reader.pixels(plan)
    assert pixels.shape == (plan.grid.t * plan.grid.h * plan.grid.w, 3 * 2 * 14 * 14) and pixels.dtype == torch.float32
    assert pixels.shape[0] // 4 == reader.geometry.tokens(plan.grid)
    by_hand = to_patches(resize(reader.frames(plan), plan.height, plan.width), reader.geometry)
    assert torch.equal(pixels, by_hand)


def test_a_clip_gives_its_own_frames(reader, plain, counter):
    plan = reader.plan_range(plain, 20, 50)
    assert plan.indices == (20, 30, 39, 49)
    assert counter.read(reader.frames(plan)) == [20, 30, 39, 49]
    # shorter than a sampled frame, down to a single one: as many as there are, up to one temporal patch
    assert reader.plan_range(plain, 30, 33).indices == (30, 32)
    assert reader.plan_range(plain, 30, 31).indices == (30,)
    assert reader.plan_range(plain, 30, 31).grid.t == 1
    for start, end in ((50, 61), (-1, 5), (9, 9), (10, 4)):
        with pytest.raises(InputError, match="is not inside its 60 frames"):
            reader.plan_range(plain, start, end)


def test_perturbed_clips_follow_one_another_in_even_time(reader, plain, counter):
    ranges = [(40, 60), (0, 20), (20, 40), (0, 20)]
    plan = reader.plan_clips(plain, ranges)
    parts = [reader.plan_range(plain, *r).indices for r in ranges]
    assert plan.indices == tuple(i for part in parts for i in part)
    assert counter.read(reader.frames(plan)) == list(plan.indices)
    assert plan.timestamps == tuple(i / 4.0 for i in range(len(plan.indices)))
    # Every repeat costs one resize only, and shows the same pixels.
    small = VideoReader(VideoConfig(backend="pyav", fps=4.0, max_pixels=28 * 28 * 4), reader.geometry)
    plan = small.plan_clips(plain, ranges)
    assert (plan.height, plan.width) != (64, 192)
    by_hand = to_patches(resize(small.frames(plan), plan.height, plan.width), small.geometry)
    assert torch.equal(small.pixels(plan), by_hand)


def test_pixels_come_in_the_dtype_of_the_tower(reader, plain, geometry):
    half = VideoReader(reader.config, geometry, dtype=torch.bfloat16)
    plan = reader.plan(plain)
    assert half.plan(plain).key == plan.key
    assert torch.equal(half.pixels(plan), reader.pixels(plan).bfloat16())
    assert torch.equal(half.pixels(plan, torch.float32), reader.pixels(plan))


def test_blank_clips_are_black_and_another_video(reader, plain, counter):
    ranges, blank = [(0, 20), (20, 40), (40, 60)], [False, True, False]
    clean, plan = reader.plan_clips(plain, ranges), reader.plan_clips(plain, ranges, blank)
    assert reader.plan_clips(plain, ranges, [False] * 3) == clean and plan.key != clean.key
    hidden = torch.tensor([20 <= i < 40 for i in plan.indices])
    assert plan.blank == tuple(hidden.tolist()) and (plan.indices, plan.timestamps) == (clean.indices, clean.timestamps)
    seen, whole = reader.resized(plan), reader.resized(clean)
    assert not seen[hidden].any() and torch.equal(seen[~hidden], whole[~hidden])
    assert torch.equal(reader.resized(clean), whole)  # a shared decode would be left as it was
    assert torch.equal(reader.pixels(plan), to_patches(seen, reader.geometry))
    with pytest.raises(ValueError):
        reader.plan_clips(plain, ranges, [True])


def test_too_many_clips_are_thinned(plain, geometry):
    reader = VideoReader(VideoConfig(backend="pyav", fps=30.0, max_frames=9), geometry)
    plan = reader.plan_clips(plain, [(30, 60), (0, 30)])
    assert len(plan.indices) == 8 and plan.indices[0] >= 30 and plan.indices[-1] < 30


def test_given_frames_in_any_order(reader, plain):
    assert reader.plan(plain, [5, 40]).timestamps == pytest.approx([5 / 30, 40 / 30])
    shuffled = reader.plan(plain, [40, 5, 5])
    assert shuffled.indices == (40, 5, 5) and list(shuffled.timestamps) == sorted(shuffled.timestamps)


def test_portrait_and_rotation_decide_the_grid(tmp_path, counter, reader):
    path = counter.write(tmp_path / "p.mp4", 20, size=(256, 132))
    plan = reader.plan(path)
    assert plan.height > plan.width and reader.pixels(plan).shape[0] == plan.grid.t * plan.grid.h * plan.grid.w


def test_the_key_is_of_the_bytes_not_of_the_name(reader, plain, tmp_path):
    other = tmp_path / "another name.mp4"
    other.write_bytes(plain.read_bytes())
    assert reader.plan(other).key == reader.plan(plain).key
    assert len(reader.plan(plain).key) == 64


def test_all_that_decides_pixels_is_in_the_key(plain, geometry, reader):
    base = reader.plan(plain, [0, 10, 20, 30])
    keys = {base.key}
    for change in (
        {"max_pixels": 28 * 28 * 6},
        {"sampling": "hf_qwen2_vl"},
        {"min_pixels": 28 * 28 * 30},
        {"fps": 2.0},
    ):
        keys.add(VideoReader(dataclasses.replace(reader.config, **change), geometry).plan(plain, [0, 10, 20, 30]).key)
    keys.add(VideoReader(reader.config, VideoGeometry(16, 2, 2, geometry.mean, geometry.std)).plan(plain).key)
    keys.add(reader.plan(plain, [0, 10, 20, 31]).key)
    keys.add(reader.plan(plain, [10, 0, 20, 30]).key)
    keys.add(dataclasses.replace(base, rule=base.rule.replace("decoder=pyav", "decoder=dali-gpu")).key)
    assert len(keys) == 9


def test_the_rate_is_that_of_the_frames_shown(reader, plain):
    """60 frames at 30 a second: transformers' sampled_fps for sampled frames, the mean step for given ones."""
    assert reader.plan(plain).fps == pytest.approx(8 / 2)
    assert reader.plan_range(plain, 20, 50).fps == pytest.approx(4 / 1)
    assert reader.plan_range(plain, 30, 33).fps == pytest.approx(2 / 0.1)
    given = reader.plan(plain, [0, 10, 40])
    assert given.timing == ((0.0, pytest.approx(1 / 3), pytest.approx(4 / 3)), pytest.approx(2 / (4 / 3)))
    # frames out of order come at the configured rate
    for plan in (reader.plan(plain, [10, 0, 40]), reader.plan_clips(plain, [(30, 60), (0, 30)])):
        assert plan.timing == (tuple(i / 4 for i in range(len(plan.indices))), 4.0)
    assert reader.plan(plain, [7]).fps == 4.0
    assert dataclasses.replace(given, fps=given.fps * 2).key != given.key


def test_a_file_that_changed_is_not_read_by_an_old_plan(tmp_path, counter, reader):
    path = counter.write(tmp_path / "c.mp4", 20)
    plan = reader.plan(path)
    counter.write(path, 30)
    os.utime(path, ns=(5, 5))
    with pytest.raises(InputError, match=r"c\.mp4: the file has changed"):
        reader.pixels(plan)
