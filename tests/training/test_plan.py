"""Step plans and schedules: pure functions of their arguments."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.training.data import micro_batches, plan_steps
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


@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 500)), min_size=1, max_size=60), st.integers(1, 9),
    st.integers(2, 5), st.integers(0, 99),
)  # fmt: skip
def test_windows_keep_every_item_and_every_step_full(
    drawn: list[tuple[int, int]], batch: int, window: int, seed: int
) -> None:
    n_pairs, lengths = [p for p, _ in drawn], [n for _, n in drawn]
    steps = plan_steps(n_pairs, batch, seed, "s", 2, lengths=lengths, window=window)
    flat = [i for step in steps for i in step]
    for e in range(2):
        assert sorted(flat[e * len(drawn) : (e + 1) * len(drawn)]) == list(range(len(drawn)))
    filled = [sum(n_pairs[i] for i in step) for step in steps]
    assert all(sum(n_pairs[i] for i in step[:-1]) < batch for step in steps)
    assert sum(n < batch for n in filled) <= 2
    assert steps == plan_steps(n_pairs, batch, seed, "s", 2, lengths=lengths, window=window)


def test_windows_make_the_items_of_a_step_alike() -> None:
    rng = torch.Generator().manual_seed(3)
    lengths = torch.randint(100, 10_000, (512,), generator=rng).tolist()
    spread = {}
    for window in (1, 8):
        steps = plan_steps([1] * 512, 8, 0, "s", 1, lengths=lengths, window=window)
        spread[window] = sum(max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps) / len(steps)
        means = [sum(lengths[i] for i in s) for s in steps]
        assert means != sorted(means) and means != sorted(means, reverse=True)  # the steps come in any order
    assert spread[8] < 0.25 * spread[1]
    # one window over everything is sorting, with its steps shuffled
    steps = plan_steps([1] * 512, 8, 0, "s", 1, lengths=lengths, window=512)
    longest = sorted(range(512), key=lambda i: -lengths[i])
    assert sorted(sorted(lengths[i] for i in s) for s in steps) == sorted(
        sorted(lengths[i] for i in longest[k : k + 8]) for k in range(0, 512, 8)
    )


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 5), st.integers(100, 300))
def test_ranks_share_a_step_by_tokens(lengths: list[int], world: int, budget: int) -> None:
    items: list[Any] = [SimpleNamespace(n_tokens=n, id=str(i), n_pairs=1) for i, n in enumerate(lengths)]
    step = list(range(len(lengths)))
    padded, counts = zip(*(micro_batches(items, step, budget, r, world) for r in range(world)), strict=True)
    real = [rows[:n] for rows, n in zip(padded, counts, strict=True)]
    assert sorted(i for rows in real for row in rows for i in row) == step
    assert all(sum(lengths[i] for i in row) <= budget for rows in real for row in rows)
    tokens = [sum(lengths[i] for row in rows for i in row) for rows in real]
    assert max(tokens) - min(tokens) <= max(lengths)  # the last tree a rank took made it the fullest
    assert {len(rows) for rows in padded} == {max(counts)}
    for rows, mine in zip(padded, real, strict=True):
        filler = mine[0] if mine else step[:1]
        assert all(row == filler for row in rows[len(mine) :])
