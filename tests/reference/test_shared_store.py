"""Several processes on one folder: writers, readers and cleaning up, with no lock between them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork, reap, together
from processes import until

from tempo_fast.errors import InputError
from tempo_fast.reference import collect as collecting
from tempo_fast.reference.collect import collect
from tempo_fast.reference.holders import EXPIRES_S, Holder, holders
from tempo_fast.reference.store import ReferenceStore
from tempo_kernels.head import HeadStatistics

FIELDS = {"reference": "abc"}
D = 6


def entry(key: str, kl: bool) -> HeadStatistics:
    """What every process makes of a key, whoever it is."""
    g = torch.Generator().manual_seed(int(key))
    n = 1 + int(key) % 5
    logp, lse, mean_logit = torch.randn(3, n, generator=g)
    mean = torch.randn(n, D, generator=g)
    return HeadStatistics(logp, lse, mean_logit if kl else None, mean if kl else None)


def same(found: HeadStatistics, keys: list[str], kl: bool) -> bool:
    wanted = [entry(key, kl) for key in keys]
    return all(
        torch.equal(x, torch.cat([getattr(w, name) for w in wanted]))
        for name, x in found._asdict().items()
        if x is not None
    )


def write(root: Path, keys: list[str], seed: int) -> None:
    store, rng = ReferenceStore(root, FIELDS), random.Random(seed)
    rng.shuffle(keys)
    while keys:
        some, keys = keys[: rng.randint(1, 4)], keys[rng.randint(1, 4) :]  # writers leave gaps and overlap
        kl = rng.random() < 0.5
        store.put({key: entry(key, kl) for key in some})


def read(root: Path, stop: Path) -> None:
    store, rng, reads = ReferenceStore(root, FIELDS), random.Random(), 0
    while True:
        last = stop.exists()
        store.refresh()
        for kl in (False, True):
            keys = store.known(kl=kl)
            if keys:
                some = [rng.choice(keys) for _ in range(9)]
                assert store.missing(some, kl=kl) == []
                assert same(store.get(some, kl), some, kl)
                reads += 1
        if last:
            break
    assert reads > 1


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", tmp_path / "stop"
    keys = [str(i) for i in range(60)]
    readers = [fork(lambda: read(root, stop)) for _ in range(2)]
    assert together(*[lambda i=i: write(root, list(keys), i) for i in range(3)]) == [0, 0, 0]
    stop.touch()
    assert [reap(pid) for pid in readers] == [0, 0]
    store = ReferenceStore(root, FIELDS)
    there = store.known(kl=False)
    assert len(there) > 40 and store.missing(there) == [] and same(store.get(there, False), there, False)
    assert all(p.name[0] != "." for p in (root / "shards").iterdir())
    assert holders(root) == 1


def come_and_go(root: Path, stop: Path, keys: list[str]) -> None:
    """What is there when it is looked up is there when it is read, or is said to be missing; never something else."""
    read = 0
    while not stop.exists():
        store = ReferenceStore(root, FIELDS)
        there = [key for key in keys if key not in store.missing(keys, kl=False)]
        try:
            assert same(store.get(there, False), there, False)
            read += len(there)
        except InputError as e:
            assert "missing or damaged" in str(e)
        store.holder.release()
    assert read > len(keys)


def test_cleaning_up_beside_runs_that_come_and_go(tmp_path: Path) -> None:
    root, stop = tmp_path / "store", tmp_path / "stop"
    keys = [str(i) for i in range(40)]
    for i in range(0, 40, 2):
        ReferenceStore(root, FIELDS).put({k: entry(k, False) for k in keys[i : i + 3]})
    runs = [fork(lambda: come_and_go(root, stop, keys)) for _ in range(2)]

    def clean() -> None:
        for i in range(25):
            collect(root)
            store = ReferenceStore(root, FIELDS)  # and what makes it worth cleaning
            store.put({keys[i]: entry(keys[i], i % 2 == 0)})
            store.holder.release()

    assert together(clean) == [0]
    stop.touch()
    assert [reap(pid) for pid in runs] == [0, 0]
    collect(root)
    assert len(list((root / "shards").iterdir())) <= 2
    store = ReferenceStore(root, FIELDS)
    assert store.missing(keys, kl=False) == [] and same(store.get(keys, False), keys, False)


def test_an_open_store_finds_answers_that_were_merged(tmp_path: Path) -> None:
    """As a process on a machine whose touches have grown old sees it."""
    keys = [str(i) for i in range(12)]
    for i in range(0, 12, 3):
        ReferenceStore(tmp_path, FIELDS).put({k: entry(k, True) for k in keys[i : i + 3]})
    before, after = ReferenceStore(tmp_path, FIELDS), ReferenceStore(tmp_path, FIELDS)
    assert before.missing(keys, kl=True) == [] and same(before.get(keys[:4], True), keys[:4], True)
    for store in (before, after):
        store.holder.release()
    (done,) = collect(tmp_path)
    assert (done.merged, done.written) == (4, 1)
    for store in (before, after):  # of the first some are mapped, of the second nothing is verified
        assert store.missing(keys, kl=True) == []
        assert same(store.get(keys, True), keys, True)


def test_who_came_in_between_gets_all_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [str(i) for i in range(6)]
    for key in keys:
        ReferenceStore(tmp_path, FIELDS).put({key: entry(key, True)})
    files = {p.name: p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    came: list[ReferenceStore] = []
    merge = collecting._merge

    def slowly(*args: Any) -> Any:
        came.append(ReferenceStore(tmp_path, FIELDS))
        return merge(*args)

    monkeypatch.setattr(collecting, "_merge", slowly)
    (done,) = collect(tmp_path)
    assert done.came_back and (done.merged, done.freed) == (0, 0)
    now = {p.name: p.read_bytes() for p in (tmp_path / "shards").iterdir()}
    assert files.items() <= now.items() and len(now) == 7  # the merged one was written before
    assert same(came[0].get(keys, True), keys, True)
    came[0].holder.release()
    monkeypatch.undo()
    (done,) = collect(tmp_path)
    assert (done.merged, done.written) == (7, 1) and len(list((tmp_path / "shards").iterdir())) == 1


def test_only_the_living_hold(tmp_path: Path) -> None:
    assert holders(tmp_path) == 0
    pid = fork(lambda: (Holder(tmp_path), time.sleep(60)))
    assert until(lambda: holders(tmp_path, sweep=False) == 1)
    mine = Holder(tmp_path)
    assert holders(tmp_path) == 2
    os.kill(pid, signal.SIGKILL)
    reap(pid)
    assert holders(tmp_path) == 1  # at once, on this machine
    mine.release()
    mine.release()
    assert holders(tmp_path) == 0 and not (tmp_path / "live").exists()
    elsewhere = tmp_path / "live" / "1.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text(json.dumps({"machine": "another", "pid": 1, "started": 1}))
    assert holders(tmp_path) == 1
    old = time.time() - EXPIRES_S - 60
    os.utime(elsewhere, (old, old))
    assert holders(tmp_path, sweep=False) == 0 and elsewhere.exists()
    assert holders(tmp_path) == 0 and not elsewhere.exists()


def test_a_process_number_that_came_again_is_another_process(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    told = json.loads(holder.path.read_text())
    holder.path.write_text(json.dumps({**told, "started": told["started"] - 1}))
    assert holders(tmp_path) == 0


def test_a_stale_listing_is_waited_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's new shard cannot be opened yet, then it can; one that never comes is given up on."""
    store = ReferenceStore(tmp_path / "here", FIELDS)
    other = ReferenceStore(tmp_path / "there", FIELDS)
    name = other.put({"1": entry("1", True)})
    hidden = tmp_path / "there" / "shards" / name
    shown = tmp_path / "here" / "shards" / name
    shown.parent.mkdir(exist_ok=True)
    pid = fork(lambda: (time.sleep(0.3), hidden.rename(shown)))
    store.adopt([name])
    assert reap(pid) == 0 and same(store.get(["1"], True), ["1"], True)
    monkeypatch.setattr("tempo_fast.reference.store._PATIENCE_S", 0.1)
    store.adopt(["0" * 64 + ".safetensors"])
    assert store.missing(["2"]) == ["2"]
