"""The sampled frames of a file in another order, some black: the video that a perturbed answer is about."""

from __future__ import annotations

import random

import pytest
import torch

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.perturb import EDITS, KINDS, perturb
from tempo_fast.video.preprocess import to_patches
from tempo_fast.video.reader import VideoReader


@pytest.fixture
def reader(geometry):
    return VideoReader(VideoConfig(backend="pyav", fps=4.0, min_frames=4, max_frames=64), geometry)


@pytest.mark.parametrize("kind", [k for k in (*KINDS, *EDITS) if k != "splice"])
@pytest.mark.parametrize("r", [2, 4])
def test_every_perturbation_shows_its_frames(reader, plain, counter, kind, r):
    clean = reader.plan(plain)
    order = perturb(kind, len(clean.indices), r, seed=5)
    plan = reader.plan_frames(plain, order.order, order.blank)
    assert plan.indices == tuple(order.apply(clean.indices)) and plan.key != clean.key
    assert counter.read(reader.frames(plan)) == list(plan.indices)
    # what time the model is told says nothing of the order
    assert plan.timestamps == clean.timestamps[: len(plan.indices)] and list(plan.timestamps) == sorted(plan.timestamps)
    assert plan.grid == reader.geometry.grid(len(plan.indices), plan.height, plan.width)
    seen = reader.resized(plan)
    dark = torch.tensor(order.blank or (False,) * len(seen))
    assert not seen[dark].any() and seen[~dark].flatten(1).any(1).all()
    if len(plan.indices) == len(clean.indices):
        assert (plan.height, plan.width, plan.grid, plan.fps) == (clean.height, clean.width, clean.grid, clean.fps)
        whole = reader.resized(clean)[torch.tensor(order.order)]
        assert torch.equal(seen[~dark], whole[~dark])
    assert torch.equal(reader.pixels(plan), to_patches(seen, reader.geometry))
    # beside the clean video in one decode, as a batch of questions reads them
    both = reader.pixels_many([clean, plan])
    assert torch.equal(both[0], reader.pixels(clean)) and torch.equal(both[1], reader.pixels(plan))


def test_the_order_of_the_file_is_the_clean_video(reader, plain):
    clean = reader.plan(plain)
    assert reader.plan_frames(plain, range(8)).key == clean.key
    assert reader.plan_frames(plain, range(8), [False] * 8).key == clean.key


def test_orders_and_blanks_have_keys_of_their_own(reader, plain):
    rng = random.Random(0)
    seen = {}
    for _ in range(30):
        order = rng.sample(range(8), 8)
        blank = tuple(rng.random() < 0.5 for _ in order)
        seen[reader.plan_frames(plain, order, blank).key] = (tuple(order), blank)
        seen[reader.plan_frames(plain, order).key] = (tuple(order), ())
    assert len(seen) == len(set(seen.values())) == 60


@pytest.mark.parametrize("rate", [4.0, 1.0])
def test_dropped_frames_come_at_the_rate_of_the_sampled_ones(plain, geometry, rate):
    """Of a long video, frames are sampled at another rate than the configured one."""
    reader = VideoReader(VideoConfig(backend="pyav", fps=rate, min_frames=8, max_frames=8), geometry)
    clean = reader.plan(plain)
    plan = reader.plan_frames(plain, [1, 6])
    assert plan.timestamps == clean.timestamps[:2] and plan.fps == clean.fps
    assert plan.grid.t == 1 and plan.timing != clean.timing


@pytest.mark.parametrize(
    ("order", "blank"), [([], ()), ([8], ()), ([-1], ()), (list(range(8)) + [0], ()), ([0, 1], (True,))]
)
def test_an_order_of_other_frames_is_refused(reader, plain, order, blank):
    with pytest.raises(InputError, match=r"plain\.mp4: an order of .* for 8 sampled frames"):
        reader.plan_frames(plain, order, blank)
