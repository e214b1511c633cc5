"""Perturbations of 4 to 32 clips at r = 16, 8, 4, 2, held against tables worked by hand from the authors' rule.

The rule, as read in lscpku/TEMPLE (commit 59f135d), inference/generator_base.py, generate_rejected_response, where
``magnitude`` is r and ``num_clips`` is n:

- drop: num_kept_clips = max(1, n // r); the indices to leave out are a random sample, the others keep their order;
- shuffle: group_size = max(1, n // r), groups are consecutive (the last one holds the rest), random.shuffle(groups);
- reverse: the same groups, groups.reverse(), the order inside a group kept.

Videos have 4 clips at least and 32 shots at most (preprocess.py, filter_by_scenes and filter_by_groups). What the
authors do not do: a draw that changes nothing is drawn again.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tempo_fast.perturb import KINDS, perturb

# max(1, n // r) for n = 4, 5, ... 32
SIZES = {
    16: "1 1 1 1  1 1 1 1  1 1 1 1  1 1 1 1  1 1 1 1  1 1 1 1  1 1 1 1  2",
    8: "1 1 1 1  1 1 1 1  1 1 1 1  2 2 2 2  2 2 2 2  3 3 3 3  3 3 3 3  4",
    4: "1 1 1 1  2 2 2 2  3 3 3 3  4 4 4 4  5 5 5 5  6 6 6 6  7 7 7 7  8",
    2: "2 2 3 3  4 4 5 5  6 6 7 7  8 8 9 9  10 10 11 11  12 12 13 13  14 14 15 15  16",
}
NUMBERS = range(4, 33)
TABLE = {(n, r): int(g) for r, row in SIZES.items() for n, g in enumerate(row.split(), 4)}

# n, r -> groups: ceil(n / max(1, n // r))
GROUPS = {
    (4, 16): 4, (4, 2): 2, (5, 2): 3, (7, 2): 3, (9, 4): 5, (15, 8): 15, (16, 8): 8, (17, 8): 9, (17, 2): 3, (20, 4): 4,
    (23, 8): 12, (24, 8): 8, (27, 4): 5, (31, 16): 31, (31, 2): 3, (32, 16): 16, (32, 8): 8, (32, 4): 4, (32, 2): 2,
}  # fmt: skip

# groups from the last to the first, each in its own order
REVERSED = {
    (4, 16): "3|2|1|0",
    (4, 2): "2 3|0 1",
    (5, 4): "4|3|2|1|0",
    (5, 2): "4|2 3|0 1",
    (6, 2): "3 4 5|0 1 2",
    (7, 2): "6|3 4 5|0 1 2",
    (8, 4): "6 7|4 5|2 3|0 1",
    (9, 4): "8|6 7|4 5|2 3|0 1",
    (11, 4): "10|8 9|6 7|4 5|2 3|0 1",
    (14, 4): "12 13|9 10 11|6 7 8|3 4 5|0 1 2",
    (15, 16): "14|13|12|11|10|9|8|7|6|5|4|3|2|1|0",
    (17, 8): "16|14 15|12 13|10 11|8 9|6 7|4 5|2 3|0 1",
    (19, 2): "18|9 10 11 12 13 14 15 16 17|0 1 2 3 4 5 6 7 8",
    (23, 4): "20 21 22|15 16 17 18 19|10 11 12 13 14|5 6 7 8 9|0 1 2 3 4",
    (26, 8): "24 25|21 22 23|18 19 20|15 16 17|12 13 14|9 10 11|6 7 8|3 4 5|0 1 2",
    (32, 16): "30 31|28 29|26 27|24 25|22 23|20 21|18 19|16 17|14 15|12 13|10 11|8 9|6 7|4 5|2 3|0 1",
    (32, 8): "28 29 30 31|24 25 26 27|20 21 22 23|16 17 18 19|12 13 14 15|8 9 10 11|4 5 6 7|0 1 2 3",
    (32, 2): "16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31|0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
}

SEEDS = range(12)


def blocks(n: int, g: int) -> list[tuple[int, ...]]:
    """Consecutive groups of g, the last one with the rest."""
    return [tuple(i for i in range(n) if i // g == k) for k in range(-(-n // g))]


def draw(kind: str, n: int, r: int, seed: int, labels: object = None) -> tuple[int, ...] | None:
    found = perturb(kind, n, r, seed, labels=labels)  # type: ignore[arg-type]
    return None if found is None else found.order


def test_the_table_is_whole() -> None:
    assert len(TABLE) == 4 * 29 and {n for n, _ in TABLE} == set(NUMBERS)
    assert all(len(blocks(n, TABLE[n, r])) == groups for (n, r), groups in GROUPS.items())


@pytest.mark.parametrize("r", SIZES)
def test_drop_keeps_the_tables_number_in_order(r: int) -> None:
    """num_kept_clips = max(1, num_clips // magnitude); kept clips are enumerated in order."""
    for n, seed in itertools.product(NUMBERS, SEEDS):
        kept = draw("drop", n, r, seed)
        assert kept is not None and len(kept) == TABLE[n, r] and list(kept) == sorted(set(kept)), n
        assert set(kept) < set(range(n)), n


@pytest.mark.parametrize("r", SIZES)
def test_reverse_turns_the_groups_of_the_tables_size(r: int) -> None:
    """groups.reverse(), whatever the seed."""
    for n in NUMBERS:
        g = TABLE[n, r]
        expected = tuple(sorted(range(n), key=lambda i: (-(i // g), i)))
        assert {draw("reverse", n, r, seed) for seed in SEEDS} == {expected}, n


@pytest.mark.parametrize(("n", "r"), REVERSED)
def test_reverse_worked_by_hand(n: int, r: int) -> None:
    assert draw("reverse", n, r, 0) == tuple(int(i) for i in REVERSED[n, r].replace("|", " ").split())
    assert {len(g.split()) for g in REVERSED[n, r].split("|")[1:]} == {TABLE[n, r]}


@pytest.mark.parametrize("r", SIZES)
def test_shuffle_permutes_the_groups_of_the_tables_size(r: int) -> None:
    """random.shuffle(groups): whole groups, each in its own order, and never in their own places all of them."""
    for n, seed in itertools.product(NUMBERS, SEEDS):
        groups = blocks(n, TABLE[n, r])
        rest, seen = draw("shuffle", n, r, seed), []
        assert rest is not None and rest != tuple(range(n)), n
        while rest:
            block = next(b for b in groups if rest[: len(b)] == b)
            seen.append(block)
            rest = rest[len(block) :]
        assert sorted(seen) == groups


@pytest.mark.parametrize(
    ("n", "r", "groups"), [(4, 2, 2), (32, 2, 2), (5, 2, 3), (7, 2, 3), (4, 16, 4), (8, 4, 4), (20, 4, 4)]
)
def test_shuffles_are_all_permutations_but_the_identity_alike_often(n: int, r: int, groups: int) -> None:
    """random.shuffle is uniform; with the identity drawn again the groups! - 1 others stay so. At r = 2 and even n
    there is one other, the reverse."""
    cut = blocks(n, TABLE[n, r])
    assert len(cut) == groups
    possible = {sum(p, ()) for p in itertools.permutations(cut)} - {tuple(range(n))}
    draws = 100 * len(possible)
    found = Counter(draw("shuffle", n, r, seed) for seed in range(draws))
    assert set(found) == possible
    _check_uniform(list(found.values()), draws)


@pytest.mark.parametrize(("n", "r", "sets"), [(4, 16, 4), (4, 2, 6), (5, 2, 10), (6, 2, 20), (8, 4, 28), (31, 16, 31)])
def test_drops_are_all_samples_alike_often(n: int, r: int, sets: int) -> None:
    """random.sample of what is left out, hence of what is kept: C(n, max(1, n // r)) sets."""
    possible = set(itertools.combinations(range(n), TABLE[n, r]))
    assert len(possible) == sets
    found = Counter(draw("drop", n, r, seed) for seed in range(100 * sets))
    assert set(found) == possible
    _check_uniform(list(found.values()), 100 * sets)


def _check_uniform(counts: list[int], draws: int) -> None:
    """Chi-squared below its mean and five standard deviations: 99.8 % of uniform draws, and the seeds are fixed."""
    expected, free = draws / len(counts), len(counts) - 1
    assert sum((c - expected) ** 2 / expected for c in counts) <= free + 5 * (2 * free) ** 0.5


# -- what changes nothing is no perturbation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "labels", "r", "possible"),
    [
        # two equal halves: swapping them is an identity
        ("reverse", "abab", 2, set()),
        ("shuffle", "abab", 2, set()),
        ("reverse", "abcabc", 2, set()),
        ("shuffle", "abcdabcd", 2, set()),
        # at r = 16 the same clips can be told apart
        ("reverse", "abab", 16, {"baba"}),
        # the same from behind
        ("reverse", "abcba", 16, set()),
        ("reverse", "abba", 8, set()),
        ("reverse", "abba", 2, {"baab"}),
        # groups ab|ab|c: five orders of groups, of which two look like the first
        ("shuffle", "ababc", 2, {"abcab", "cabab"}),
        ("reverse", "ababc", 2, {"cabab"}),
        # one clip that differs: it may go anywhere but to its own place
        ("shuffle", "aaab", 16, {"aaba", "abaa", "baaa"}),
        ("reverse", "aaab", 16, {"baaa"}),
        ("shuffle", "aaaa", 16, set()),
        ("reverse", "aaaaaa", 4, set()),
        # fewer clips are a change whatever they show
        ("drop", "aaaa", 16, {"a"}),
        ("drop", "aaaa", 2, {"aa"}),
        ("drop", "abab", 2, {"ab", "aa", "bb", "ba"}),
    ],
)
def test_recurring_labels_by_hand(kind: str, labels: str, r: int, possible: set[str]) -> None:
    found = set()
    for seed in range(150):
        order = draw(kind, len(labels), r, seed, labels)
        found.add(None if order is None else "".join(labels[i] for i in order))
    assert found == (possible or {None})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [4, 5, 6])
def test_recurring_labels_by_enumeration(kind: str, n: int) -> None:
    """Every sequence of two labels, every r: None exactly when no draw of the authors' rule changes the sequence."""
    for r in (16, 8, 4, 2):
        groups = blocks(n, TABLE[n, r])
        orders = {
            "drop": itertools.combinations(range(n), TABLE[n, r]),
            "shuffle": (sum(p, ()) for p in itertools.permutations(groups)),
            "reverse": [sum(groups[::-1], ())],
        }[kind]
        orders = list(orders)
        for labels in map("".join, itertools.product("ab", repeat=n)):
            possible = {"".join(labels[i] for i in order) for order in orders} - {labels}
            found = draw(kind, n, r, 7, labels)
            assert found is None if not possible else found is not None
            assert found is None or "".join(labels[i] for i in found) in possible


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_is_never_drawn(kind: str, r: int) -> None:
    """Distinct clips; clips of which every other one is the same; and two scenes in turn."""
    for n, seed in itertools.product(NUMBERS, SEEDS):
        for labels in (list(range(n)), [i if i % 2 else "same" for i in range(n)], [i % 2 for i in range(n)]):
            order = draw(kind, n, r, seed, labels)
            assert order is None or [labels[i] for i in order] != labels, n
            assert order is not None or labels != list(range(n)), n
