"""Timing, deadlines and tables that every benchmark shares."""

from __future__ import annotations

import time
from itertools import count

import pytest
import torch
from torch import Tensor

from bench.measure import Deadline, interleaved, limit, peak_mib, table


class Sleeper:
    def __init__(self, name: int, calls: list[tuple[int, str]], forward_s: float = 0, backward_s: float = 0) -> None:
        self.name, self.calls, self.forward_s, self.backward_s = name, calls, forward_s, backward_s

    def forward(self) -> Tensor:
        self.calls.append((self.name, "forward"))
        time.sleep(self.forward_s)
        return torch.zeros(())

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        self.calls.append((self.name, "backward"))
        time.sleep(self.backward_s)
        return (loss,)


def test_rounds_are_whole_and_their_order_turns() -> None:
    calls: list[tuple[int, str]] = []
    steps = [Sleeper(i, calls) for i in range(3)]
    times = interleaved(steps, 6, "cpu")
    assert all(len(t.both.wall) == len(t.forward.cpu) == 6 for t in times)
    assert [kind for _, kind in calls] == ["forward", "backward"] * 18
    rounds = [tuple(name for name, _ in calls[6 * i : 6 * i + 6 : 2]) for i in range(6)]
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    assert {r[0] for r in rounds} == {r[-1] for r in rounds} == {0, 1, 2}


def test_until_ends_after_a_whole_round() -> None:
    calls: list[tuple[int, str]] = []
    asked = count(1)
    times = interleaved([Sleeper(0, calls), Sleeper(1, calls)], 50, "cpu", lambda: next(asked) >= 3)
    assert [len(t.both.wall) for t in times] == [3, 3]


def test_forward_and_backward_are_told_apart() -> None:
    slow_forward, slow_backward = interleaved([Sleeper(0, [], 0.05, 0), Sleeper(1, [], 0, 0.05)], 1, "cpu")
    assert slow_forward.forward.wall[0] >= 50 > slow_forward.backward.wall[0]
    assert slow_backward.backward.wall[0] >= 50 > slow_backward.forward.wall[0]
    for t in (slow_forward, slow_backward):
        assert t.both.wall[0] == pytest.approx(t.forward.wall[0] + t.backward.wall[0])
        assert t.both.cpu[0] < 50  # sleeping costs none


def test_limit_stops_what_takes_too_long() -> None:
    with pytest.raises(TimeoutError, match="longer"), limit(0.05):
        time.sleep(5)
    with limit(0.05):
        pass
    time.sleep(0.1)  # an alarm left behind would ring here


def test_deadline_follows_its_clock() -> None:
    now = [10.0]
    deadline = Deadline(5, lambda: now[0])
    assert deadline.left() == 5
    now[0] = 17.0
    assert deadline.left() == -2


def test_peak_counts_what_lives_at_once() -> None:
    mib = 2**18  # float32 numbers

    def call() -> None:
        a = torch.empty(3 * mib)
        b = torch.empty(2 * mib)
        del a, b
        torch.empty(4 * mib)

    assert peak_mib(call, "cpu") == pytest.approx(5, rel=0.01)


def test_table_reaches_into_rows_and_marks_gaps() -> None:
    text = table([{"a": 1.23456, "b": {"c": [2, 3]}}, {"a": "x"}], ("a", "b.c"))
    assert [line.split() for line in text.splitlines()] == [["a", "b.c"], ["1.235", "2x3"], ["x", "-"]]
