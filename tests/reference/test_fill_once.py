"""A fill computes nothing twice and, whatever disturbed it, leaves the files of an undisturbed one, byte for byte."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import fork, reap, together

from tempo_fast.reference import fill as filling
from tempo_fast.reference.fill import fill
from tempo_fast.reference.shard import form_of
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.trees.layout import ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache

BUDGET = 160
KEEP = pytest.mark.parametrize("keep", ["mean_embedding", "hidden"])


def trees_of(bundle: Any, make_plan: Any, r: int = 16, n: int = 14) -> list[ResponseTree]:
    """Records of one difficulty; the chosen answer is the same in all, and some trees share their video."""
    return [
        build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id=f"{i} r{r}", prompt_text="What happened?",
            answers=[f"A circle {i // 2}"] + [f"It {r} " + "moves " * (j + i % 5) for j in range(i % 3)],
            plans=[make_plan(f"v{i // 2}", 3 + i // 2)],
        )
        for i in range(n)
    ]  # fmt: skip


def open_store(root: Path, keep: str = "mean_embedding") -> ReferenceStore:
    store = ReferenceStore(root, {"reference": "tiny"}, form=form_of(keep, torch.float32))
    store.kl = True
    return store


def run(bundle: Any, reader: Any, trees: list[ResponseTree], root: Path, keep: str = "mean_embedding", **more: Any):
    store = open_store(root, keep)
    return fill(bundle, store, trees, reader, FeatureCache(), kl=True, max_tokens=BUDGET, **more), store


def shards(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "shards").glob("[!.]*"))


@pytest.fixture
def computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """How often each key was computed, in this process and its forks."""
    log = tmp_path / "computed"
    log.touch()
    plain, key_of = filling.collate, open_store(tmp_path / "keys").keys

    def counting(trees: Any, *rest: Any) -> Any:
        with open(log, "a") as f:
            f.write("".join(f"{key}\n" for tree in trees for key in key_of(tree)))
        return plain(trees, *rest)

    monkeypatch.setattr(filling, "collate", counting)
    return lambda: Counter(log.read_text().split())


@KEEP
def test_killed_at_any_moment(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, computed: Callable[[], Counter[str]], keep: str
) -> None:
    trees = trees_of(tiny, make_plan)
    begin = time.monotonic()
    _, store = run(tiny, reader, trees, tmp_path / "whole", keep)
    took = time.monotonic() - begin
    every = {key for tree in trees for key in store.keys(tree)}
    assert computed() == Counter(every) and len(every) < sum(len(tree.branches) for tree in trees)
    expected = shards(tmp_path / "whole")
    rng, root = random.Random(5), tmp_path / "killed"
    for _ in range(6):
        store = open_store(root, keep)
        there = set(store.known())
        store.holder.release()
        before = computed()
        pid = fork(lambda: run(tiny, reader, trees, root, keep))
        time.sleep(took * rng.random() * 0.5)
        os.kill(pid, signal.SIGKILL)
        reap(pid)
        new = computed() - before
        assert not there & set(new) and set(new.values()) <= {1}  # what is stored is not computed again
    report, store = run(tiny, reader, trees, root, keep)
    assert report.computed + report.present == len(every) and store.missing(sorted(every)) == []
    assert shards(root) == expected


@KEEP
def test_damaged_shards_come_out_the_same(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, keep: str) -> None:
    trees = trees_of(tiny, make_plan)
    run(tiny, reader, trees, tmp_path, keep)
    expected, rng = shards(tmp_path), random.Random(2)
    for count in (1, 3, len(expected)):
        for name in rng.sample(expected, count):
            path = tmp_path / "shards" / name
            data = bytearray(path.read_bytes())
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        report, _ = run(tiny, reader, trees, tmp_path, keep)
        assert 0 < report.computed and shards(tmp_path) == expected


def test_two_runs_at_once_share_the_work(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, computed: Callable[[], Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each begins elsewhere, and leaves out what the other has stored meanwhile."""
    trees = trees_of(tiny, make_plan)
    run(tiny, reader, trees, tmp_path / "whole")
    before, expected, root = computed(), shards(tmp_path / "whole"), tmp_path / "shared"
    open_store(root)
    plain = filling.hidden_states
    monkeypatch.setattr(filling, "hidden_states", lambda *a: time.sleep(0.1) or plain(*a))
    monkeypatch.setattr(filling, "_LOOK_S", 0.0)

    def begin_at(share: float) -> Callable[[], None]:
        def work() -> None:
            monkeypatch.setattr(random.SystemRandom, "randrange", lambda self, n: int(share * n))
            waiting = open_store(root)  # so that both know of each other
            (tmp_path / f"ready {share}").touch()
            while len(list(tmp_path.glob("ready *"))) < 2:
                time.sleep(0.005)
            run(tiny, reader, trees, root)
            assert waiting.holder.path.exists()

        return work

    assert together(begin_at(0.0), begin_at(0.5)) == [0, 0]
    assert shards(root) == expected
    twice = sum((computed() - before).values()) - len(before)
    assert 0 <= twice <= 8  # the packs in which they meet


def test_two_ranks(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, computed: Callable[[], Counter[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The files of one process; each answer on one rank, also after damage; each shard verified by one of them."""
    trees = trees_of(tiny, make_plan)
    run(tiny, reader, trees, tmp_path / "whole")
    before, expected, root = computed(), shards(tmp_path / "whole"), tmp_path / "ranks"
    verified = tmp_path / "verified"
    state = ReferenceStore._state

    def noting(self: ReferenceStore, shard: str) -> Any:
        with open(verified, "a") as f:
            f.write(f"{self.root.name}/{shard}\n")
        return state(self, shard)

    monkeypatch.setattr(ReferenceStore, "_state", noting)

    def rank(number: int, name: str) -> Callable[[], None]:
        def work() -> None:
            init = f"file://{tmp_path / name}"
            dist.init_process_group("gloo", init_method=init, rank=number, world_size=2)
            report, store = run(tiny, reader, trees, root, ranks=Ranks(number, 2))
            keys = [key for tree in trees for key in store.keys(tree)]
            assert report.computed + report.present == len(set(keys))
            found = store.get(keys, True)
            assert torch.equal(found.logp, open_store(tmp_path / "whole").get(keys, True).logp)
            dist.barrier()
            dist.destroy_process_group()

        return work

    assert together(rank(0, "first"), rank(1, "first")) == [0, 0]
    assert shards(root) == expected and computed() - before == before
    both, damaged = computed(), root / "shards" / expected[1]
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 8
    damaged.write_bytes(data)
    verified.write_text("")
    assert together(rank(0, "second"), rank(1, "second")) == [0, 0]
    assert shards(root) == expected and set((computed() - both).values()) == {1}
    seen = Counter(x for x in verified.read_text().split() if x.startswith("ranks/"))
    assert {n for x, n in seen.items() if x != f"ranks/{damaged.name}"} == {1} and len(seen) == len(expected)
    whole = tmp_path / "whole" / "shards"
    assert all((whole / name).read_bytes() == (root / "shards" / name).read_bytes() for name in expected)


def test_trees_are_made_when_they_are_needed(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    """A sequence that makes its trees anew each time: few of them live at once."""
    import weakref

    made: list[weakref.ref[ResponseTree]] = []
    most = 0

    class Lazy(list):
        def __getitem__(self, i: Any) -> Any:
            nonlocal most
            tree = ResponseTree(**vars(super().__getitem__(i)))
            made.append(weakref.ref(tree))
            most = max(most, sum(r() is not None for r in made))
            return tree

        def __iter__(self) -> Any:
            return (self[i] for i in range(len(self)))

    trees = Lazy(trees_of(tiny, make_plan, n=30))
    report, store = run(tiny, reader, trees, tmp_path)
    assert report.computed > 30 and most <= 8
