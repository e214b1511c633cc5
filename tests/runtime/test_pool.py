"""Workers that really crash and hang: what they did it on is known, and everything else is done."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pool_jobs
import pytest
from processes import alive, until

from tempo_fast.errors import InputError
from tempo_fast.runtime import pool
from tempo_fast.runtime.pool import JOBS_PER_PROCESS, Outcome, run_isolated, warm_up


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """A process forks all workers of a test run: what the first asks it to import is what it has for the others."""
    warm_up(["tempo_fast.scan.row"])


@pytest.mark.parametrize("workers", [1, 3])
def test_every_failure_has_its_name(workers, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    jobs = ["ok 1", "abort", "ok 2", f"hang {pipe}", "exit 3", "spin", "report-abort", "raise no", "refuse all", "ok 3"]
    jobs += [word for i in range(6) for word in ("abort", f"ok {i + 4}")]
    found = collections.defaultdict(list)
    limits = {f"hang {pipe}": 0.4, "spin": 0.4}
    for job, outcome in run_isolated(
        pool_jobs.act, jobs, workers=workers, timeout=lambda job: limits.get(job, 60.0), shared={"a": 1}
    ):
        found[job].append(outcome)
    assert {job: len(outcomes) for job, outcomes in found.items()} == collections.Counter(jobs)
    for job, outcomes in found.items():
        if job.startswith("ok"):
            assert [(o.value[:2], o.failure) for o in outcomes] == [((job, {"a": 1}), "")]
    assert found["abort"] == [Outcome(failure="crash", exitcode=-6)] * 7
    assert found["exit 3"] == [Outcome(failure="crash", exitcode=3)]
    assert found["report-abort"] == [Outcome("so far", "crash", -6)]
    assert found["spin"] == [Outcome("spinning", "timeout")]
    assert found[f"hang {pipe}"] == [Outcome(failure="timeout")]
    [raised] = found["raise no"]
    assert raised.failure == "error" and str(raised.error) == "ValueError: no" and "pool_jobs.py" in str(
        raised.error.__cause__
    )  # fmt: skip
    [refused] = found["refuse all"]
    assert isinstance(refused.error, InputError) and str(refused.error) == "all"


def test_workers_are_renewed_and_jobs_are_taken_one_by_one():
    taken = 0

    def jobs():
        nonlocal taken
        for i in range(2 * JOBS_PER_PROCESS + 1):
            taken += 1
            yield f"ok {i}"

    pids = collections.Counter()
    for done, (_, outcome) in enumerate(run_isolated(pool_jobs.act, jobs(), workers=1, timeout=lambda job: 60.0), 1):
        pids[outcome.value[2]] += 1
        assert taken <= done + 1
    assert sorted(pids.values()) == [1, JOBS_PER_PROCESS, JOBS_PER_PROCESS]


def test_no_jobs_no_workers():
    assert list(run_isolated(pool_jobs.act, [], workers=2, timeout=lambda job: 1.0)) == []


def written(note: Path) -> bool:
    return note.exists() and note.read_text() != ""


def test_closing_ends_what_is_running(tmp_path):
    note = tmp_path / "pid"
    work = run_isolated(pool_jobs.act, [f"note {note}", "ok"], workers=2, timeout=lambda job: 60.0)
    assert next(work)[0] == "ok"
    assert until(lambda: written(note))
    worker = int(note.read_text())
    assert alive(worker)
    work.close()
    assert not alive(worker)


def test_check_stops_the_work(tmp_path):
    note = tmp_path / "pid"

    def check():
        if written(note):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(run_isolated(pool_jobs.act, [f"note {note}"], workers=1, timeout=lambda job: 60.0, check=check))
    assert not alive(int(note.read_text()))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    note = tmp_path / "pid"
    code = (
        "import sys, pool_jobs\n"
        "from tempo_fast.runtime.pool import run_isolated\n"
        "if __name__ == '__main__':\n"
        "    list(run_isolated(pool_jobs.act, [sys.argv[1]], workers=1, timeout=lambda job: 60.0))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}:{root / 'tests'}"}
    parent = subprocess.Popen([sys.executable, str(script), f"note {note}"], env=env)
    try:
        assert until(lambda: written(note))
        worker = int(note.read_text())
        assert alive(worker)
    finally:
        parent.kill()
        parent.wait()
    assert until(lambda: not alive(worker), 10)


def start_with(action: str, argument: object, check=lambda: None) -> None:
    """Workers that do this before they are ready for jobs."""
    shared = pool_jobs.Late(action, str(argument))
    list(run_isolated(pool_jobs.act, ["ok 1"], workers=2, timeout=lambda job: 60.0, shared=shared, check=check))


def test_workers_that_cannot_start_say_why():
    with pytest.raises(InputError) as stopped:
        start_with("exit", 3)
    assert str(stopped.value) == "a worker process cannot start (exit code 3)"
    with pytest.raises(InputError) as stopped:
        start_with("kill", 9)
    assert str(stopped.value) == "a worker process cannot start (SIGKILL); fewer may fit into memory"


def test_workers_that_never_are_ready_are_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "_START_S", 0.7)
    note = tmp_path / "pid"
    with pytest.raises(InputError, match="a worker process did not start within 0.7 s"):
        start_with("note", note)
    assert not alive(int(note.read_text()))


@pytest.mark.parametrize("early", [True, False])
def test_a_stop_comes_before_what_a_dead_worker_seems_to_say(early, tmp_path):
    """A signal to the whole group ends workers too."""
    note = tmp_path / "pid"

    def check():
        if written(note):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if early:
            start_with("note-exit", note, check)
        else:
            jobs = [f"note-exit {note}"]
            for _, outcome in run_isolated(pool_jobs.act, jobs, workers=1, timeout=lambda job: 60.0, check=check):
                assert not outcome.failure
