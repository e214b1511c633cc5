"""Workers that really crash and hang: what they did it on is known, and everything else is done."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scan_jobs

from tempo_fast.errors import InputError
from tempo_fast.scan.pool import JOBS_PER_PROCESS, Outcome, run_isolated, warm_up


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """A process forks all workers of a test run: what the first asks it to import is what it has for the others."""
    warm_up(["tempo_fast.scan.row"])


def alive(pid: int) -> bool:
    """Running, and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(happened, seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("workers", [1, 3])
def test_every_failure_has_its_name(workers, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    jobs = ["ok 1", "abort", "ok 2", f"hang {pipe}", "exit 3", "spin", "report-abort", "raise no", "refuse all", "ok 3"]
    jobs += [word for i in range(6) for word in ("abort", f"ok {i + 4}")]
    found = collections.defaultdict(list)
    limits = {f"hang {pipe}": 0.4, "spin": 0.4}
    for job, outcome in run_isolated(
        scan_jobs.act, jobs, workers=workers, timeout=lambda job: limits.get(job, 60.0), shared={"a": 1}
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
    assert raised.failure == "error" and str(raised.error) == "ValueError: no" and "scan_jobs.py" in str(
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
    for done, (_, outcome) in enumerate(run_isolated(scan_jobs.act, jobs(), workers=1, timeout=lambda job: 60.0), 1):
        pids[outcome.value[2]] += 1
        assert taken <= done + 1
    assert sorted(pids.values()) == [1, JOBS_PER_PROCESS, JOBS_PER_PROCESS]


def test_no_jobs_no_workers():
    assert list(run_isolated(scan_jobs.act, [], workers=2, timeout=lambda job: 1.0)) == []


def written(note: Path) -> bool:
    return note.exists() and note.read_text() != ""


def test_closing_ends_what_is_running(tmp_path):
    note = tmp_path / "pid"
    work = run_isolated(scan_jobs.act, [f"note {note}", "ok"], workers=2, timeout=lambda job: 60.0)
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
        next(run_isolated(scan_jobs.act, [f"note {note}"], workers=1, timeout=lambda job: 60.0, check=check))
    assert not alive(int(note.read_text()))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    note = tmp_path / "pid"
    code = (
        "import sys, scan_jobs\n"
        "from tempo_fast.scan.pool import run_isolated\n"
        "if __name__ == '__main__':\n"
        "    list(run_isolated(scan_jobs.act, [sys.argv[1]], workers=1, timeout=lambda job: 60.0))\n"
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
