"""Sampling and resize rules: against independent re-derivations in integers and decimals, and their own promises."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import VideoConfig
from tempo_fast.models.family import VideoGeometry
from tempo_fast.video.sampling import RULES, sample_frames, smart_resize, spread, thin, video_max_pixels

counts = st.integers(2, 5000)
rates = st.sampled_from([10.0, 12.0, 23.976, 25.0, 29.97, 30.0, 60.0])
fps_wanted = st.sampled_from([0.25, 0.5, 1.0, 2.0, 4.0])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(RULES), counts, rates, fps_wanted, st.integers(1, 12), st.integers(0, 600), st.integers(1, 4))
def test_sampling_promises(rule, n, rate, fps, least, more, temporal):
    indices = sample_frames(rule, n, rate, fps=fps, min_frames=least, max_frames=least + more, temporal=temporal)
    assert indices == sorted(indices) and 0 <= indices[0] and indices[-1] < n
    if n >= temporal:
        assert len(indices) % temporal == 0 or rule == "hf_qwen3_vl"
        assert len(indices) <= max(temporal, least + more, n)
        assert len(set(indices)) == len(indices)
    assert indices[0] == 0 or rule == "hf_internvl"
    if rule in ("qwen_vl_utils", "hf_qwen3_vl") and len(indices) > 1:
        assert indices[-1] == n - 1


@settings(max_examples=200, deadline=None)
@given(counts.filter(lambda n: n >= 4), rates, fps_wanted)
def test_qwen_vl_utils_counts_and_positions(n, rate, fps):
    """n / rate * fps clamped to 4..min(768, n), floored to even; evenly spaced ends included, rounded."""
    got = sample_frames("qwen_vl_utils", n, rate, fps=fps, min_frames=4, max_frames=768)
    count = min(max(n / rate * fps, 4), min(768, n) // 2 * 2)
    assert len(got) == int(count) // 2 * 2
    for k, index in enumerate(got):
        exact = Fraction(k * (n - 1), len(got) - 1)
        assert abs(index - exact) <= Fraction(1, 2) + Fraction(1, 1000)


@settings(max_examples=200, deadline=None)
@given(counts.filter(lambda n: n >= 4), rates, fps_wanted)
def test_hf_positions_are_truncated_steps(n, rate, fps):
    got = sample_frames("hf_qwen2_vl", n, rate, fps=fps, min_frames=4, max_frames=768)
    for k, index in enumerate(got):
        exact = Fraction(k * n, len(got))
        assert exact - 1 - Fraction(1, 1000) < index <= exact + Fraction(1, 1000)


@settings(max_examples=200, deadline=None)
@given(counts.filter(lambda n: n >= 4), rates, fps_wanted)
def test_qwen3_vl_counts_and_positions(n, rate, fps):
    """transformers' Qwen3VLVideoProcessor: the count is cut to a whole number, even or odd; numpy linspace, rounded."""
    got = sample_frames("hf_qwen3_vl", n, rate, fps=fps, min_frames=4, max_frames=768)
    count = min(max(int(n / rate * fps), 4), 768, n)
    assert got == np.linspace(0, n - 1, count).round().astype(int).tolist()


@settings(max_examples=200, deadline=None)
@given(counts, rates, fps_wanted)
def test_even_parts_are_transformers_own(n, rate, fps):
    """Every part of the film gives one frame: its first by transformers' whole numbers, or the one in its middle."""
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    got = sample_frames("hf_uniform", n, rate, fps=fps, min_frames=1, max_frames=n, temporal=1)
    metadata = VideoMetadata(total_num_frames=n, fps=rate)
    assert got == default_sample_indices_fn(metadata, num_frames=len(got)).tolist()
    middle = sample_frames("hf_internvl", n, rate, fps=fps, min_frames=1, max_frames=n, temporal=1)
    assert len(middle) == len(got)
    for k, index in enumerate(middle):
        exact = Fraction(n * (2 * k + 1), 2 * len(got))
        assert exact - 1 - Fraction(1, 1000) < index <= exact + Fraction(1, 1000)


def test_sampling_by_hand():
    # 60 s at 30 fps and 1 fps: 60 frames; a 2-second clip is lifted to min_frames
    assert len(sample_frames("qwen_vl_utils", 1800, 30, fps=1, min_frames=4, max_frames=768)) == 60
    assert sample_frames("qwen_vl_utils", 60, 30, fps=1, min_frames=4, max_frames=768) == [0, 20, 39, 59]
    assert sample_frames("hf_qwen2_vl", 60, 30, fps=1, min_frames=4, max_frames=768) == [0, 15, 30, 45]
    # 10 frames to 4: linspace gives 0, 3, 6, 9; odd counts floor to even
    assert sample_frames("qwen_vl_utils", 10, 10, fps=5.9, min_frames=2, max_frames=768) == [0, 3, 6, 9]
    assert sample_frames("qwen_vl_utils", 3, 30, fps=1, min_frames=4, max_frames=768) == [0, 2]
    assert sample_frames("qwen_vl_utils", 1, 30, fps=1, min_frames=4, max_frames=768) == [0]
    # four parts of fifteen frames, whatever the rate
    fixed = {"fps": 1.0, "min_frames": 4, "max_frames": 4, "temporal": 1}
    assert sample_frames("hf_uniform", 60, 30, **fixed) == [0, 15, 30, 45]
    assert sample_frames("hf_internvl", 60, 30, **fixed) == [7, 22, 37, 52]
    assert sample_frames("hf_internvl", 3, 30, **fixed) == [0, 1, 2]


@pytest.mark.parametrize(
    "bad", [{"n_total": 0}, {"fps_source": 0.0}, {"rule": "other"}, {"fps": 0.0}, {"max_frames": 1}]
)
def test_sampling_refuses(bad):
    arguments = {
        "rule": "qwen_vl_utils",
        "n_total": 10,
        "fps_source": 30.0,
        "fps": 1.0,
        "min_frames": 2,
        "max_frames": 9,
    }
    with pytest.raises(ValueError):
        arguments |= bad
        rule, n, rate = (arguments.pop(k) for k in ("rule", "n_total", "fps_source"))
        sample_frames(rule, n, rate, **arguments)


def test_spread_and_thin():
    assert spread(10, 20, 4) == [10, 13, 16, 19]
    assert spread(5, 6, 1) == [5]
    assert thin([9, 8, 7, 6, 5], 3) == [9, 7, 5]
    assert thin([1, 2], 3) == [1, 2]


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([28, 32]), st.integers(1, 40), st.integers(1, 400))
def test_smart_resize_promises(height, width, factor, least, more):
    least, most = least * factor**2, (4 * least + more) * factor**2  # rounding up can quadruple a small area
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
        return
    h, w = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    assert h % factor == w % factor == 0 and h >= factor and w >= factor
    # One row or column of factors is as small as it gets, whatever the budget says.
    assert h * w <= most or factor in (h, w)
    assert h * w >= least or (h - factor) * (w - factor) < least


def _resize_in_integers(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The same rule with exact integer square roots: largest multiple f with f^2 * (h w) <= side^2 * max."""

    def nearest(side: int) -> int:
        return max(factor, round(Fraction(side, factor)) * factor)

    h, w = nearest(height), nearest(width)
    if h * w > most:
        return tuple(  # type: ignore[return-value]
            max(1, math.isqrt(side * side * most // (height * width)) // factor) * factor for side in (height, width)
        )
    if h * w < least:
        up = []
        for side in (height, width):
            k = 1
            while k * k * factor * factor * height * width < side * side * least:
                k += 1
            up.append(k * factor)
        return up[0], up[1]
    return h, w


@settings(max_examples=300, deadline=None)
@given(st.integers(20, 3000), st.integers(20, 3000), st.sampled_from([28, 32]))
def test_smart_resize_equals_the_integer_rule(height, width, factor):
    least, most = 12 * factor**2, 300 * factor**2
    if max(height, width) > 200 * min(height, width):
        return
    got = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    want = _resize_in_integers(height, width, factor, least, most)
    # Where the exact size is a whole multiple, the float rule may land one factor below it (above it, when growing).
    assert all(abs(a - b) in (0, factor) for a, b in zip(got, want, strict=True))
    if got != want:
        assert abs(math.sqrt(height * width / most) * want[0] - height) < 1e-6 * height or h_w_exact(
            height, width, least
        )


def h_w_exact(height: int, width: int, least: int) -> bool:
    beta = math.sqrt(least / (height * width))
    return any(abs(side * beta / 28 - round(side * beta / 28)) < 1e-6 for side in (height, width)) or any(
        abs(side * beta / 32 - round(side * beta / 32)) < 1e-6 for side in (height, width)
    )


def test_smart_resize_by_hand():
    # from the model card's rule: 720p under the 768-patch cap, a small square lifted, banker's rounding at .5
    assert smart_resize(720, 1280, factor=28, min_pixels=3136, max_pixels=602112) == (560, 1008)
    assert smart_resize(20, 20, factor=28, min_pixels=3136, max_pixels=602112) == (56, 56)
    assert smart_resize(70, 98, factor=28, min_pixels=3136, max_pixels=602112) == (56, 112)
    assert smart_resize(360, 640, factor=28, min_pixels=3136, max_pixels=602112) == (364, 644)
    with pytest.raises(ValueError, match="0x5"):
        smart_resize(0, 5, factor=28, min_pixels=1, max_pixels=2)


def test_pixel_budget():
    geometry = VideoGeometry(14, 2, 2, (0.5,) * 3, (0.5,) * 3)
    config = VideoConfig(min_pixels=1000, max_pixels=500_000, total_pixels=1_000_000)
    assert video_max_pixels(config, 2, geometry) == 500_000  # the per-frame cap
    assert video_max_pixels(config, 10, geometry) == 200_000  # an even share, two frames to a patch
    assert video_max_pixels(config, 10_000, geometry) == 1050  # never below 1.05 * min_pixels


def test_token_count_follows_the_pixels(geometry):
    rng = np.random.default_rng(0)
    for _ in range(50):
        n, h, w = int(rng.integers(1, 40)), int(rng.integers(30, 900)), int(rng.integers(30, 900))
        h, w = smart_resize(h, w, factor=geometry.factor, min_pixels=3136, max_pixels=602112)
        grid = geometry.grid(n, h, w)
        assert geometry.tokens(grid) == -(-n // 2) * (h // 28) * (w // 28)
