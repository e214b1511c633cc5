"""Intervals over videos, and the scores of free captions, against counts by hand and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.evaluation.captions import score_caption
from tempo_fast.events import kendall_tau, matched_order
from tempo_fast.stats import bootstrap, share_interval

A, B, C = "A red circle moves left.", "An orange ring grows.", "A blue cross appears."


def test_interval_of_a_share_is_the_binomials():
    """One question a video: the bootstrap distribution is binomial(n, p) / n, whose percentiles are known."""
    n, k = 40, 26
    s = bootstrap([1] * k + [0] * (n - k), [1] * n, 20_000, 0)
    assert s["value"] == k / n and s["n"] == s["items"] == n
    cdf = np.cumsum([math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n + 1)])
    assert s["lo"] == pytest.approx(np.searchsorted(cdf, 0.025) / n, abs=1.01 / n)
    assert s["hi"] == pytest.approx(np.searchsorted(cdf, 0.975) / n, abs=1.01 / n)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """200 worlds of 30 videos with 5 correlated questions each: 95 % intervals, between 88 and 100 % found."""
    rng = np.random.default_rng(0)
    covered = 0
    for world in range(200):
        skill = rng.beta(3, 2, 30)
        s = bootstrap(rng.binomial(5, skill), [5] * 30, 400, world)
        covered += s["lo"] <= 0.6 <= s["hi"]
    assert 0.88 <= covered / 200


def test_videos_are_resampled_whole_and_empty_ones_left_out():
    s = bootstrap([8, 0, 5], [8, 8, 0], 500, 1)
    assert (s["value"], s["lo"], s["hi"], s["n"], s["items"]) == (0.5, 0.0, 1.0, 2, 16)
    assert bootstrap([], [], 10, 0) == {"value": None, "lo": None, "hi": None, "n": 0, "items": 0}
    assert bootstrap([1, 0, 1], [1, 1, 1], 100, 4) == bootstrap([1, 0, 1], [1, 1, 1], 100, 4)


@given(st.permutations(range(7)), st.integers(0, 7))
def test_tau_is_the_share_of_pairs_in_order(order, n):
    order = order[:n]
    pairs = [np.sign(b - a) for a, b in itertools.combinations(order, 2)]
    assert kendall_tau(order) == (pytest.approx(np.mean(pairs)) if n >= 2 else None)


def test_captions_by_hand():
    right = score_caption(f"{A} {B} {C}", [A, B, C])
    assert (right.events, right.objects, right.order_tau) == (1, 1, 1)
    back = score_caption(f"{C} {B}  {A}", [A, B, C])
    assert (back.events, back.objects, back.order_tau) == (1, 1, -1)
    # the right object doing something else, one event missing, one told twice, any case
    some = score_caption(f"A RED circle grows. {C} {C} ", [A, B, C])
    assert some.events == pytest.approx(2 * 1 / (3 + 3))
    assert some.objects == pytest.approx(2 / 3)
    assert some.order_tau is None
    assert score_caption("", [A, B]) == score_caption("\n", [A, B])
    assert (score_caption("", [A]).events, score_caption("", [A]).objects) == (0, 0)


def test_equal_events_match_one_by_one():
    assert matched_order(["b", "a", "a", "a", "x"], ["a", "b", "a"]) == [1, 0, 2]
    assert matched_order(["a", "a"], ["b"]) == []


@given(st.integers(1, 5000), st.data())
def test_wilsons_interval_solves_its_equation(n, data):
    """Its ends are the shares p for which k / n is 1.96 standard errors, sqrt(p (1 - p) / n), away."""
    k = data.draw(st.integers(0, n))
    s = share_interval(k, n)
    assert 0 <= s["lo"] <= s["value"] == k / n <= s["hi"] <= 1 and s["n"] == n
    for end, edge in ((s["lo"], 0), (s["hi"], n)):
        if k == edge:
            assert end == pytest.approx(k / n, abs=1e-12)
        else:
            assert (k / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, rel=1e-6)


def test_wilsons_interval_of_known_cases():
    assert share_interval(0, 10)["hi"] == pytest.approx(0.27753, abs=1e-5)
    assert [share_interval(5, 10)[e] for e in ("lo", "hi")] == pytest.approx([0.23659, 0.76341], abs=1e-5)
    assert share_interval(0, 0) == {"value": None, "lo": None, "hi": None, "n": 0}
    for k, n in ((-1, 4), (5, 4)):
        with pytest.raises(ValueError):
            share_interval(k, n)
