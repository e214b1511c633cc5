"""Perturbations by property; tests/test_perturb_table.py holds them against the authors' rules."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.perturb import KINDS, broken_adjacencies, perturb


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
