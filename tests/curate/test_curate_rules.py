"""What the rules promise on random input, and what the measures of a picture measure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.curate.embed import HistogramEmbedder
from tempo_fast.curate.grouping import group_shots, runs
from tempo_fast.curate.keyframes import keyframes, sharpness
from tempo_fast.curate.keyframes import windows as keyframe_windows
from tempo_fast.curate.shots import scores_to_shots
from tempo_fast.curate.transnet import join_windows, windows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0.1, 0.95))
def test_grouping_does_not_depend_on_the_order_of_shots(n, seed, threshold):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    groups = group_shots(x @ x.T, threshold)
    order = rng.permutation(n)
    shuffled = group_shots(x[order] @ x[order].T, threshold)
    together = {(i, j) for i in range(n) for j in range(n) if groups[i] == groups[j]}
    again = {(order[i], order[j]) for i in range(n) for j in range(n) if shuffled[i] == shuffled[j]}
    assert together == again


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_runs_cover_the_shots(groups):
    found = runs(groups)
    assert [i for a, b in found for i in range(a, b)] == list(range(len(groups)))
    assert all(len(set(groups[a:b])) == 1 for a, b in found)
    assert all(groups[a[0]] != groups[b[0]] for a, b in zip(found, found[1:], strict=False))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_shots_from_scores_are_apart_and_hold_no_transition_but_their_end(scores):
    hot = np.array(scores) > 0.5
    shots = scores_to_shots(np.array(scores), 0.5)
    assert all(a < b for a, b in shots) and all(b <= c for (_, b), (c, _) in zip(shots, shots[1:], strict=False))
    if not hot.all():
        assert not any(hot[a : b - 1].any() for a, b in shots)
        assert {i for a, b in shots for i in range(a, b)} >= set(np.flatnonzero(~hot).tolist())


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20_000))
def test_windows_cover_every_frame_once(n):
    found = windows(n)
    assert found[0][0] == 0 and found[-1][1] == n
    assert all(end - start == 2000 for start, end in found[:-1]) and found[-1][1] - found[-1][0] < 2000 + 400
    assert all(after[0] == before[1] - 400 for before, after in zip(found, found[1:], strict=False))
    truth = np.arange(n, dtype=np.float32)
    assert np.array_equal(join_windows(found, [truth[a:b] for a, b in found]), truth)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 1000))
def test_keyframes_lie_in_their_clip(start, length, seed):
    scores = np.random.default_rng(seed).uniform(0, 9, start + length).tolist()
    needed = {i for window in keyframe_windows(start, start + length) for i in window}
    found = keyframes(start, start + length, {i: scores[i] for i in needed})
    assert found == sorted(set(found)) and all(start <= f < start + length for f in found)
    assert len(found) == min(2, length)


def _filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    p = np.pad(x, 1, mode="reflect")
    h, w = x.shape
    return sum(kernel[i, j] * p[i : i + h, j : j + w] for i in range(3) for j in range(3))


@pytest.mark.parametrize("contrast", [12, 60, 255])
def test_sharpness_equals_the_formula(contrast):
    """Blur [1 2 1]^2 / 16, grey, OpenCV's ksize-3 Laplacian [2 0 2; 0 -8 0; 2 0 2], mirrored borders, at most 255
    a pixel (which matters at full contrast)."""
    rng = np.random.default_rng(1)
    picture = rng.integers(0, contrast + 1, (17, 23, 3)).astype(np.uint8)
    blurred = np.stack(
        [np.floor(_filtered(c.astype(float), np.outer([1, 2, 1], [1, 2, 1]) / 16) + 0.5) for c in picture.T], -1
    )
    grey = np.round(blurred.transpose(1, 0, 2) @ [0.299, 0.587, 0.114])
    laplacian = np.abs(_filtered(grey, np.array([[2, 0, 2], [0, -8, 0], [2, 0, 2]], float)))
    assert sharpness(picture) == pytest.approx(laplacian.clip(0, 255).mean(), rel=0.01)
    assert (laplacian > 255).any() == (contrast == 255)


def test_sharpness_orders_blur():
    import cv2

    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
    scores = [sharpness(picture)] + [sharpness(cv2.GaussianBlur(picture, (k, k), 0)) for k in (5, 11, 21)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < scores[0] / 3
    assert sharpness(np.full((20, 20, 3), 77, np.uint8)) == 0


def test_histograms_tell_colours_apart_and_forgive_noise(film):
    embedder = HistogramEmbedder()
    rng = np.random.default_rng(0)
    frames = [film.frame(p, t) for p in range(6) for t in (0.1, 0.9)]
    noisy = [np.clip(f + rng.normal(0, 4, f.shape), 0, 255).astype(np.uint8) for f in frames]
    x, y = embedder.embed(frames), embedder.embed(noisy)
    assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-6)
    s = x @ y.T
    same = np.arange(12)[:, None] // 2 == np.arange(12) // 2
    assert s[same].min() > 0.95 and s[~same].max() < 0.6


def test_histogram_ignores_size_and_hue_wraps_around():
    embedder = HistogramEmbedder()
    red, wrapped = np.zeros((40, 60, 3), np.uint8), np.zeros((400, 300, 3), np.uint8)
    red[:] = (200, 20, 24)  # hue 359
    wrapped[:] = (200, 24, 20)  # hue 1
    a, b = embedder.embed([red, wrapped])
    assert a @ b > 0.98
    grey, blue = np.full((9, 9, 3), 128, np.uint8), np.full((9, 9, 3), (20, 20, 200), np.uint8)
    a, b = embedder.embed([grey, blue])
    assert a @ b < 0.01
