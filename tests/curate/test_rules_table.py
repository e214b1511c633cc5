"""The curation rules of the TEMPLE authors on cases worked by hand. Each names the function of lscpku/TEMPLE that it is
worked from; where ours differs on purpose, the case says what theirs gives."""

from __future__ import annotations

import numpy as np
import pytest

from tempo_fast.config import CurateConfig
from tempo_fast.curate.grouping import group_problem, group_shots, runs
from tempo_fast.curate.keyframes import keyframes
from tempo_fast.curate.keyframes import windows as keyframe_windows
from tempo_fast.curate.shots import cuts_to_shots, long_enough, middle, scores_to_shots, shot_problem
from tempo_fast.curate.transnet import batches, join_windows, windows

CONFIG = CurateConfig()
Ranges = list[tuple[int, int]]


# -- tools/transnet/__init__.py: predict ------------------------------------------------------------------------------

LAYOUTS: list[tuple[int, Ranges]] = [
    (1, [(0, 1)]),
    (1999, [(0, 1999)]),
    (2000, [(0, 2000)]),
    (2001, [(0, 2001)]),  # 1 frame left: less than ``final``, the window takes it in
    (2399, [(0, 2399)]),
    (2400, [(0, 2000), (1600, 2400)]),  # 400 left: not less
    (3600, [(0, 2000), (1600, 3600)]),
    (3999, [(0, 2000), (1600, 3999)]),
    (4000, [(0, 2000), (1600, 3600), (3200, 4000)]),
    (5200, [(0, 2000), (1600, 3600), (3200, 5200)]),
    (10_000, [(0, 2000), (1600, 3600), (3200, 5200), (4800, 6800), (6400, 8400), (8000, 10_000)]),
]


@pytest.mark.parametrize("n, layout", LAYOUTS, ids=[f"predict: {n} frames" for n, _ in LAYOUTS])
def test_windows_of_the_network(n: int, layout: Ranges) -> None:
    assert windows(n) == layout


def test_each_window_gives_its_frames_without_half_an_overlap() -> None:
    """predict: ``start_p`` is 200 but for the first window, ``end_p`` 200 before the end but for the last."""
    ranges = windows(4000)
    whose = join_windows(ranges, [np.full(end - start, k) for k, (start, end) in enumerate(ranges)])
    assert [int((whose == k).sum()) for k in range(3)] == [1800, 1600, 600] and (np.diff(whose) >= 0).all()


def test_windows_of_one_length_go_through_the_network_together() -> None:
    ranges = windows(10_000)
    assert batches(ranges, 1) == [[r] for r in ranges] and batches(ranges, 6) == [ranges]
    assert batches(ranges, 2) == [ranges[:2], ranges[2:4], ranges[4:]]
    assert batches(windows(3999), 4) == [[(0, 2000)], [(1600, 3999)]]


# -- tools/transnet/__init__.py: get_cuts -----------------------------------------------------------------------------
# n frames and those above the threshold -> shots of at least 8 frames. Theirs, as slices, end a frame earlier.

CUTS: list[tuple[str, int, list[int], Ranges]] = [
    ("no transition", 30, [], [(0, 30)]),
    ("a hard cut: its frame ends the shot, the next one starts", 30, [14], [(0, 15), (15, 30)]),
    ("a fade of three frames: the second and third are in no shot", 30, [14, 15, 16], [(0, 15), (17, 30)]),
    ("8 frames with the transition's first", 30, [7], [(0, 8), (8, 30)]),
    ("7 frames are too few (theirs then starts the last shot at 0)", 30, [6], [(7, 30)]),
    ("7 frames are too few (theirs then starts the next shot on 6)", 40, [6, 20], [(7, 21), (21, 40)]),
    ("8 frames between", 40, [10, 18], [(0, 11), (11, 19), (19, 40)]),
    ("7 frames between", 40, [10, 17], [(0, 11), (18, 40)]),
    ("8 frames at the end", 29, [20], [(0, 21), (21, 29)]),
    ("7 frames at the end", 28, [20], [(0, 21)]),
    ("a transition at the last frame", 30, [14, 29], [(0, 15), (15, 30)]),
    ("a transition at the first frame (theirs starts at 0)", 30, [0], [(1, 30)]),
    ("nothing but transition: one shot", 30, list(range(30)), [(0, 30)]),
    ("two fades", 60, [9, 10, 30, 31, 32], [(0, 10), (11, 31), (33, 60)]),
]


@pytest.mark.parametrize("n, hot, shots", [c[1:] for c in CUTS], ids=[f"get_cuts: {c[0]}" for c in CUTS])
def test_shots_from_scores(n: int, hot: list[int], shots: Ranges) -> None:
    scores = np.full(n, 0.5)  # the threshold itself is no transition
    scores[hot] = np.nextafter(0.5, 1)
    times = [i / 25 for i in range(n + 1)]
    assert long_enough(scores_to_shots(scores, 0.5), times, CONFIG) == shots


def test_shots_from_cuts() -> None:
    assert cuts_to_shots([], 10) == [(0, 10)]
    assert cuts_to_shots([4, 7, 7, 0, 10], 10) == [(0, 4), (4, 7), (7, 10)]


# -- preprocess.py: scene_detect, filter_by_scenes --------------------------------------------------------------------

RATES = {"25": 25.0, "30": 30.0, "29.97": 30000 / 1001, "50": 50.0, "59.94": 60000 / 1001, "60": 60.0, "120": 120.0}


@pytest.mark.parametrize("rate", RATES)
def test_shots_of_two_tenths_of_a_second(rate: str) -> None:
    """scene_detect: dropped while frames < 0.2 * fps; get_cuts: while frames < 8."""
    fps, fewest = RATES[rate], {"50": 10, "59.94": 12, "60": 12, "120": 24}.get(rate, 8)
    times = [100 + i / fps for i in range(200)]
    for n in (fewest - 1, fewest):
        assert long_enough([(70, 70 + n)], times, CONFIG) == ([(70, 70 + n)] if n == fewest else [])


@pytest.mark.parametrize("rate", RATES)
def test_shots_of_sixteen_seconds(rate: str) -> None:
    """filter_by_scenes: filtered when end - start > 16 * fps, so that 16 s themselves are kept."""
    fps, most = RATES[rate], {"29.97": 479, "59.94": 959}.get(rate) or int(16 * RATES[rate])
    times = [i / fps for i in range(4 * most + 10)]
    others = [(0, 100), (100, 200), (200, 300)]
    assert shot_problem([*others, (300, 300 + most)], 4, times, CONFIG) == ""
    problem = shot_problem([*others, (300, 301 + most)], 4, times, CONFIG)
    assert problem == "a shot longer than curate.max_shot_s 16"


@pytest.mark.parametrize("n", range(1, 41))
def test_four_to_thirty_two_shots(n: int) -> None:
    """filter_by_scenes: filtered when len > 32 or len < 4."""
    times = [i / 25 for i in range(10 * n + 1)]
    problem = shot_problem([(10 * i, 10 * i + 10) for i in range(n)], n, times, CONFIG)
    few = f"{n} shot{'s' * (n > 1)}, fewer than curate.min_shots 4"
    assert problem == (few if n < 4 else f"{n} shots, more than curate.max_shots 32" if n > 32 else "")


@pytest.mark.parametrize("shot, frame", [((0, 8), 4), ((0, 9), 4), ((10, 19), 14), ((100, 301), 200), ((5, 6), 5)])
def test_the_frame_that_stands_for_a_shot(shot: tuple[int, int], frame: int) -> None:
    """tools/loader.py: get_frame_indices with n_frms 1: int(frames / 2) after the start."""
    assert middle(*shot) == frame


# -- tools/similarity.py: merge_items ---------------------------------------------------------------------------------


def symmetric(n: int, pairs: dict[tuple[int, int], float], other: float = 0.0) -> np.ndarray:
    s = np.full((n, n), other)
    np.fill_diagonal(s, 1)
    for (i, j), value in pairs.items():
        s[i, j] = s[j, i] = value
    return s


Pairs = dict[tuple[int, int], float]
MATRICES: list[tuple[str, int, Pairs, float, list[int]]] = [
    ("nothing alike", 4, {}, 0.8, [0, 1, 2, 3]),
    ("all the same", 4, {(i, j): 1.0 for i in range(4) for j in range(i)}, 0.8, [0, 0, 0, 0]),
    ("the threshold itself does not merge", 2, {(0, 1): 0.8}, 0.8, [0, 1]),
    ("just above it does", 2, {(0, 1): float(np.nextafter(0.8, 1))}, 0.8, [0, 0]),
    ("a scene that comes back", 5, {(1, 4): 0.9, (0, 3): 0.85}, 0.8, [0, 1, 2, 0, 1]),
    # .95 merges 0 and 2; with 1 the mean is (.9 + .6) / 2 = .75, though 0 and 1 alone are above
    ("a mean that falls under", 3, {(0, 2): 0.95, (0, 1): 0.9, (1, 2): 0.6}, 0.8, [0, 1, 0]),
    ("a mean that stays above", 3, {(0, 2): 0.95, (0, 1): 0.9, (1, 2): 0.6}, 0.7, [0, 0, 0]),
    # 0-1 at .9, then 2 at (.85 + .78) / 2 = .815, then 3 at ((.78 + .84) / 2 + .81) / 2 = .81
    ("a chain", 4, {(0, 1): 0.9, (1, 2): 0.85, (0, 2): 0.78, (2, 3): 0.81, (1, 3): 0.84, (0, 3): 0.78}, 0.8, [0] * 4),
    # the same with 0-3 at .74: ((.74 + .84) / 2 + .805) / 2 = .7975 stops there
    ("a broken chain", 4, {(0, 1): 0.9, (1, 2): 0.85, (0, 2): 0.78, (2, 3): 0.805, (1, 3): 0.84, (0, 3): 0.74}, 0.8,
     [0, 0, 0, 1]),
    # means are of rows, not of members: 3 joins at ((.9 + .7) / 2 + .9) / 2 = .85; the mean of its three is .833
    ("rows weigh alike", 4, {(0, 1): 0.99, (0, 2): 0.98, (1, 2): 0.98, (0, 3): 0.9, (1, 3): 0.7, (2, 3): 0.9}, 0.84,
     [0, 0, 0, 0]),
    ("rows weigh alike, too far", 4,
     {(0, 1): 0.99, (0, 2): 0.98, (1, 2): 0.98, (0, 3): 0.9, (1, 3): 0.7, (2, 3): 0.9}, 0.86, [0, 0, 0, 1]),
    # equal pairs: (1, 0) before (2, 1), since its later shot comes first; 2 then has (.5 + .9) / 2 = .7
    ("a tie: the earlier later shot", 3, {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.5}, 0.8, [0, 0, 1]),
    # equal pairs with one later shot: the nearer earlier one; 0 then has (.5 + .9) / 2 = .7
    ("a tie: the nearer of two", 3, {(0, 2): 0.9, (1, 2): 0.9, (0, 1): 0.5}, 0.8, [0, 1, 1]),
    # 0-1 merge and go to the end: of two pairs at .9, (3, 2) now comes first, and their mean with 0-1 is .6
    ("a tie after a merge", 4, {(0, 1): 0.95, (2, 3): 0.9, (0, 2): 0.9, (1, 2): 0.9, (0, 3): 0.3, (1, 3): 0.3}, 0.8,
     [0, 0, 1, 1]),
    ("two merges at once", 6, {(0, 5): 0.9, (1, 4): 0.9, (2, 3): 0.9}, 0.8, [0, 1, 2, 2, 1, 0]),
]  # fmt: skip


@pytest.mark.parametrize(
    "n, pairs, threshold, groups", [m[1:] for m in MATRICES], ids=[f"merge_items: {m[0]}" for m in MATRICES]
)
def test_grouping(n: int, pairs: Pairs, threshold: float, groups: list[int]) -> None:
    s = symmetric(n, pairs)
    assert group_shots(s, threshold) == groups
    assert np.array_equal(s, symmetric(n, pairs)), "the matrix is the caller's"


@pytest.mark.parametrize("n", range(4, 33))
def test_two_scenes_in_turn(n: int) -> None:
    """merge_items: two blocks, each alike within (.9), unlike between (.2)."""
    kind = np.arange(n) % 2
    s = np.where(kind[:, None] == kind, 0.9, 0.2)
    assert group_shots(s, 0.8) == kind.tolist()


def test_one_shot_and_no_matrix() -> None:
    assert group_shots(np.ones((1, 1)), 0.8) == [0]
    with pytest.raises(ValueError, match="square"):
        group_shots(np.ones((2, 3)), 0.8)


# -- preprocess.py: clip_grouping, filter_by_groups -------------------------------------------------------------------

RUNS: list[tuple[list[int], Ranges]] = [
    ([0, 1, 2, 3], [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ([0, 0, 1, 0, 2, 2, 2], [(0, 2), (2, 3), (3, 4), (4, 7)]),
    ([0, 0, 0, 0], [(0, 4)]),
]


@pytest.mark.parametrize("groups, clips", RUNS, ids=[f"clip_grouping: {g}" for g, _ in RUNS])
def test_clips_are_runs(groups: list[int], clips: Ranges) -> None:
    assert runs(groups) == clips


@pytest.mark.parametrize("n", range(4, 33))
def test_how_often_a_scene_may_come_back(n: int) -> None:
    """filter_by_groups: filtered when a group's runs > clips // 3, or >= 4."""
    most = 1 if n < 6 else 2 if n < 9 else 3
    for count in (most, most + 1):
        clips = list(range(1, n + 1))
        clips[0 : 2 * count : 2] = [0] * count
        problem = "" if count == most else f"one scene comes back in {count} of {n} clips (at most {most})"
        assert group_problem(clips, 4, 3) == problem


@pytest.mark.parametrize("n", range(1, 4))
def test_four_clips(n: int) -> None:
    """filter_by_groups: filtered when there are fewer than 4."""
    assert group_problem(list(range(n)), 4, 3) == f"{n} clips, fewer than curate.min_clips 4"


# -- preprocess.py: extract_frames ------------------------------------------------------------------------------------

WINDOWS: list[tuple[tuple[int, int], Ranges]] = [
    ((0, 90), [(15, 45), (45, 75)]),  # interval 30: 30 and 60, half 15
    ((100, 190), [(115, 145), (145, 175)]),
    ((10, 30), [(13, 19), (20, 26)]),  # interval 6.67: int(16.67), int(23.33), half 3
    ((3, 28), [(7, 15), (15, 23)]),  # interval 8.33: int(11.33), int(19.67), half 4
    ((0, 8), [(1, 3), (4, 6)]),  # interval 2.67: int(2.67), int(5.33), half 1
    ((0, 400), [(67, 199), (200, 332)]),  # interval 133.33: 133 and 266, half 66
]


@pytest.mark.parametrize("clip, expected", WINDOWS, ids=[f"extract_frames: {c}" for c, _ in WINDOWS])
def test_windows_of_keyframes(clip: tuple[int, int], expected: Ranges) -> None:
    assert [(w.start, w.stop) for w in keyframe_windows(*clip)] == expected


def test_clips_too_short_for_a_window_give_their_thirds() -> None:
    """No clip of the authors' is that short."""
    assert [keyframes(0, n, dict.fromkeys(range(n), 1.0)) for n in (1, 2, 3, 5)] == [[0], [0, 1], [1, 2], [1, 3]]


# In a window of 30 frames a score d frames away counts cos(pi * d / 30): .866 at 5, .5 at 10, .105 at 14, 0 at -15
PEAKS: list[tuple[str, dict[int, float], list[int]]] = [
    ("a flat clip", {}, [30, 60]),
    ("5 away, 2 x .866 > 1", {25: 2.0, 65: 2.0}, [25, 65]),
    ("10 away, 1.9 x .5 < 1", {20: 1.9, 70: 1.9}, [30, 60]),
    ("10 away, 2.1 x .5 > 1", {20: 2.1, 70: 2.1}, [20, 70]),
    ("14 away, 9 x .105 < 1", {44: 9.0}, [30, 60]),
    ("14 away, 10 x .105 > 1", {44: 10.0}, [44, 60]),
    ("where a window begins nothing counts", {15: 1e9, 45: 1e9}, [30, 60]),
    ("outside of all windows nothing counts", {14: 1e9, 75: 1e9}, [30, 60]),
    ("of equals, the first", {25: 2.0, 35: 2.0}, [25, 60]),
]  # fmt: skip


@pytest.mark.parametrize("peaks, expected", [p[1:] for p in PEAKS], ids=[f"extract_frames: {p[0]}" for p in PEAKS])
def test_keyframes(peaks: dict[int, float], expected: list[int]) -> None:
    assert keyframes(0, 90, {i: peaks.get(i, 1.0) for i in range(90)}) == expected
    assert keyframes(50, 140, {i + 50: peaks.get(i, 1.0) for i in range(90)}) == [i + 50 for i in expected]


def test_a_clip_without_any_edge_gives_its_thirds() -> None:
    """extract_frames would give the windows' first frames, 15 and 45: all weighted scores are 0."""
    assert keyframes(0, 90, dict.fromkeys(range(90), 0.0)) == [30, 60]
