"""What is tried again on a resumed scan: whatever went wrong for another reason than the file's bytes."""

from __future__ import annotations

import builtins
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from counter_clips import hide_first, write_counter

from tempo_fast import cli
from tempo_fast.errors import InputError
from tempo_fast.runtime.pool import Outcome
from tempo_fast.scan import command


class Pool:
    """In the place of worker processes: jobs run in this one, or have the outcome that is given for their path."""

    def __init__(self) -> None:
        self.scanned: list[str] = []
        self.repaired: list[str] = []
        self.fails: dict[tuple[str, bool], Outcome] = {}  # (file name, repair)

    def __call__(self, function: Any, jobs: Any, *, shared: Any, **_: Any) -> Iterator[tuple[Any, Outcome]]:
        for job in jobs:
            name = Path(job.path).name
            (self.repaired if job.repair else self.scanned).append(name)
            yield job, self.fails.get((name, job.repair)) or Outcome(function(job, shared, lambda row: None))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    made = Pool()
    monkeypatch.setattr(command, "run_isolated", made)
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "videos"
    out.mkdir()
    write_counter(out / "a.mp4", 40)
    hide_first(write_counter(out / "b.mp4", 40), 5)
    (out / "c.mp4").write_bytes(b"words\n" * 9)
    return out


def scan(folder: Path, *words: object) -> dict[str, dict[str, Any]]:
    out = folder.parent / "rows.jsonl"
    assert cli.main(["scan", *map(str, [folder, "--out", out, *words])]) == 0
    return {Path(row["video"]).name: row for row in map(json.loads, out.read_text().splitlines())}


def fail_to_open(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """As the system answers for a file on a disk that does not, or one that may not be read (root may read all)."""
    real = builtins.open

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", failing)


@pytest.mark.parametrize(
    ("error", "failure", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "io", "cannot be read (Permission denied)"),
        (OSError(errno.EIO, "Input/output error"), "io", "cannot be read (Input/output error)"),
        (MemoryError(), "memory", "does not fit into memory"),
    ],
)
def test_a_file_that_could_not_be_read_is_read_again(error, failure, said, folder, tmp_path, pool):
    with pytest.MonkeyPatch.context() as patch:
        fail_to_open(patch, "a.mp4", error)
        row = scan(folder, "--fix", tmp_path / "fixed")["a.mp4"]
    assert (row["ok"], row["failure"], row["reason"], row["fix"]) == (False, failure, said, "none")
    assert "a.mp4" not in pool.repaired, "nothing says that its bytes are damaged"
    pool.scanned.clear()
    rows = scan(folder, "--fix", tmp_path / "fixed")
    assert pool.scanned == ["a.mp4"] and rows["a.mp4"]["ok"] and "failure" not in rows["a.mp4"]
    assert pool.repaired == ["b.mp4", "c.mp4"], "once"


@pytest.mark.parametrize(
    "outcome", [Outcome(failure="crash", exitcode=-15), Outcome(failure="error", error=RuntimeError("OSError: 5"))]
)
@pytest.mark.parametrize("repair", [False, True])
def test_what_a_dead_worker_had_is_done_again(outcome, repair, folder, tmp_path, pool):
    pool.fails["b.mp4", repair] = outcome
    row = scan(folder, "--fix", tmp_path / "fixed")["b.mp4"]
    assert (row["fix"], row["fixed"], row["ok"]) == ("none", "", repair)
    pool.fails.clear()
    pool.scanned.clear()
    pool.repaired.clear()
    row = scan(folder, "--fix", tmp_path / "fixed")["b.mp4"]
    assert row["ok"] and row["fix"] == "reencode" and row["fix_reason"] == "its edit list hides frames"
    assert (pool.scanned, pool.repaired) == ([] if repair else ["b.mp4"], ["b.mp4"])
    assert scan(folder, "--fix", tmp_path / "fixed")["b.mp4"] == row and pool.repaired == ["b.mp4"]


def test_a_repair_that_took_too_long_is_tried_with_more_time_only(folder, tmp_path, pool):
    words = ["--fix", tmp_path / "fixed", "--timeout"]
    pool.fails["b.mp4", True] = Outcome(failure="timeout")
    assert "took longer than" in scan(folder, *words, 30)["b.mp4"]["fix_reason"]
    pool.fails.clear()
    for seconds, fix, times in ((30, "none", 1), (20, "none", 1), (31, "reencode", 2), (40, "reencode", 2)):
        assert scan(folder, *words, seconds)["b.mp4"]["fix"] == fix
        assert pool.repaired.count("b.mp4") == times


def test_new_rules_of_repair_apply_to_a_resumed_scan(folder, tmp_path, pool, monkeypatch):
    from tempo_fast.video import repair

    scan(folder, "--fix", tmp_path / "fixed")
    monkeypatch.setattr(repair, "RULES", repair.RULES + 1)
    scan(folder, "--fix", tmp_path / "fixed")
    assert pool.repaired == ["b.mp4", "c.mp4"] * 2 and len(pool.scanned) == 3


def test_a_full_disk_under_the_rows_is_not_one_under_the_copies(folder, tmp_path, pool, monkeypatch, capsys):
    from tempo_fast.scan.rows import RowFile

    real = RowFile.append

    def append(self: RowFile, row: dict[str, Any]) -> None:
        if row.get("fix") == "reencode":
            raise InputError(f"{self.path}: cannot be written ({os.strerror(errno.ENOSPC)})")
        real(self, row)

    monkeypatch.setattr(RowFile, "append", append)
    assert cli.main(["scan", str(folder), "--out", f"{tmp_path}/rows.jsonl", "--fix", f"{tmp_path}/fixed"]) == 2
    err = capsys.readouterr().err
    assert err == f"tempo-fast: {tmp_path}/rows.jsonl: cannot be written (No space left on device)\n"
