"""Checkpoints: complete or absent whoever is killed when, verified when read, the same in the background."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training import checkpoint
from tempo_fast.training.checkpoint import Checkpoints, list_checkpoints

IDENTITY = {"stage": {"name": "s", "r": 4}, "seed": 3}


class Threads:
    """The ranks of one process: each is a thread."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.given = world, threading.Barrier(world), {}

    def run(self, work: Any) -> list[Any]:
        """``work(ranks)`` on each; what they returned or raised."""
        out: list[Any] = [None] * self.world

        def one(rank: int) -> None:
            try:
                out[rank] = work(_Rank(rank, self.world, self))
            except BaseException as e:  # noqa: BLE001
                out[rank] = e

        threads = [threading.Thread(target=one, args=(r,)) for r in range(self.world)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        return out


class _Rank(Ranks):
    def __init__(self, rank: int, world: int, group: Threads) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "group", group)

    def barrier(self) -> None:
        self.group.barrier.wait(30)

    def all_gather_object(self, value: Any) -> list[Any]:
        self.group.given[self.rank] = value
        self.barrier()
        out = [self.group.given[r] for r in range(self.world)]
        self.barrier()
        return out


def state_of(step: int, rank: int = 0) -> dict[str, Any]:
    return {"engine": {"step": step, "w": torch.full((1000,), float(step * 10 + rank))}, "num_tokens": step * 7}


def make(folder: Path, ranks: Ranks | None = None, **how: Any) -> Checkpoints:
    return Checkpoints(folder, how.pop("identity", IDENTITY), ranks or Ranks(), keep=how.pop("keep", 2), **how)


def read(found: tuple[int, dict[str, Any]] | None) -> tuple[int, list[float], int]:
    assert found is not None
    step, state = found
    return step, [float(part["w"][0]) for part in state["engine"]], state["num_tokens"]


@pytest.mark.parametrize("background", [False, True])
def test_newest_is_read_and_old_ones_go(tmp_path: Path, background: bool) -> None:
    saves = make(tmp_path, background=background, about={"stage": "s", "total_steps": 9})
    assert saves.newest() is None
    for step in (1, 2, 5):
        saves.save(step, state_of(step))
    saves.wait()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 5]
    assert read(make(tmp_path).newest()) == (5, [50.0], 35)
    written = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert (written["stage_step"], written["world"], written["stage"], written["total_steps"]) == (5, 1, "s", 9)
    assert written["identity"] == IDENTITY and list(written["files"]) == ["engine_rank0.pt"]
    assert not list(tmp_path.glob(".*"))
    saves.drop(keep=1)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]
    saves.drop()
    assert not list(tmp_path.iterdir())


def test_another_configuration_or_format_is_refused(tmp_path: Path) -> None:
    make(tmp_path).save(1, state_of(1))
    with pytest.raises(InputError, match="another configuration: stage.r is 2 now and was 4"):
        make(tmp_path, identity={"stage": {"name": "s", "r": 2}, "seed": 3}).newest()
    path = tmp_path / "checkpoint-1" / "trainer_state.json"
    path.write_text(json.dumps({"stage_step": 1, "world": 1, "identity": IDENTITY}))
    with pytest.raises(InputError, match="its format is None, this version reads 2"):
        make(tmp_path).newest()


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no state", "torn state"])
def test_a_damaged_one_gives_way_to_an_older(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    saves = make(tmp_path)
    for step in (1, 2):
        saves.save(step, state_of(step))
    part, state = (tmp_path / "checkpoint-2" / name for name in ("engine_rank0.pt", "trainer_state.json"))
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:-700])
    elif damage == "flipped":
        data = bytearray(part.read_bytes())
        data[len(data) // 2] ^= 1  # in the tensor's bytes: torch would read it as another number
        part.write_bytes(data)
    elif damage == "gone":
        part.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        state.write_text(state.read_text()[:40])
    assert read(make(tmp_path).newest()) == (1, [10.0], 7)
    assert damage == "no state" or "damaged" in caplog.text and "an older checkpoint is taken" in caplog.text


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("wrote", "reads"), [(2, 2), (3, 3), (2, 1), (1, 3), (3, 2)])
def test_ranks_write_parts_and_any_number_reads_them(tmp_path: Path, wrote: int, reads: int, background: bool) -> None:
    def write(ranks: Ranks) -> None:
        saves = make(tmp_path, ranks, background=background)
        for step in (4, 8):
            saves.save(step, state_of(step, ranks.rank))
        saves.wait()
        ranks.barrier()

    assert Threads(wrote).run(write) == [None] * wrote
    found = Threads(reads).run(lambda ranks: read(make(tmp_path, ranks).newest()))
    for rank, (step, parts, tokens) in enumerate(found):
        assert (step, tokens) == (8, 56)
        assert sorted(parts) == [80.0 + k for k in range(wrote)]
        assert parts[0] == 80.0 + rank % wrote  # its own first


def test_ranks_agree_on_an_older_one(tmp_path: Path) -> None:
    """The damage is in a file that one of the two verifies: both go back."""

    def write(ranks: Ranks) -> None:
        saves = make(tmp_path, ranks)
        for step in (1, 2):
            saves.save(step, state_of(step, ranks.rank))

    Threads(2).run(write)
    (tmp_path / "checkpoint-2" / "engine_rank1.pt").write_bytes(b"torn")
    assert [f[0] for f in Threads(2).run(lambda ranks: read(make(tmp_path, ranks).newest()))] == [1, 1]


def test_in_the_background_the_caller_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), torch.save
    monkeypatch.setattr(checkpoint.torch, "save", lambda *a: (gate.wait(30), real(*a)))
    saves, own = make(tmp_path, background=True), {"rows": [1]}
    saves.save(1, {**state_of(1), "looks": own["rows"]})
    own["rows"].append(2)  # the loop goes on; what was to be saved stays
    saves.check()
    assert list_checkpoints(tmp_path) == []
    second = threading.Thread(target=saves.save, args=(2, state_of(2)))
    second.start()
    time.sleep(0.1)
    assert second.is_alive()  # the next save waits for the one before
    gate.set()
    second.join(30)
    saves.wait()
    found = make(tmp_path).newest()
    assert read(found)[0] == 2
    assert torch.load(tmp_path / "checkpoint-1" / "engine_rank0.pt", weights_only=True)["own"]["looks"] == [1]


def test_a_failed_write_is_raised_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = make(tmp_path, background=True)
    saves.save(1, state_of(1))
    saves.wait()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", full)
    saves.save(2, state_of(2))
    assert saves._thread is not None
    saves._thread.join(30)
    with pytest.raises(InputError, match=r"checkpoint-2\..*cannot be written \(No space left on device\)"):
        saves.check()
    saves.check()  # said once
    assert read(make(tmp_path).newest())[0] == 1


def test_the_first_rank_hears_of_a_failure_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save

    def full_on_the_second(state: Any, file: Any) -> None:
        if float(state["engine"]["w"][0]) % 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", full_on_the_second)

    def write(ranks: Ranks) -> None:
        saves = make(tmp_path, ranks, background=True)
        saves.save(1, state_of(1, ranks.rank))
        saves.wait()

    first, second = Threads(2).run(write)
    assert "rank 1 could not write its part" in str(first) and "No space left" in str(second)
    assert list_checkpoints(tmp_path) == []
    monkeypatch.setattr(checkpoint, "_PATIENCE_S", 0.3)
    silent = make(tmp_path, background=True)
    object.__setattr__(silent.ranks, "world", 2)  # a second rank that never comes
    silent.save(3, state_of(3))
    with pytest.raises(InputError, match="the part of rank 1 has not come .* do all machines share output_dir"):
        silent.wait()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("background", [False, True])
def test_killed_at_any_moment(tmp_path: Path, background: bool) -> None:
    """SIGKILL while a process saves without pause: what is found afterwards is whole, and the next start cleans up."""
    script = textwrap.dedent(f"""
        import sys, torch
        from pathlib import Path
        from tempo_fast.runtime.ranks import Ranks
        from tempo_fast.training.checkpoint import Checkpoints
        saves = Checkpoints(Path({str(tmp_path)!r}), {IDENTITY!r}, Ranks(), keep=2, background={background})
        found = saves.newest()
        if found:
            step, state = found
            (part,) = state["engine"]
            assert part["step"] == step and torch.equal(part["w"], torch.full((300_000,), float(step))), step
        print(found[0] if found else 0, flush=True)
        step = found[0] if found else 0
        while True:
            step += 1
            saves.save(step, {{"engine": {{"step": step, "w": torch.full((300_000,), float(step))}}}})
            print(step, flush=True)
    """)
    rng, before = random.Random(4), 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip().isdigit(), process.stderr.read() if process.stderr else ""
        assert int(line) >= before  # never behind what was there
        for _ in range(rng.randint(2, 4)):
            assert process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        there = [step for step, _ in list_checkpoints(tmp_path)]
        assert len(there) <= 3
        before = there[-1] if there else before
    assert before > 0
    make(tmp_path)
    assert not list(tmp_path.glob(".*"))
