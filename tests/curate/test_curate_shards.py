"""Several processes that share a folder and never talk, and processes that are killed: the same bytes in the end."""

from __future__ import annotations

import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import curate_runs
import pytest
from processes import until

from tempo_fast.config import CurateConfig
from tempo_fast.curate import CurateJob, curate_folder, list_videos
from tempo_fast.curate.journal import Journals, name_of
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.runtime.pool import warm_up
from tempo_fast.runtime.shards import Shard

RESULTS = ("clips.jsonl", "filtered.jsonl", "quarantine.jsonl")
CONFIG = CurateConfig()
N = 9


@pytest.fixture(scope="module")
def videos(tmp_path_factory, film) -> Path:
    """Six usable films of 5 s, one filtered, one cut off, one that is none."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        film.write(root / f"{i}.mp4", [((i + k) % 6, 14 + i) for k in range(4)])
    film.write(root / "single.mp4", [(0, 60)])
    (root / "cut.mp4").write_bytes((root / "0.mp4").read_bytes()[:-2000])
    (root / "text.mp4").write_text("no film")
    return root


def _results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> dict[str, bytes]:
    warm_up(["tempo_fast.curate.work", "cv2"])
    out = tmp_path_factory.mktemp("undisturbed")
    curate_folder(list_videos(str(videos)), CONFIG, out)
    return _results(out)


def _rows(out: Path, shard: Shard) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name_of(shard)).read_text().splitlines()]


def _run(videos: Path, out: Path, shard: Shard, **options: Any) -> CurateJob:
    job = CurateJob(list_videos(str(videos)), CONFIG, out, **options)
    job.run(shard)
    return job


def test_shards_do_their_part_and_the_last_one_can_merge(videos, undisturbed, tmp_path):
    parts = [Shard(k, 3) for k in range(3)]
    left = N
    for shard in parts:
        job = _run(videos, tmp_path, shard)
        left -= len(_rows(tmp_path, shard))
        assert len(job.missing()) == left
        if left:
            with pytest.raises(InputError, match="is not curated yet"):
                job.merge()
            assert not any((tmp_path / name).exists() for name in RESULTS)
        else:
            job.merge()
        job.close()
    assert _results(tmp_path) == undisturbed and left == 0
    # another number of processes, or one alone, finds everything done
    for shard in (Shard(), Shard(1, 2)):
        told: list[tuple[int, int]] = []
        job = _run(videos, tmp_path, shard, progress=lambda *a, told=told: told.append(a))
        assert told == [(told[0][1], told[0][1])] and job.missing() == [] and _rows(tmp_path, shard) == []
        job.merge()
        job.close()
        assert _results(tmp_path) == undisturbed


def test_the_same_bytes_fall_to_one_shard(videos, tmp_path):
    for i in range(4):
        (tmp_path / f"twin{i}.mp4").write_bytes((videos / "0.mp4").read_bytes())
    parts = [Shard(0, 2), Shard(1, 2)]
    for shard in parts:
        _run(tmp_path, tmp_path / "out", shard).close()
    assert sorted(len(_rows(tmp_path / "out", shard)) for shard in parts) == [0, 4]


def test_a_part_has_one_process(videos, tmp_path):
    job = _run(videos, tmp_path, Shard(0, 2))
    before = (tmp_path / "journal-0-of-2.jsonl").read_bytes()
    with pytest.raises(InputError, match="journal-0-of-2.jsonl: another process writes it"):
        _run(videos, tmp_path, Shard(0, 2))
    assert (tmp_path / "journal-0-of-2.jsonl").read_bytes() == before
    other = _run(videos, tmp_path, Shard(1, 2))
    assert other.missing() == []
    other.close()
    job.close()
    _run(videos, tmp_path, Shard(0, 2)).close()


def test_the_row_that_another_process_is_writing_is_left_alone(videos, undisturbed, tmp_path):
    _run(videos, tmp_path, Shard(1, 2)).close()
    other = tmp_path / "journal-1-of-2.jsonl"
    whole = other.read_bytes()
    other.write_bytes(whole[:-10])
    job = _run(videos, tmp_path, Shard(0, 2))
    assert other.read_bytes() == whole[:-10] and len(job.missing()) == 1
    with open(other, "ab") as f:
        f.write(whole[-10:])
    assert job.missing() == []
    job.merge()
    job.close()
    assert _results(tmp_path) == undisturbed


def test_a_failure_that_another_process_tries_again_is_waited_for(videos, tmp_path, monkeypatch):
    """The first shard begins while the second has yet to try again what failed."""
    gone = videos.parent / "gone.mp4"
    paths = [gone, *list_videos(str(videos))]
    first = next(k for k in range(2) if Shard(k, 2).holds(_content(gone)))
    theirs, ours = Shard(first, 2), Shard(1 - first, 2)
    job = CurateJob(paths, CONFIG, tmp_path)
    job.run(theirs)
    job.close()
    again = CurateJob(paths, CONFIG, tmp_path)
    with Journals(tmp_path, theirs) as held:  # their process has started
        again.run(ours)
        assert again.missing() == [str(gone)]
        assert held.runs(theirs)
    assert again.missing() == [], "it has ended"
    again.close()
    together = CurateJob(paths, CONFIG, tmp_path, together=True)
    together.run(ours)
    assert together.missing() == [str(gone)], "their process may be about to start"
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + 100)
    assert together.missing() == []
    together.close()


def _content(path: Path) -> str:
    from tempo_fast.curate.folder import _content

    return _content(None, str(path))


def test_who_waits_can_be_stopped(videos, tmp_path):
    def check() -> None:
        if len(_rows(tmp_path, Shard(0, 2))) and time.monotonic() > stop:
            raise Interrupted("stop", 75)

    stop = time.monotonic() + 1.5
    with pytest.raises(Interrupted):
        curate_folder(list_videos(str(videos)), CONFIG, tmp_path, shard=(0, 2), check=check)
    assert not (tmp_path / "clips.jsonl").exists()
    assert curate_folder(list_videos(str(videos)), CONFIG, tmp_path, shard=(1, 2)) is None
    assert curate_folder(list_videos(str(videos)), CONFIG, tmp_path, shard=(0, 2)) is not None


def test_many_rows_take_little_memory_and_time(tmp_path):
    """2,000 files that are not there: rows are indexed by place."""
    import tracemalloc

    n = 2000
    paths = [f"/nowhere/{i:06d}.mp4" for i in range(n)]
    job = CurateJob(paths, CONFIG, tmp_path)
    job.run(Shard(0, 10**9))  # none of them, most likely; their names are in memory now
    lines = []
    for i, name in enumerate(job._ids):
        clips = {"video": paths[i], "clips": [{"start_frame": k} for k in range(20)]}
        row = {"id": name.hex(), "sample": name.hex(), "key": "k", "status": "ok", "failure": "", "video": paths[i]}
        lines.append(json.dumps({**row, "reason": "", "clips": clips}))
    (tmp_path / "journal.jsonl").write_text("\n".join(lines) + "\n")
    size = (tmp_path / "journal.jsonl").stat().st_size
    del lines
    tracemalloc.start()
    assert job.missing() == []
    found = job.merge()
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    job.close()
    assert (found.n_usable, found.n_clips) == (n, 20 * n)
    assert peak < size / 1.5 and held / n < 500, (held, peak, size)


# -- killed ------------------------------------------------------------------------------------------------------------

SEED = random.SystemRandom().randrange(10**6)
KILLS = 4
MODES = {"alone": [(1, 0, 1)], "two workers": [(2, 0, 1)], "two shards": [(1, 0, 2), (1, 1, 2)]}


class _Runs:
    """The processes of a run: (workers, index, count) each."""

    def __init__(self, videos: Path, out: Path, mode: list[tuple[int, int, int]]) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        self.processes = [context.Process(target=curate_runs.run, args=(str(videos), str(out), *m)) for m in mode]
        for process in self.processes:
            for attempt in range(20):
                try:
                    process.start()
                    break
                except (OSError, EOFError):  # see SERVER_GONE
                    assert attempt < 19
                    time.sleep(0.2)

    def finish(self) -> list[int | None]:
        """Exit codes; where one has lost its server the others, which may wait for it, are killed."""
        until(lambda: not any(p.is_alive() for p in self.processes) or curate_runs.SERVER_GONE in self._codes(), 120)
        for process in self.processes:
            process.kill()
            process.join()
        return self._codes()

    def _codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def kill(self) -> bool:
        """Whether all were still at work."""
        for process in self.processes:
            process.kill()
        return set(self.finish()) == {-9}


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_moment_and_begun_again_the_bytes_are_the_same(mode, videos, undisturbed, tmp_path):
    began = time.monotonic()
    codes = _Runs(videos, tmp_path / "whole", MODES[mode]).finish()
    took = time.monotonic() - began
    assert set(codes) == {0}
    assert _results(tmp_path / "whole") == undisturbed
    print(f"{mode}: seed {SEED}, {took:.2f} s undisturbed")
    rng, kills, tries = random.Random(SEED), 0, 0
    while kills < KILLS:
        out = tmp_path / str(tries)
        for _ in range(2):  # a run that was killed, and one that went on from there
            runs = _Runs(videos, out, MODES[mode])
            time.sleep(rng.uniform(0, took))
            kills += runs.kill()
        while set(codes := _Runs(videos, out, MODES[mode]).finish()) != {0}:
            assert curate_runs.SERVER_GONE in codes, (SEED, tries, codes)
        assert _results(out) == undisturbed, (SEED, tries)
        tries += 1
        assert tries < 5 * KILLS
    print(f"{kills} kills met all processes at work")
