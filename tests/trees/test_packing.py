"""Packing: all items once, none over the budget, deterministic, close to the fewest rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.trees.packing import check_budget, pack


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120), st.randoms())
def test_every_item_is_in_one_row_within_the_budget(lengths: list[int], budget: int, rng: object) -> None:
    order = list(range(len(lengths)))
    rng.shuffle(order)  # type: ignore[attr-defined]
    rows = pack(lengths, budget, order=order)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= budget for row in rows)
    assert rows == pack(lengths, budget, order=order)
    # items of a row keep their order, rows stand as they were opened
    place = {item: n for n, item in enumerate(order)}
    assert all([place[i] for i in row] == sorted(place[i] for i in row) for row in rows)
    assert [place[row[0]] for row in rows] == sorted(place[row[0]] for row in rows)
    # any two rows together exceed the budget, or best fit would have joined them: at most twice the fewest rows
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(rows) < 2 or sums[0] + sums[1] > budget


@given(st.lists(st.integers(1, 30), max_size=40))
def test_best_fit_takes_the_fullest_row_that_fits(lengths: list[int]) -> None:
    """Against the rule written out."""
    expected: list[list[int]] = []
    for i, n in enumerate(lengths):
        fitting = [(30 - sum(lengths[j] for j in row), r) for r, row in enumerate(expected)]
        fitting = [(left, r) for left, r in fitting if left >= n]
        if fitting:
            expected[min(fitting)[1]].append(i)
        else:
            expected.append([i])
    assert pack(lengths, 30) == expected


def test_a_part_can_be_packed() -> None:
    assert pack([9, 1, 9, 2], 10, order=[3, 0]) == [[3], [0]]
    assert pack([], 10) == []


def test_a_record_over_the_budget_is_named() -> None:
    with pytest.raises(InputError, match=r"record b: 12 tokens exceed train.max_tokens 10 \(and 1 more\)"):
        pack([3, 12, 40], 10, ids=["a", "b", "c"])
    with pytest.raises(InputError, match="record c"):
        pack([3, 12, 40], 10, order=[0, 2], ids=["a", "b", "c"])
    check_budget([10, 10], 10)
