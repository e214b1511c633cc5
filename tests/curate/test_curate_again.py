"""Files whose ends are the same, in any order of work; and what the next run of the step tries again."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import curate_runs
import numpy as np
import pytest
import torch

from tempo_fast import pipeline
from tempo_fast.config import CurateConfig, DataConfig, RunConfig
from tempo_fast.curate import CurateJob, CurateResult, curate_folder, transnet
from tempo_fast.curate import folder as folder_module
from tempo_fast.curate import work as work_module
from tempo_fast.curate.sources import stamp_of
from tempo_fast.curate.transnet import AT_ONCE, batches, halved, join_windows, windows
from tempo_fast.curate.work import Job, Shared, curate_file
from tempo_fast.errors import InputError
from tempo_fast.runs import Run
from tempo_fast.runtime.pool import Outcome

CONFIG = CurateConfig()

# -- the same ends -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(tmp_path_factory, film) -> dict[str, Path]:
    """a and c are the same usable film; the middle of b is rotten, its size and ends are those of a."""
    root = tmp_path_factory.mktemp("twins")
    rng = np.random.default_rng(0)
    noise = rng.integers(-40, 41, (48, 160, 192, 3))
    images = (np.clip(film.frame(i // 12, 0.5, 160, 192) + noise[i], 0, 255).astype(np.uint8) for i in range(48))
    path = film.write_images(root / "a.mp4", images)
    data = bytearray(path.read_bytes() + b"\0\1\0\0free" + bytes(65528))  # the index is not among the ends
    path.write_bytes(data)
    (root / "c.mp4").write_bytes(data)
    assert len(data) > 300_000
    data[100_000:140_000] = rng.integers(0, 256, 40_000, np.uint8).tobytes()
    (root / "b.mp4").write_bytes(data)
    names = {p.stem: p for p in root.iterdir()}
    assert len({stamp_of(str(p)).sample for p in names.values()}) == 1
    return names


def _all_first(jobs: Any, shared: Shared) -> Iterator[tuple[Job, Outcome]]:
    for job in list(jobs):
        yield job, Outcome(curate_file(job, shared))


def _last_first(jobs: Any, shared: Shared) -> Iterator[tuple[Job, Outcome]]:
    for job in list(jobs)[::-1]:
        yield job, Outcome(curate_file(job, shared))


def _one_by_one(jobs: Any, shared: Shared) -> Iterator[tuple[Job, Outcome]]:
    for job in jobs:
        yield job, Outcome(curate_file(job, shared))


def _by_name(result: CurateResult) -> dict[str, Any]:
    rows = {Path(c.video).stem: c.clips for c in result.clips}
    return rows | {Path(row["video"]).stem: row["reason"] for row in [*result.filtered, *result.quarantined]}


@pytest.mark.parametrize("pool", [_all_first, _last_first, _one_by_one])
def test_a_file_is_judged_by_its_own_bytes_in_any_order_of_work(pool, twins, tmp_path):
    def curate(names: str, out: Path) -> dict[str, Any]:
        with closing(CurateJob([twins[n] for n in names], CONFIG, out, pool=pool)) as job:
            job.run()
            return _by_name(job.merge())

    alone = {n: curate(n, tmp_path / n)[n] for n in "abc"}
    assert "cannot be decoded" in alone["b"] and len(alone["a"]) == 4 and alone["a"] == alone["c"]
    for names in map("".join, itertools.permutations("abc")):
        assert curate(names, tmp_path / names) == alone, names
    for names in ("abc", "bca"):  # and by a run that finds two of them done
        curate(names[:2], tmp_path / f"{names} later")
        assert curate(names, tmp_path / f"{names} later") == alone, names


def test_a_file_that_changes_is_not_its_twin(twins, tmp_path, monkeypatch):
    path = tmp_path / "v.mp4"
    shutil.copy(twins["a"], path)
    known = curate_file(Job(str(path), stamp_of(str(path))), Shared(CONFIG))["key"]

    def touched(name: str, digest: Any = work_module.content_digest) -> str:
        found = digest(name)
        os.utime(name)
        return found

    job = Job(str(path), stamp_of(str(path)), known)
    assert curate_file(job, Shared(CONFIG))["same"]
    monkeypatch.setattr(work_module, "content_digest", touched)
    found = curate_file(job, Shared(CONFIG))
    assert (found["same"], found["failure"], found["reason"]) == (False, "changed", "changed while it was read")


# -- the next run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def films(tmp_path_factory, film) -> Path:
    root = tmp_path_factory.mktemp("films")
    for i, name in enumerate(["crash", "good", "hang"]):
        film.write(root / f"{name}.mp4", [((i + k) % 6, 12) for k in range(4)])
    (root / "text.mp4").write_text("no film")
    return root


def test_findings_about_bytes_are_settled_and_crashes_are_not(films, tmp_path, monkeypatch):
    paths = [films / "good.mp4", films / "text.mp4"]
    found = curate_folder(paths, CONFIG, tmp_path)
    assert found is not None and (found.n_quarantined, found.n_unsettled) == (1, 0)
    monkeypatch.setattr(folder_module, "curate_file", curate_runs.misbehave)
    found = curate_folder([*paths, films / "crash.mp4"], CONFIG, tmp_path)
    assert found is not None and (found.n_quarantined, found.n_unsettled) == (2, 1)
    monkeypatch.undo()
    found = curate_folder([*paths, films / "crash.mp4"], CONFIG, tmp_path)
    assert found is not None and (found.n_quarantined, found.n_unsettled) == (1, 0)


def test_the_step_is_skipped_only_when_every_file_is_settled(films, tmp_path, monkeypatch, caplog):
    def curate(timeout_s: float) -> dict[str, bytes]:
        caplog.clear()
        config = CurateConfig(timeout_s=timeout_s, workers=1)
        run = Run(RunConfig(output_dir=str(tmp_path), data=DataConfig(videos=str(films)), curate=config))
        pipeline.curate(run)
        folder = tmp_path / "curate"
        return {f: (folder / f"{f}.jsonl").read_bytes() for f in ("journal", "clips", "filtered", "quarantine")}

    def usable(found: dict[str, bytes]) -> int:
        return found["clips"].count(b"\n")

    caplog.set_level(logging.INFO, "tempo_fast")
    monkeypatch.setattr(folder_module, "curate_file", curate_runs.misbehave)
    first = curate(3.0)
    assert usable(first) == 1 and "2 videos failed for another reason than their bytes" in caplog.text
    monkeypatch.undo()
    second = curate(3.0)
    assert usable(second) == 2 and second["journal"].startswith(first["journal"])
    assert b"hang.mp4" in second["quarantine"], "a timeout is for more time"
    assert curate(3.0) == second and "skipped" not in caplog.text
    third = curate(60.0)
    assert usable(third) == 3 and b"hang.mp4" not in third["quarantine"]
    assert curate(60.0) == third and "curate: inputs unchanged, skipped" in caplog.text


# -- memory of a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_windows_that_do_not_fit_together_go_through_the_network_in_halves(room):
    asked: list[int] = []

    def score(batch: list[tuple[int, int]]) -> list[np.ndarray]:
        asked.append(len(batch))
        if len(batch) > room:
            raise torch.cuda.OutOfMemoryError("full")
        return [np.arange(*r) for r in batch]

    ranges = windows(8001)
    parts = [part for batch in batches(ranges, AT_ONCE) for part in halved(score, batch)]
    assert (join_windows(ranges, parts) == np.arange(8001)).all()
    assert asked[:3] == {1: [4, 2, 1], 2: [4, 2, 2], 3: [4, 2, 2], 4: [4, 1]}[room]


def test_a_window_that_does_not_fit_alone_is_an_error():
    def score(batch: list[tuple[int, int]]) -> list[np.ndarray]:
        raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        halved(score, windows(8000)[:4])


def test_a_batch_is_the_same_whatever_memory_is_free(monkeypatch):
    """The network on a device that says it is a GPU, with more or less memory free."""
    seen: list[int] = []

    def network(x: torch.Tensor) -> tuple[None, dict[str, torch.Tensor]]:
        seen.append(len(x))
        return None, {"many_hot": torch.zeros(*x.shape[:2], 1)}

    class GPU(str):
        type = "cuda"

    monkeypatch.setattr(transnet, "_network", lambda: network)
    monkeypatch.setattr(transnet, "network_device", lambda: GPU("cpu"))
    for free in (0, 10**10, 10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        seen.clear()
        cuts = transnet.TransNetCuts(0.5)
        for _ in range(10_000):
            cuts.feed(np.zeros((27, 48, 3), np.uint8))
        assert cuts.scores().shape == (10_000,) and seen == [4, 2], free


# -- configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [27.0, 1.0, 0.0, -0.5])
def test_the_networks_threshold_is_a_probability(threshold):
    with pytest.raises(InputError, match=r"curate\.threshold must be .*transnetv2"):
        RunConfig(curate=CurateConfig(detector="transnetv2", threshold=threshold)).validate()
    RunConfig(curate=CurateConfig(detector="transnetv2", threshold=0.5)).validate()
    RunConfig(curate=CurateConfig(threshold=27.0)).validate()
