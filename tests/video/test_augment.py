"""Augmentation: each step held to torchvision's own results and to PIL, and what a plan that carries it gives."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torchvision_augment as kept
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import load_file

from tempo_fast.config import LoaderConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry
from tempo_fast.video import augment as steps
from tempo_fast.video.augment import Augmentation, augment, blur, draw_augmentation
from tempo_fast.video.loader import prefetching
from tempo_fast.video.preprocess import to_patches
from tempo_fast.video.reader import VideoReader


@pytest.fixture(scope="module")
def torchvision():
    return load_file(kept.KEPT)


def apart(a, b):
    """(largest difference in levels, share of values that differ)"""
    d = (a.int() - b.int()).abs()
    return int(d.max()), float((d > 0).float().mean())


@pytest.mark.parametrize(("what", "amount"), [(w, a) for w, amounts in kept.COLOURS.items() for a in amounts])
def test_colours_as_torchvision(torchvision, what, amount):
    most, share = apart(getattr(steps, what)(kept.frames(), amount), torchvision[kept.name(what, amount)])
    # its sums are rounded in another order: next to a whole number one is cut off to the level below
    assert most <= 1 and share < 0.001


@pytest.mark.parametrize("sigma", kept.SIGMAS)
def test_blur_as_torchvision(torchvision, sigma):
    most, share = apart(blur(kept.frames(), sigma), torchvision[kept.name("blur", sigma)])
    assert most <= 1 and share < 0.001


def test_crop_grey_and_flip_as_torchvision(torchvision):
    x, whole = kept.frames(), Augmentation(0, 0, kept.HEIGHT, kept.WIDTH)
    assert torch.equal(augment(x, Augmentation(*kept.CROP[:4]), *kept.CROP[4:]), torchvision["crop"])
    for field, key in (("flip", "flip"), ("grey", "grey")):
        assert torch.equal(augment(x, whole._replace(**{field: True}), *x.shape[1:3]), torchvision[key])
    assert torch.equal(augment(x, whole, *x.shape[1:3]), x)


@pytest.mark.parametrize(
    ("what", "by", "most", "mean"),
    [
        ("brightness", ImageEnhance.Brightness, 0, 0),
        ("contrast", ImageEnhance.Contrast, 1, 0.5),  # PIL rounds the mean grey to a whole number
        ("saturation", ImageEnhance.Color, 1, 0.25),
    ],
)
def test_colours_as_pil(what, by, most, mean):
    """The authors augment PIL images, in whose arithmetic greys and blends are rounded otherwise."""
    for factor in (0.6, 0.83, 1.2, 1.4):
        ours = getattr(steps, what)(kept.frames(), factor)
        for frame, mine in zip(kept.frames(), ours, strict=True):
            theirs = np.asarray(by(Image.fromarray(frame.numpy())).enhance(factor))
            d = np.abs(theirs.astype(int) - mine.numpy())
            assert d.max() <= most and d.mean() <= mean


def test_hue_as_pil():
    """PIL's hue and saturation are bytes: a 256th of the circle is up to 6 levels."""
    x = kept.frames()[1:]
    for amount in (-0.1, 0.05, 0.1):
        hsv = np.array(Image.fromarray(x[0].numpy()).convert("HSV"))
        hsv[..., 0] += np.array(round(amount * 255) % 256).astype(np.uint8)
        theirs = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).astype(int)
        d = np.abs(theirs - steps.hue(x, amount)[0].numpy())
        assert d.max() <= 8 and d.mean() < 1


def test_blur_as_pil():
    """PIL blurs by three running means, which come near a Gaussian; its border is held, ours mirrored."""
    x = kept.frames()
    for sigma in (0.7, 1.3, 2.0):
        theirs = [np.asarray(Image.fromarray(f.numpy()).filter(ImageFilter.GaussianBlur(sigma))) for f in x]
        d = np.abs(np.stack(theirs).astype(int) - blur(x, sigma).numpy())[:, 6:-6, 6:-6]
        assert d[0].max() <= 16 and d[0].mean() < 4 and d[1].max() <= 2  # noise, soft colours


def test_every_frame_is_done_alike_and_alone():
    x = kept.frames()
    how = Augmentation(2, 1, 17, 20, (("hue", 0.07), ("contrast", 1.3), ("brightness", 0.7)), False, 1.1, True)
    both = augment(x, how, 28, 28)
    assert both.shape == (2, 28, 28, 3) and both.dtype == torch.uint8 and both.is_contiguous()
    for i in range(2):
        assert torch.equal(augment(x[i : i + 1], how, 28, 28)[0], both[i])
    turned = how._replace(jitter=how.jitter[::-1])
    assert not torch.equal(augment(x, turned, 28, 28), both)  # the order counts
    by_hand = x[:, 2:19, 1:21]
    by_hand = blur(steps.brightness(steps.contrast(steps.hue(_resized(by_hand), 0.07), 1.3), 0.7), 1.1).flip(2)
    assert torch.equal(both, by_hand)


def _resized(x):
    from tempo_fast.video.preprocess import resize

    return resize(x, 28, 28)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3)])
def test_blur_of_small_pictures_stays_a_mean(size):
    x = torch.full((1, *size, 3), 137, dtype=torch.uint8)
    assert torch.equal(blur(x, 2.0), x)


@pytest.mark.parametrize(
    ("frames", "how", "message"),
    [
        (torch.zeros(1, 8, 8, 3), Augmentation(0, 0, 4, 4), "takes uint8"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), Augmentation(5, 0, 4, 4), "rows 5..9"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), Augmentation(0, 0, 0, 4), "rows 0..0"),
    ],
)
def test_wrong_frames_are_refused(frames, how, message):
    with pytest.raises(ValueError, match=message):
        augment(frames, how, 28, 28)


# -- the draw -----------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**60), height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_a_crop_is_inside_and_as_small_as_asked(seed, height, width):
    how = draw_augmentation(seed, height, width)
    assert 0 <= how.top and how.top + how.height <= height and 0 <= how.left and how.left + how.width <= width
    assert how.height >= 1 and how.width >= 1
    if 100 <= min(height, width) and max(height, width) < 2 * min(height, width):  # never the last resort
        assert 0.077 < how.height * how.width / (height * width) < 0.305
        assert 3 / 4 * 0.95 < how.width / how.height < 4 / 3 * 1.05
    for name, amount in how.jitter:
        low, high = (-0.1, 0.1) if name == "hue" else (1 - steps.JITTER[name], 1 + steps.JITTER[name])
        assert low <= amount <= high
    assert sorted(n for n, _ in how.jitter) in ([], sorted(steps.JITTER)) and 0.1 <= how.sigma <= 2.0
    assert draw_augmentation(seed, height, width) == how


def test_shapes_that_no_crop_fits_lose_their_ends():
    """torchvision's last resort: the middle, as long as the allowed shapes let it be."""
    assert draw_augmentation(0, 1, 400)[:4] == (0, 199, 1, 1)
    assert draw_augmentation(0, 600, 1)[:4] == (299, 0, 1, 1)


def test_draws_are_as_often_as_the_authors():
    """p of jitter .8, of grey .2, of a flip .5; areas even over [.08, .3]; all orders of the colours."""
    drawn = [draw_augmentation(seed, 240, 320) for seed in range(4000)]
    for share, p in (
        (sum(bool(d.jitter) for d in drawn), 0.8), (sum(d.grey for d in drawn), 0.2), (sum(d.flip for d in drawn), 0.5),
    ):  # fmt: skip
        assert abs(share / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    areas = np.array([d.height * d.width / (240 * 320) for d in drawn])
    assert abs(areas.mean() - 0.19) < 0.004 and abs(areas.std() - 0.22 / math.sqrt(12)) < 0.004
    assert len({tuple(n for n, _ in d.jitter) for d in drawn if d.jitter}) == 24
    assert abs(np.mean([d.sigma for d in drawn]) - 1.05) < 0.04
    assert np.corrcoef([d.grey for d in drawn], [d.flip for d in drawn])[0, 1] < 0.06


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(geometry):
    return VideoReader(VideoConfig(backend="pyav", fps=4.0, min_frames=4, max_frames=64), geometry)


def test_a_sparse_plan_takes_the_ends(reader, plain, counter):
    whole = reader.plan(plain)
    assert reader.plan_sparse(plain, 1).indices == whole.indices[:1]
    assert reader.plan_sparse(plain, 2).indices == (whole.indices[0], whole.indices[-1])
    # numpy.linspace(0, 7, 4, dtype=int)
    assert reader.plan_sparse(plain, 4).indices == tuple(whole.indices[i] for i in (0, 2, 4, 7))
    assert reader.plan_sparse(plain, 99).indices == whole.indices
    plan = reader.plan_sparse(plain, 2)
    assert plan == reader.plan(plain, [0, 59]) and plan.augment is None
    assert counter.read(reader.frames(plan)) == [0, 59]
    with pytest.raises(InputError, match="a plan of 0 frames"):
        reader.plan_sparse(plain, 0)


@pytest.mark.parametrize("n", [1, 2])
def test_an_augmented_plan_is_what_is_read(reader, plain, n):
    plan, clean = reader.plan_sparse(plain, n, 7), reader.plan_sparse(plain, n)
    assert plan.augment == draw_augmentation(7, 64, 192) and plan.indices == clean.indices
    assert plan.height == plan.width and plan.height % 28 == 0
    assert plan.grid == reader.geometry.grid(n, plan.height, plan.width)
    assert 0.6 < plan.height * plan.width / (clean.height * clean.width) < 1.7
    seen = reader.resized(plan)
    assert torch.equal(seen, augment(reader.frames(plan), plan.augment, plan.height, plan.width))
    assert torch.equal(reader.pixels(plan), to_patches(seen, reader.geometry))
    assert torch.equal(reader.pixels_many([clean, plan])[1], reader.pixels(plan))
    with prefetching(reader, [clean, plan], LoaderConfig(workers=1, ahead=2)) as source:
        assert torch.equal(source.pixels(clean), reader.pixels(clean))
        assert torch.equal(source.pixels(plan), reader.pixels(plan))


def test_a_budget_holds_for_the_square(plain, geometry):
    small = VideoReader(VideoConfig(backend="pyav", fps=4.0, max_pixels=28 * 28 * 5), geometry)
    plan = small.plan_sparse(plain, 2, 0)
    assert (plan.height, plan.width) == (56, 56)


@pytest.mark.parametrize("crop", [False, True])
def test_families_of_one_size_keep_it(plain, crop):
    geometry = VideoGeometry(14, 1, 1, CLIP_MEAN, CLIP_STD, sampling="hf_uniform", side=84, crop=crop, frame_tokens=9)
    reader = VideoReader(VideoConfig(backend="pyav", min_frames=8, max_frames=8), geometry)
    plan = reader.plan_sparse(plain, 2, 3)
    assert (plan.height, plan.width) == (84, 84)
    # the crop is a whole picture to the model: it is not cropped again
    assert torch.equal(reader.resized(plan), augment(reader.frames(plan), plan.augment, 84, 84))


def test_the_key_is_of_the_augmentation_and_old_keys_stay(reader, plain):
    clean = reader.plan_sparse(plain, 2)
    plans = [clean, *(reader.plan_sparse(plain, 2, seed) for seed in range(5))]
    flipped = dataclasses.replace(plans[1], augment=plans[1].augment._replace(flip=not plans[1].augment.flip))
    assert len({p.key for p in [*plans, flipped]}) == 7
    assert reader.plan_sparse(plain, 2, 3).key == plans[4].key
    # as it was computed before plans could be augmented
    times = [round(t, 6) for t in clean.timestamps]
    size = [clean.height, clean.width, list(clean.grid)]
    assert clean.key == digest([clean.digest, clean.indices, times, round(clean.fps, 6), *size, clean.rule])
    black = dataclasses.replace(clean, blank=(True, False))
    assert black.key == digest(
        [clean.digest, clean.indices, times, round(clean.fps, 6), *size, clean.rule, [True, False]]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bytes():
    x = kept.frames().repeat_interleave(2, 0)
    for seed in range(40):
        how = draw_augmentation(seed, kept.HEIGHT, kept.WIDTH)
        assert torch.equal(augment(x.cuda(), how, 56, 56).cpu(), augment(x, how, 56, 56))
