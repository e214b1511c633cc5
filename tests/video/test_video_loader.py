"""Decoding ahead: the same pixels in the same order with any number of workers, bounded; no file holds up the rest."""

from __future__ import annotations

import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import LoaderConfig
from tempo_fast.video.container import DecodeError
from tempo_fast.video.loader import WORKER, Prefetcher, prefetching


@dataclass(frozen=True)
class Plan:
    key: str
    path: str = ""


@dataclass
class Slow:
    """A source that says what it was asked, takes ``seconds`` a video, fails on "bad" and hangs on "stuck"."""

    seconds: float = 0.0
    asked: list[str] = field(default_factory=list)
    by_caller: list[str] = field(default_factory=list)
    let_go: threading.Event = field(default_factory=threading.Event)
    lock: Any = field(default_factory=threading.Lock)

    def pixels(self, plan: Plan) -> torch.Tensor:
        with self.lock:
            self.asked.append(plan.key)
            if threading.current_thread().name != WORKER:
                self.by_caller.append(plan.key)
        time.sleep(self.seconds)
        if plan.key.startswith("stuck"):
            self.let_go.wait(60)
        if plan.key.startswith("bad"):
            raise DecodeError(f"{plan.key}: is damaged")
        return torch.full((2, 3), float(sum(plan.key.encode())))


def plans(*keys: str) -> list[Plan]:
    return [Plan(key, f"{key}.mp4") for key in keys]


def outcome(loader: Any, plan: Plan) -> Any:
    try:
        return loader.pixels(plan)
    except DecodeError as e:
        return e


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(1, 4), st.integers(1, 5), st.booleans(),
    st.data(),
)  # fmt: skip
def test_any_demand_gets_its_own_pixels(
    keys: list[str], workers: int, ahead: int, once: bool, data: st.DataObject
) -> None:
    """Whatever was foreseen, and in whatever order it is asked for."""
    source = Slow()
    loader = Prefetcher(source, plans(*keys), workers=workers, ahead=ahead, timeout_s=30, once=once)
    demand = data.draw(st.one_of(st.just(keys), st.lists(st.sampled_from("abcdefg"), max_size=12)))
    for key in demand:
        assert torch.equal(loader.pixels(Plan(key)), Slow().pixels(Plan(key)))
    loader.close()


def test_a_video_is_decoded_once_and_before_it_is_asked_for() -> None:
    source = Slow()
    with prefetching(source, plans("a", "b", "c"), LoaderConfig(workers=2, ahead=3)) as loader:
        deadline = time.monotonic() + 20
        while len(source.asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(source.asked) == ["a", "b", "c"]
        for plan in plans("a", "b", "c"):
            loader.pixels(plan)
    assert len(source.asked) == 3


def test_no_more_than_ahead_wait() -> None:
    source = Slow()
    read: list[str] = []

    def endless() -> Any:
        for i in range(1_000_000):
            read.append(str(i))
            yield Plan(str(i))

    loader = Prefetcher(source, endless(), workers=3, ahead=4, timeout_s=30)
    time.sleep(0.3)
    assert len(read) == 4 and len(source.asked) <= 4
    for i in range(5):
        loader.pixels(Plan(str(i)))
    time.sleep(0.3)
    assert len(read) == 9 and len(source.asked) <= 9
    loader.close()


def test_workers_work_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30)

    class Meeting:
        def pixels(self, plan: Plan) -> torch.Tensor:
            meeting.wait()  # passes only when three are in here
            return torch.zeros(1)

    loader = Prefetcher(Meeting(), plans("a", "b", "c"), workers=3, ahead=3, timeout_s=60)
    for plan in plans("a", "b", "c"):
        loader.pixels(plan)
    loader.close()


def test_a_failure_is_a_value_in_its_place() -> None:
    source = Slow()
    asked = plans("a", "bad1", "b", "bad2")
    loader = Prefetcher(source, asked, workers=2, ahead=2, timeout_s=30)
    found = [outcome(loader, plan) for plan in asked]
    assert [isinstance(x, DecodeError) for x in found] == [False, True, False, True]
    assert "bad1: is damaged" in str(found[1])
    loader.close()
    again = Prefetcher(source, asked, workers=1, ahead=1, timeout_s=30)
    again.pixels(asked[0])
    with pytest.raises(DecodeError, match="bad1"):
        again.pixels(asked[1])
    again.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_decoder_that_hangs_is_given_up_and_the_rest_goes_on(workers: int) -> None:
    source = Slow()
    asked = plans("stuck1", "a", "stuck2", "b", "c")
    loader = Prefetcher(source, asked, workers=workers, ahead=5, timeout_s=0.4)
    start = time.monotonic()
    found = [outcome(loader, plan) for plan in asked]
    took = time.monotonic() - start
    assert [isinstance(x, DecodeError) for x in found] == [True, False, True, False, False]
    assert "stuck1.mp4: took longer than 0.4 s (loader.timeout_s)" in str(found[0])
    assert took < 20
    source.let_go.set()
    loader.close()


def test_videos_nobody_waits_for_do_not_block_those_behind() -> None:
    """Every worker hangs on a video that is passed over: the next one must still come."""
    source = Slow()
    asked = plans("stuck1", "stuck2", "a")
    loader = Prefetcher(source, asked, workers=2, ahead=3, timeout_s=0.4)
    while len(source.asked) < 2:
        time.sleep(0.01)
    assert torch.equal(loader.pixels(asked[2]), Slow().pixels(asked[2]))
    source.let_go.set()
    loader.close()


def test_what_is_skipped_or_under_way_is_not_decoded_again() -> None:
    source = Slow()
    asked = plans("a", "cached", "a", "b", "a")
    loader = Prefetcher(
        source, asked, workers=1, ahead=5, timeout_s=30, skip=lambda plan: plan.key == "cached", once=True
    )
    loader.pixels(asked[0])
    loader.pixels(asked[3])
    assert source.asked == ["a", "b"]
    assert torch.equal(loader.pixels(asked[1]), Slow().pixels(asked[1]))  # asked for after all
    loader.close()


@pytest.mark.parametrize(
    ("keys", "ahead"), [("AABCDEFG", 1), ("ABCDABCDEFGHIJKL", 4), ("ABABABCDCDEEF", 2), ("ABCABCABCD", 8)]
)
def test_repeats_of_what_is_cached_do_not_stop_it(keys: str, ahead: int) -> None:
    """As in training: what is made of a video is kept once it has been asked for, and asked for no more."""
    source, cache = Slow(), set[str]()
    asked = plans(*keys)
    loader = Prefetcher(
        source, asked, workers=2, ahead=ahead, timeout_s=30, skip=lambda plan: plan.key in cache, once=True
    )
    for plan in asked:
        if plan.key not in cache:
            loader.pixels(plan)
            cache.add(plan.key)
    loader.close()
    assert source.by_caller == []
    assert sorted(source.asked) == sorted(set(keys))


def test_an_idle_worker_keeps_no_video() -> None:
    loader = Prefetcher(Slow(), plans("a", "b"), workers=2, ahead=2, timeout_s=30)
    seen = [weakref.ref(loader.pixels(plan)) for plan in plans("a", "b")]
    deadline = time.monotonic() + 20
    while any(ref() is not None for ref in seen) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(ref() is None for ref in seen)
    loader.close()


def test_one_hang_does_not_keep_the_caller_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Slow()
    asked = plans("stuck", "slow")
    loader = Prefetcher(source, asked, workers=1, ahead=2, timeout_s=0.3)
    assert isinstance(outcome(loader, asked[0]), DecodeError)
    looks: list[float] = []
    patience = loader._patience
    monkeypatch.setattr(loader, "_patience", lambda: looks.append(0) or patience())  # type: ignore[func-returns-value]
    loader.timeout_s, source.seconds = 30.0, 1.0
    loader._fill()
    later = Plan("later")
    loader._plans = iter([later])
    loader._fill()
    loader.pixels(later)
    assert len(looks) < 5
    source.let_go.set()
    loader.close()


def test_without_workers_the_source_itself() -> None:
    source = Slow()
    with prefetching(source, iter(()), LoaderConfig(workers=0)) as same:
        assert same is source
    with prefetching(source, iter(()), None) as same:
        assert same is source
    with pytest.raises(ValueError, match="0 workers"):
        Prefetcher(source, [], workers=0, ahead=1, timeout_s=1)


def test_closing_lets_the_threads_go() -> None:
    before = threading.active_count()
    loader = Prefetcher(Slow(), plans(*"abcdefgh"), workers=3, ahead=8, timeout_s=30)
    loader.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
