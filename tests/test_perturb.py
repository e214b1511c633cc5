"""Perturbations against the authors' rules, by hand and by property."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.perturb import KINDS, broken_adjacencies, perturb

# n, r -> (clips kept by drop, group size, groups): max(1, n // r) in each, worked by hand
HAND = {
    (4, 16): (1, 1, 4),
    (4, 2): (2, 2, 2),
    (15, 16): (1, 1, 15),
    (15, 8): (1, 1, 15),
    (16, 16): (1, 1, 16),
    (16, 8): (2, 2, 8),
    (17, 2): (8, 8, 3),
    (20, 4): (5, 5, 4),
    (24, 8): (3, 3, 8),
    (31, 16): (1, 1, 31),
    (32, 16): (2, 2, 16),
}


@pytest.mark.parametrize(("n", "r"), HAND)
def test_hand_worked_sizes(n: int, r: int) -> None:
    kept, size, groups = HAND[n, r]
    drop = perturb("drop", n, r, 0)
    assert drop is not None and len(drop.order) == kept and list(drop.order) == sorted(drop.order)
    blocks = [tuple(range(i, min(i + size, n))) for i in range(0, n, size)]
    assert len(blocks) == groups
    reverse = perturb("reverse", n, r, 0)
    assert reverse is not None
    assert list(reverse.order) == [i for block in reversed(blocks) for i in block]
    shuffle = perturb("shuffle", n, r, 0)
    assert shuffle is not None
    # cut the shuffled sequence back into the blocks it was made of
    rest, seen = list(shuffle.order), []
    while rest:
        block = next(b for b in blocks if rest[: len(b)] == list(b))
        seen.append(block)
        rest = rest[len(block) :]
    assert sorted(seen) == blocks and seen != blocks


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 40), st.sampled_from([2, 4, 8, 16]), st.integers(0, 2**31))
def test_properties(kind: str, n: int, r: int, seed: int) -> None:
    order = perturb(kind, n, r, seed)
    if n == 1:
        assert order is None
        return
    assert order is not None
    assert order == perturb(kind, n, r, seed)
    assert order.order != tuple(range(n))
    assert 0 <= order.broken <= 1 and 0 < order.kept <= 1
    if kind == "drop":
        assert set(order.order) < set(range(n)) and len(set(order.order)) == len(order.order)
    else:
        assert sorted(order.order) == list(range(n)) and order.kept == 1


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_reverse_breaks_more_at_larger_r(n: int, seed: int) -> None:
    broken = [perturb("reverse", n, r, seed).broken for r in (2, 4, 8, 16)]  # type: ignore[union-attr]
    assert broken == sorted(broken)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 24), st.sampled_from(KINDS), st.integers(0, 1000), st.data())
def test_equal_labels_count_as_identity(n: int, kind: str, seed: int, data: st.DataObject) -> None:
    labels = data.draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n))
    order = perturb(kind, n, 2, seed, labels=labels)
    if order is not None:
        assert order.apply(labels) != labels


def test_all_labels_equal_has_no_shuffle() -> None:
    assert perturb("shuffle", 8, 16, 0, labels=["x"] * 8) is None
    assert perturb("reverse", 8, 2, 0, labels=["x"] * 8) is None


def test_two_groups_leave_only_the_reverse() -> None:
    for seed in range(20):
        assert perturb("shuffle", 20, 2, seed).order == tuple([*range(10, 20), *range(10)])  # type: ignore[union-attr]


def test_broken_adjacencies_by_hand() -> None:
    assert broken_adjacencies(4, [0, 1, 2, 3]) == 0
    assert broken_adjacencies(4, [2, 3, 0, 1]) == pytest.approx(1 / 3)
    assert broken_adjacencies(4, [3, 2, 1, 0]) == 1
    assert broken_adjacencies(4, [1]) == 1
    assert broken_adjacencies(1, [0]) == 0


@pytest.mark.parametrize(
    ("kind", "n", "r", "labels"),
    [("twist", 4, 2, None), ("drop", 0, 2, None), ("drop", 4, 1, None), ("drop", 4, 2, [1])],
)
def test_bad_arguments(kind: str, n: int, r: int, labels: list | None) -> None:
    with pytest.raises(ValueError):
        perturb(kind, n, r, 0, labels=labels)
