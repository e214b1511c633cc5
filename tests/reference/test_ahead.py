"""Reading ahead: what is asked for comes, in its order, equal to what the store gives, or with its error."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.models.family import Prompt
from tempo_fast.reference.ahead import READER, ReadAhead, reading_ahead
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.trees.layout import Branch, ResponseTree
from tempo_kernels.head import HeadStatistics


def tree(i: int) -> ResponseTree:
    prompt = Prompt(torch.arange(4) + i, torch.arange(4).expand(3, 4), torch.zeros(4, dtype=torch.bool))
    return ResponseTree(f"t{i}", prompt, [Branch.of([i, b]) for b in range(1 + i % 3)])


def filled(root: Path, trees: list[ResponseTree], kl: bool = True) -> ReferenceStore:
    store = ReferenceStore(root, {"reference": "tiny"})
    store.kl = kl
    g = torch.Generator().manual_seed(0)
    for t in trees:
        entries = {}
        for key in store.keys(t):
            scalars, mean = torch.randn(3, 2, generator=g), torch.randn(2, 5, generator=g)
            entries[key] = HeadStatistics(*scalars[:2], *((scalars[2], mean) if kl else (None, None)))
        store.put(entries)
    return store


def expected(store: ReferenceStore, trees: list[ResponseTree]) -> Any:
    return store.read([key for t in trees for key in store.keys(t)])


def equal(a: Any, b: Any) -> bool:
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def readers() -> int:
    return sum(t.name == READER for t in threading.enumerate())


@pytest.mark.parametrize("kl", [True, False])
def test_in_order(tmp_path: Path, kl: bool) -> None:
    trees = [tree(i) for i in range(11)]
    store = filled(tmp_path, trees, kl)
    micros = [trees[i : i + 2] for i in range(0, 11, 2)]
    with reading_ahead(store, iter(micros)) as ahead:
        assert ahead is not None and readers() == 1
        for micro in micros:
            assert equal(ahead.get(micro), expected(store, micro))
        assert store.hits == sum(len(t.branches) for t in trees)
        assert equal(ahead.get(trees[:1]), expected(store, trees[:1]))  # after the end: read here and now
    assert readers() == 0
    with reading_ahead(None, iter(micros)) as ahead:
        assert ahead is None


def test_left_out_and_unforeseen(tmp_path: Path) -> None:
    trees = [tree(i) for i in range(9)]
    store = filled(tmp_path, trees)
    with reading_ahead(store, ([t] for t in trees)) as ahead:
        assert ahead is not None
        for i in (0, 3, 8):  # steps that were skipped
            assert equal(ahead.get([trees[i]]), expected(store, [trees[i]]))
        assert equal(ahead.get(trees[:3]), expected(store, trees[:3]))
    assert store.hits == 1 + 1 + 3 + 1 + 2 + 3


def test_a_missing_answer_is_told_to_whoever_asks_for_it(tmp_path: Path) -> None:
    trees = [tree(i) for i in range(5)]
    store = filled(tmp_path, [t for t in trees if t.id != "t2"])
    with reading_ahead(store, ([t] for t in trees)) as ahead:
        assert ahead is not None
        for t in trees:
            if t.id == "t2":
                with pytest.raises(InputError, match="3 of 3 answers are missing"):
                    ahead.get([t])
            else:
                assert equal(ahead.get([t]), expected(store, [t]))
    # where it is not asked for, it does not matter
    with reading_ahead(store, ([t] for t in trees)) as ahead:
        assert ahead is not None and equal(ahead.get([trees[4]]), expected(store, [trees[4]]))


def test_an_error_of_what_is_upcoming_is_raised(tmp_path: Path) -> None:
    trees = [tree(i) for i in range(3)]
    store = filled(tmp_path, trees)

    def upcoming() -> Any:
        yield [trees[0]]
        raise InputError("record t1: too long")

    with reading_ahead(store, upcoming()) as ahead, pytest.raises(InputError, match="too long"):
        assert ahead is not None
        ahead.get([trees[0]])
        ahead.get([trees[1]])
    assert readers() == 0


def test_no_more_is_read_than_there_is_room_for(tmp_path: Path) -> None:
    trees = [tree(i) for i in range(30)]
    store = filled(tmp_path, trees)
    seen: list[str] = []

    def upcoming() -> Any:
        for t in trees:
            seen.append(t.id)
            yield [t]

    ahead = ReadAhead(store, upcoming(), depth=2, hint=3)
    for i in range(5):
        ahead.get([trees[i]])
        time.sleep(0.05)
        assert len(seen) <= i + 1 + 2 + 1 + 4  # taken, ready, in the thread's hands, told to the disk
    begin = time.perf_counter()
    ahead.close()
    assert readers() == 0 and time.perf_counter() - begin < 5
    ahead.close()


def test_the_disk_is_told_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [tree(i) for i in range(8)]
    store = filled(tmp_path, trees)
    told: list[str] = []
    read: list[int] = []
    willneed, rows = ReferenceStore.willneed, ReferenceStore.rows
    monkeypatch.setattr(ReferenceStore, "willneed", lambda s, keys, kl=None: told.extend(keys) or willneed(s, keys, kl))
    monkeypatch.setattr(ReferenceStore, "rows", lambda s, *a: read.append(len(told)) or rows(s, *a))
    with reading_ahead(store, ([t] for t in trees)) as ahead:
        assert ahead is not None
        for t in trees:
            ahead.get([t])
    counts = [sum(len(t.branches) for t in trees[: i + 5]) for i in range(8)]
    assert read == counts
