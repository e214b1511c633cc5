"""Packing: all items once, none over the budget, deterministic, close to the fewest rows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.trees.packing import check_budget, deal, pack


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


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 9))
def test_shares_hold_every_item_once_and_are_alike(lengths: list[int], world: int) -> None:
    shares = deal(lengths, world)
    assert len(shares) == world
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all([lengths[i] for i in s] == sorted((lengths[i] for i in s), reverse=True) for s in shares)
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)
    assert shares == deal(lengths, world)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=11))
def test_two_shares_are_close_to_the_best(lengths: list[int]) -> None:
    sums = [sum(lengths[i] for i in share) for share in deal(lengths, 2)]
    total = sum(lengths)
    reachable = {0}
    for n in lengths:
        reachable |= {r + n for r in reachable}
    best = min(abs(total - 2 * r) for r in reachable)
    # M. Fischetti, S. Martello, Worst-case analysis of the differencing method for the partition problem, 1987:
    # the larger share is at most 7/6 of the best larger share
    assert max(sums) <= 7 / 6 * (total + best) / 2 + 1e-9
