"""Edits (mask, local shuffles, speed, freeze, repeat, splice) against slow recounts and exact means over all draws."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction
from statistics import fmean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.perturb import EDITS, KINDS, ClipOrder, broken_adjacencies, perturb

RS = [2, 3, 4, 8, 16]
ns = st.integers(1, 70)
rs = st.sampled_from(RS)
seeds = st.integers(0, 2**31)
relaxed = settings(deadline=None)


def draw(kind: str, n: int, r: int, seed: int, other: int | None = None) -> ClipOrder:
    edit = perturb(kind, n, r, seed, other=n if other is None else other)
    assert edit is not None
    return edit


def least(kind: str) -> int:
    """The smallest n that the kind can change."""
    return 3 if kind == "speed" else 2


def cuts(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def windows(n: int) -> list[range]:
    return cuts(n, max(2, n // 4))


def piece(n: int, r: int) -> int:
    """The rule once more, from the window's side: a window is cut as ``shuffle`` cuts a video of its length."""
    return max(1, max(2, n // 4) // r)


def recount(edit: ClipOrder) -> tuple[Fraction, Fraction]:
    """(broken, kept), unit by unit."""
    hidden = edit.blank or (False,) * len(edit.order)
    seen = [None if h else i for i, h in zip(edit.order, hidden, strict=True)]
    kept = sum(i in seen for i in range(edit.n))
    intact = 0
    for i in range(edit.n - 1):
        intact += any(seen[k] == i and seen[k + 1] == i + 1 for k in range(len(seen) - 1))
    return 1 - Fraction(intact, edit.n - 1), Fraction(kept, edit.n)


@relaxed
@given(st.sampled_from(EDITS), ns, rs, seeds)
def test_every_edit(kind: str, n: int, r: int, seed: int) -> None:
    """What holds of all kinds: reproducible, never the identity, n shown, broken and kept as in a slow recount."""
    edit = perturb(kind, n, r, seed, other=n)
    assert edit == perturb(kind, n, r, seed, other=n)
    if n < least(kind):
        assert edit is None
        return
    assert edit is not None and (edit.n, edit.kind, edit.r, edit.seed) == (n, kind, r, seed)
    assert len(edit.order) == n
    assert any(edit.blank) or edit.order != tuple(range(n))
    assert bool(edit.blank) == (kind in ("mask", "mask_local_shuffle"))
    broken, kept = recount(edit)
    assert edit.broken == pytest.approx(float(broken), abs=1e-12) and 0 < broken <= 1
    assert edit.kept == float(kept) and 0 <= kept <= 1


@relaxed
@given(st.sampled_from(["mask", "mask_local_shuffle"]), st.integers(2, 200), rs, seeds)
def test_blank_share(kind: str, n: int, r: int, seed: int) -> None:
    """k of n blank with 1/4 <= k/n <= 1/2 exactly, without rounding; hence at least one and never all."""
    edit = draw(kind, n, r, seed)
    blank = sum(edit.blank)
    assert len(edit.blank) == n and n <= 4 * blank and 2 * blank <= n
    assert edit.kept == (n - blank) / n


@pytest.mark.parametrize("kind", ["mask", "mask_local_shuffle"])
def test_blank_count_is_uniform(kind: str) -> None:
    """16 units: 4 to 8 of them, each with probability 1/5 (five sigma of a binomial)."""
    draws = 1500
    counts = Counter(sum(draw(kind, 16, 2, seed).blank) for seed in range(draws))
    assert set(counts) == {4, 5, 6, 7, 8}
    assert all(abs(c - draws / 5) < 5 * math.sqrt(draws * 0.16) for c in counts.values())


@relaxed
@given(st.integers(2, 70), rs, seeds)
def test_mask_blanks_groups(n: int, r: int, seed: int) -> None:
    """Order untouched; whole groups are blank, but for one at most, whose blank units are its first."""
    edit = draw("mask", n, r, seed)
    assert edit.order == tuple(range(n))
    parts = [[edit.blank[i] for i in group] for group in cuts(n, max(1, n // r))]
    assert sum(any(p) and not all(p) for p in parts) <= 1
    assert all(p == sorted(p, reverse=True) for p in parts)


def test_masked_units_are_uniform() -> None:
    """With single units (g = 1) every one of 8 is blank as often: half of the mean count 3, five sigma."""
    for kind, r in (("mask", 8), ("mask_local_shuffle", 2)):
        draws = 1500
        hits = Counter(k for seed in range(draws) for k, hidden in enumerate(draw(kind, 8, r, seed).blank) if hidden)
        p = 3 / 8
        assert all(abs(hits[k] - draws * p) < 5 * math.sqrt(draws * p * (1 - p)) for k in range(8)), hits


@relaxed
@given(st.sampled_from(["local_shuffle", "mask_local_shuffle"]), st.integers(2, 70), rs, seeds)
def test_windows_are_respected(kind: str, n: int, r: int, seed: int) -> None:
    """Each window shows its own units, and is made of its pieces, each in order; something moved."""
    order = draw(kind, n, r, seed).order
    assert order != tuple(range(n))
    for window in windows(n):
        pieces = [tuple(window[k] for k in p) for p in cuts(len(window), piece(n, r))]
        rest, seen = order[window.start : window.stop], []
        while rest:
            seen.append(next(p for p in pieces if rest[: len(p)] == p))
            rest = rest[len(seen[-1]) :]
        assert sorted(seen) == pieces


@relaxed
@given(st.integers(3, 70), rs, seeds)
def test_speed_keeps_step(n: int, r: int, seed: int) -> None:
    """Of 3s units in a row s are shown twice, s once and s never, in order; the rest is as it was."""
    order = draw("speed", n, r, seed).order
    s = max(1, (n - max(1, n // r)) // 3)
    assert list(order) == sorted(order)
    assert Counter(Counter(order)[i] for i in range(n)) == +Counter({2: s, 1: n - 2 * s, 0: s})
    faster = [2 * k for k in range(s)] + [2 * s + k // 2 for k in range(2 * s)]
    slower = [k // 2 for k in range(2 * s)] + [s + 1 + 2 * k for k in range(s)]
    assert any(
        list(order) == [*range(a), *(a + i for i in warp), *range(a + 3 * s, n)]
        for a in range(n - 3 * s + 1)
        for warp in (faster, slower)
    )


def test_speed_goes_both_ways() -> None:
    """Faster first and slower first, about equally often (five sigma of 400 coins)."""
    first = [Counter(draw("speed", 12, 4, seed).order).most_common() for seed in range(400)]
    slower = sum(min(i for i, c in f if c == 2) < min(set(range(12)) - {i for i, _ in f}) for f in first)
    assert abs(slower - 200) < 50


@relaxed
@given(st.integers(2, 70), rs, seeds)
def test_freeze_holds_one_unit(n: int, r: int, seed: int) -> None:
    edit = draw("freeze", n, r, seed)
    g = max(1, n // r)
    (held, times), *others = Counter(edit.order).most_common()
    assert times == n - g + 1 and all(c == 1 for _, c in others)
    assert edit.order == tuple(i if i <= held or i > held + n - g else held for i in range(n))
    assert edit.kept == g / n


@relaxed
@given(st.integers(2, 70), rs, seeds)
def test_repeat_plays_a_segment_again(n: int, r: int, seed: int) -> None:
    """Up to a place the video, then n - g units of the segment before it, over and over, then the video in step."""
    edit = draw("repeat", n, r, seed)
    g = max(1, n // r)
    end = next(k for k in range(1, n) if edit.order[k] != k)
    start = edit.order[end]
    length = end - start
    assert min(2, g) <= length and end <= g
    assert all(edit.order[k] == edit.order[k - length] for k in range(end, end + n - g))
    assert edit.order[end + n - g :] == tuple(range(end + n - g, n))
    assert set(Counter(edit.order).values()) <= {1, 1 + (n - g) // length, 1 + -(-(n - g) // length)}
    assert edit.kept == g / n


@relaxed
@given(st.integers(2, 70), rs, seeds, st.integers(0, 30))
def test_splice_shows_another_video(n: int, r: int, seed: int, more: int) -> None:
    """n - g units in a row of the other video's, at their place; its last unit is n + other - 1."""
    g = max(1, n // r)
    other = n - g + more
    order = draw("splice", n, r, seed, other).order
    foreign = [k for k, i in enumerate(order) if i >= n]
    assert foreign == list(range(foreign[0], foreign[0] + n - g))
    assert [order[k] for k in foreign] == list(range(order[foreign[0]], order[foreign[0]] + n - g))
    assert order[foreign[-1]] < n + other
    assert all(order[k] == k for k in range(n) if k not in foreign)


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        ("speed", 2 * 7),  # s = 2: six units in a row of twelve, faster or slower first
        ("freeze", 6),  # the unit held and the six after it
        ("repeat", 5 + 4 + 3 + 2 + 1),  # two to six units that end before the seventh
        ("splice", 7 * 3),  # where it begins, and where in the eight units of the other video
    ],
)
def test_every_place_is_drawn(kind: str, ways: int) -> None:
    assert len({draw(kind, 12, 2, seed, 8).order for seed in range(500)}) == ways


@pytest.mark.parametrize("kind", EDITS)
def test_seeds_differ(kind: str) -> None:
    """Another seed, another edit, somewhere; equal n // r, the same edit."""
    edits = [draw(kind, 24, 4, seed) for seed in range(20)]
    assert len({(e.order, e.blank) for e in edits}) > 1
    coarse, fine = draw(kind, 7, 8, 3), draw(kind, 7, 16, 3)
    assert (coarse.order, coarse.blank) == (fine.order, fine.blank)


@relaxed
@given(st.sampled_from(EDITS), st.integers(2, 24), rs, st.integers(0, 1000), st.data())
def test_labels(kind: str, n: int, r: int, seed: int, data: st.DataObject) -> None:
    """Shown labels equal to the original's, with nothing blank or foreign, are the identity."""
    labels = data.draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    edit = perturb(kind, n, r, seed, labels=labels, other=n)
    if edit is None:
        assert kind not in ("mask", "mask_local_shuffle", "splice")
    else:
        assert any(edit.blank) or max(edit.order) >= n or edit.apply(labels) != labels


@pytest.mark.parametrize("kind", EDITS)
def test_all_labels_equal(kind: str) -> None:
    edit = perturb(kind, 8, 4, 0, labels=["x"] * 8, other=8)
    assert (edit is None) == (kind in ("local_shuffle", "speed", "freeze", "repeat"))


@pytest.mark.parametrize("kind", ["speed", "freeze", "repeat", "splice"])
@relaxed
@given(n=st.integers(3, 48), seed=seeds)
def test_broken_never_falls_with_r(kind: str, n: int, seed: int) -> None:
    """For every seed, over every r that n tells apart; and kept never rises."""
    told_apart = {n // r: r for r in range(n + 1, 1, -1)}
    edits = [draw(kind, n, r, seed) for r in sorted(told_apart.values())]
    broken = [e.broken for e in edits]
    kept = [e.kept for e in edits]
    assert broken == sorted(broken) and kept == sorted(kept, reverse=True)


def shuffled_mean(n: int, parts: list[range], size: int) -> Fraction:
    """Mean of broken over all ways but the identity to permute pieces of ``size`` units inside ``parts``.

    A border between two of a part's k pieces stays whole in (k-1)!/k! of its permutations, so a part keeps (k-1)/k of
    them; the border between parts of k and m pieces in 1/(km). The identity keeps all, and is taken out.
    """
    k = [len(cuts(len(part), size)) for part in parts]
    intact = sum((Fraction(x - 1, x) for x in k), Fraction())
    intact += sum((Fraction(1, a * b) for a, b in itertools.pairwise(k)), Fraction())
    identity = Fraction(1, math.prod(math.factorial(x) for x in k))
    return (sum(k) - 1 - intact) / (1 - identity) / (n - 1)


def masked_mean(n: int, g: int) -> Fraction:
    """Mean of broken over every order of the groups and every count, by going through all of them."""
    total, draws = 0, 0
    for groups in itertools.permutations(cuts(n, g)):
        order = [i for group in groups for i in group]
        for count in range(-(-n // 4), n // 2 + 1):
            blank = set(order[:count])
            total += sum(i in blank or i + 1 in blank for i in range(n - 1))
            draws += 1
    return Fraction(total, draws * (n - 1))


def single_mask(n: int) -> Fraction:
    """Share of adjacencies that survive single blanks: both units are among the n - k visible; mean over k."""
    counts = range(-(-n // 4), n // 2 + 1)
    return sum((Fraction((n - k) * (n - k - 1), n * (n - 1)) for k in counts), Fraction()) / len(counts)


def exact_mean(kind: str, n: int, r: int) -> Fraction:
    if kind == "mask":
        return masked_mean(n, max(1, n // r))
    if kind == "drop":  # both of g units kept of n
        g = max(1, n // r)
        return 1 - Fraction(g * (g - 1), n * (n - 1))
    if kind == "shuffle":
        return shuffled_mean(n, [range(n)], max(1, n // r))
    local = shuffled_mean(n, windows(n), piece(n, r))
    return local if kind == "local_shuffle" else 1 - (1 - local) * single_mask(n)


@pytest.mark.parametrize("kind", ["drop", "shuffle", "local_shuffle", "mask_local_shuffle"])
def test_exact_mean_of_broken_never_falls_with_r(kind: str) -> None:
    for n in range(2, 61):
        means = [exact_mean(kind, n, r) for r in range(2, n + 1)]
        assert means == sorted(means), n


def test_exact_mean_of_broken_by_masks_never_falls_with_r() -> None:
    """All orders of at most 7 groups (5040)."""
    for n in range(2, 15):
        sizes = sorted({max(1, n // r) for r in range(2, n + 1)}, reverse=True)
        means = [masked_mean(n, g) for g in sizes if n <= 7 * g]
        assert means == sorted(means), n


@pytest.mark.parametrize("kind", ["drop", "shuffle", "local_shuffle", "mask", "mask_local_shuffle"])
@pytest.mark.parametrize(("n", "r"), [(7, 2), (7, 4), (13, 2), (13, 4), (16, 2), (24, 3)])
def test_draws_have_the_exact_mean(kind: str, n: int, r: int) -> None:
    """500 seeds, five standard errors: what the means above are of is what is drawn."""
    values = [draw(kind, n, r, seed).broken for seed in range(500)]
    assert abs(fmean(values) - exact_mean(kind, n, r)) <= 5 * stdev(values) / math.sqrt(len(values)) + 1e-12


def test_broken_by_hand() -> None:
    assert broken_adjacencies(4, [0, 1, 2, 3], [False, True, False, False]) == pytest.approx(2 / 3)
    assert broken_adjacencies(4, [0, 1, 2, 3], [True, False, False, False]) == pytest.approx(1 / 3)
    assert broken_adjacencies(4, [0, 0, 1, 1]) == pytest.approx(2 / 3)  # slow motion: 0 is still followed by 1
    assert broken_adjacencies(4, [0, 1, 0, 1]) == pytest.approx(2 / 3)  # twice shown, one adjacency
    assert broken_adjacencies(4, [0, 1, 4, 5]) == pytest.approx(2 / 3)  # 4 and 5 are another video's
    assert broken_adjacencies(2, [1, 2]) == 1  # the last unit, then another video's first


def test_draws_of_pairs_stay_what_they_were() -> None:
    """Pairs on disk were drawn by these: a seed must go on giving the same order."""
    known = {"drop": (3, 6), "shuffle": (2, 3, 4, 5, 6, 0, 1), "reverse": (6, 4, 5, 2, 3, 0, 1)}
    for kind in KINDS:
        assert draw(kind, 7, 3, 11).order == known[kind]


@pytest.mark.parametrize(
    ("kind", "n", "r", "options", "names"),
    [
        ("twist", 4, 2, {}, ["twist", "splice", "drop"]),
        ("mask", 0, 2, {}, ["n=0"]),
        ("freeze", 4, 1, {}, ["r=1"]),
        ("speed", 4, 2, {"labels": [1]}, ["labels"]),
        ("splice", 8, 4, {}, ["splice", "other"]),
        ("splice", 8, 4, {"other": 5}, ["splice", "other=5", "6"]),
    ],
)
def test_bad_arguments(kind: str, n: int, r: int, options: dict, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        perturb(kind, n, r, 0, **options)
    assert all(name in str(error.value) for name in names)
