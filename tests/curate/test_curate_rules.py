"""The rules as pure functions: matrices and ranges worked by hand, and their promises on random input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import CurateConfig
from tempo_fast.curate.embed import HistogramEmbedder
from tempo_fast.curate.grouping import group_problem, group_shots, runs
from tempo_fast.curate.keyframes import keyframes, sharpness
from tempo_fast.curate.shots import clean_shots, cuts_to_shots, join_windows, middle, scores_to_shots, windows


def _symmetric(n: int, pairs: dict[tuple[int, int], float]) -> np.ndarray:
    s = np.eye(n)
    for (i, j), value in pairs.items():
        s[i, j] = s[j, i] = value
    return s


def test_grouping_by_hand():
    # .95 merges 0 and 2; their mean with 1 is (.9 + .6) / 2 = .75, below the threshold although 0-1 alone is above it
    s = _symmetric(3, {(0, 2): 0.95, (0, 1): 0.9, (1, 2): 0.6})
    assert group_shots(s, 0.8) == [0, 1, 0]
    assert group_shots(s, 0.7) == [0, 0, 0]
    # means are of rows, not of members: 3 joins at ((.9 + .7) / 2 + .9) / 2 = .85, where the members' mean is .833
    s = _symmetric(4, {(0, 1): 0.99, (0, 2): 0.98, (1, 2): 0.98, (0, 3): 0.9, (1, 3): 0.7, (2, 3): 0.9})
    assert group_shots(s, 0.84) == [0, 0, 0, 0]
    assert group_shots(s, 0.86) == [0, 0, 0, 1]


def test_grouping_stops_at_the_threshold_itself():
    s = _symmetric(2, {(0, 1): 0.8})
    assert group_shots(s, 0.8) == [0, 1]
    assert group_shots(s, np.nextafter(0.8, 0)) == [0, 0]


def test_groups_are_numbered_by_first_appearance():
    s = _symmetric(5, {(1, 4): 0.9, (0, 3): 0.85})
    assert group_shots(s, 0.8) == [0, 1, 2, 0, 1]
    assert group_shots(np.ones((1, 1)), 0.8) == [0]
    with pytest.raises(ValueError, match="square"):
        group_shots(np.ones((2, 3)), 0.8)


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


def test_which_groups_make_a_video_unusable():
    assert group_problem([0, 1, 2], 4, 3) == "3 clips, fewer than curate.min_clips 4"
    assert group_problem([0, 1, 2, 3], 4, 3) == ""
    # 4 or 5 clips: a third is 1, so that no scene may come back; 6: two times; 9 and more: three times, never four
    assert "2 of 5 clips (at most 1)" in group_problem([0, 1, 0, 2, 3], 4, 3)
    assert group_problem([0, 1, 0, 2, 3, 4], 4, 3) == ""
    assert group_problem([0, 1, 0, 2, 0, 3, 4, 5, 6], 4, 3) == ""
    assert "4 of 16 clips (at most 3)" in group_problem([0, 1, 0, 2, 0, 3, 0, *range(4, 13)], 4, 3)


def test_shots_from_cuts():
    assert cuts_to_shots([], 10) == [(0, 10)]
    assert cuts_to_shots([4, 7, 7, 0, 10], 10) == [(0, 4), (4, 7), (7, 10)]


def test_shots_from_transition_scores():
    # frames 3-4 are a transition: 3 still belongs to the first shot, 5 starts the next one; 4 belongs to none
    assert scores_to_shots(np.array([0, 0, 0, 0.9, 0.8, 0, 0, 0]), 0.5) == [(0, 4), (5, 8)]
    assert scores_to_shots(np.array([0.0] * 5), 0.5) == [(0, 5)]
    assert scores_to_shots(np.array([0.9] * 5), 0.5) == [(0, 5)]
    assert scores_to_shots(np.array([0, 0, 0.5, 0]), 0.5) == [(0, 4)], "the threshold itself is no transition"
    assert scores_to_shots(np.array([0, 0, 0, 0.9]), 0.5) == [(0, 4)]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20_000))
def test_windows_cover_every_frame_once(n):
    found = windows(n)
    assert found[0][0] == 0 and found[-1][1] == n
    assert all(end - start == 2000 for start, end in found[:-1]) and found[-1][1] - found[-1][0] < 2000 + 400
    assert all(after[0] == before[1] - 400 for before, after in zip(found, found[1:], strict=False))
    truth = np.arange(n, dtype=np.float32)
    assert np.array_equal(join_windows(found, [truth[a:b] for a, b in found]), truth)


def test_windows_by_hand():
    assert windows(2000) == [(0, 2000)]
    assert windows(2399) == [(0, 2399)]  # less than an overlap would be left
    assert windows(2400) == [(0, 2000), (1600, 2400)]
    parts = [np.zeros(2000), np.ones(800)]
    assert join_windows([(0, 2000), (1600, 2400)], parts).tolist() == [0.0] * 1800 + [1.0] * 600


def test_shots_that_are_dropped():
    times = [i / 100 for i in range(101)]  # 100 fps: 8 frames are .08 s
    contrast = [50.0] * 100
    contrast[middle(60, 100)] = 9.9
    config = CurateConfig()
    assert clean_shots([(0, 7), (7, 27), (27, 46), (46, 60), (60, 100)], times, contrast, config) == [(7, 27)]
    slow = [float(i) for i in range(101)]
    assert clean_shots([(0, 7), (7, 15), (60, 100)], slow, contrast, config) == [(7, 15)]


def _scores(n: int, peaks: dict[int, float]) -> list[float]:
    return [peaks.get(i, 1.0) for i in range(n)]


def test_keyframes_are_sharp_frames_near_the_thirds():
    assert keyframes(0, 90, [1.0] * 90) == [30, 60], "a flat clip: the window decides"
    assert keyframes(0, 90, [0.0] * 90) == [30, 60]
    assert keyframes(0, 90, _scores(90, {33: 2.0, 55: 2.0})) == [33, 55]
    # at 44 the cosine window is cos(pi * 14 / 30) = .105: only a tenfold sharpness wins there
    assert keyframes(0, 90, _scores(90, {44: 5.0}))[0] == 30
    assert keyframes(0, 90, _scores(90, {44: 50.0}))[0] == 44
    # outside the window (+- half an interval) nothing counts
    assert keyframes(0, 90, _scores(90, {5: 1e9, 80: 1e9})) == [30, 60]
    assert keyframes(100, 190, [1.0] * 200) == [130, 160]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 50), st.integers(1, 200), st.integers(0, 1000))
def test_keyframes_lie_in_their_clip(start, length, seed):
    scores = np.random.default_rng(seed).uniform(0, 9, start + length).tolist()
    found = keyframes(start, start + length, scores)
    assert found == sorted(set(found)) and all(start <= f < start + length for f in found)
    assert len(found) == min(2, length)


def test_sharpness_orders_blur():
    import cv2

    rng = np.random.default_rng(0)
    picture = cv2.resize(rng.integers(0, 256, (12, 16), dtype=np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
    scores = [sharpness(picture)] + [sharpness(cv2.GaussianBlur(picture, (k, k), 0)) for k in (5, 11, 21)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < scores[0] / 3
    assert sharpness(np.full((20, 20), 77, np.uint8)) == 0


def test_sharpness_equals_the_formula():
    """Blur [1 2 1]^2 / 16, then OpenCV's ksize-3 Laplacian [2 0 2; 0 -8 0; 2 0 2], mirrored borders."""
    grey = np.random.default_rng(1).integers(0, 256, (17, 23), dtype=np.uint8)

    def filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        p = np.pad(x, 1, mode="reflect")
        h, w = x.shape
        return sum(kernel[i, j] * p[i : i + h, j : j + w] for i in range(3) for j in range(3))

    blurred = np.floor(filtered(grey.astype(float), np.outer([1, 2, 1], [1, 2, 1]) / 16) + 0.5)
    laplacian = filtered(blurred, np.array([[2, 0, 2], [0, -8, 0], [2, 0, 2]], float))
    assert sharpness(grey) == pytest.approx(np.abs(laplacian).mean(), rel=0.02)


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
