"""Step plans and schedules: pure functions of their arguments."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.training.data import plan_steps
from tempo_fast.training.loop import learning_rate


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.integers(1, 20), st.integers(0, 99), st.integers(1, 3))
def test_every_item_once_an_epoch(n_pairs: list[int], batch: int, seed: int, epochs: int) -> None:
    steps = plan_steps(n_pairs, batch, seed, "s", epochs)
    flat = [i for step in steps for i in step]
    for e in range(epochs):
        assert sorted(flat[e * len(n_pairs) : (e + 1) * len(n_pairs)]) == list(range(len(n_pairs)))
    short = 0
    for step in steps:
        pairs = [n_pairs[i] for i in step]
        assert sum(pairs[:-1]) < batch  # not full before its last tree
        short += sum(pairs) < batch
    assert short <= epochs  # only the last step of an epoch may hold fewer
    assert steps == plan_steps(n_pairs, batch, seed, "s", epochs)


def test_stages_and_epochs_have_orders_of_their_own() -> None:
    one = [1] * 50
    first, second = plan_steps(one, 50, 0, "a", 2)
    assert first != second
    assert plan_steps(one, 50, 0, "b", 1) != [first]
    assert plan_steps(one, 50, 1, "a", 1) != [first]


def test_learning_rate_by_hand() -> None:
    # 40 steps, warm-up 0.05: two steps of warm-up, then a cosine over 38
    assert learning_rate(1.0, 0, 40, 0.05) == 0.5
    assert learning_rate(1.0, 1, 40, 0.05) == 1.0
    assert learning_rate(1.0, 2, 40, 0.05) == 1.0
    assert learning_rate(1.0, 21, 40, 0.05) == pytest.approx(0.5)
    assert learning_rate(2.0, 39, 40, 0.05) == pytest.approx(1 + math.cos(math.pi * 37 / 38))


@given(st.integers(1, 200), st.floats(0, 0.5))
def test_learning_rate_rises_then_falls(total: int, warmup: float) -> None:
    rates = [learning_rate(1.0, s, total, warmup) for s in range(total)]
    top = rates.index(max(rates))
    assert all(0 < r <= 1 for r in rates)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
