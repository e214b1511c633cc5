"""A scan as a shell sees it: killed, interrupted, its workers killed, its files hanging; then run again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from counter_clips import write_counter
from processes import alive, stat_of, until

FILES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 files, each of which takes a moment to decode whole."""
    out = tmp_path_factory.mktemp("videos")
    first = write_counter(out / "v00.mp4", 200, gop=50)
    for i in range(1, FILES):
        (out / f"v{i:02d}.mp4").write_bytes(first.read_bytes())
    return out


def long_clip(path: Path, source: Path, times: int) -> Path:
    """The packets of ``source`` so many times over: quick to write, slow to decode."""
    import av

    with av.open(str(source)) as container:
        packets = [(bytes(p), p.duration, p.is_keyframe) for p in container.demux(video=0) if p.size]
        stream = container.streams.video[0]
        with av.open(str(path), "w") as target:
            copy = target.add_stream_from_template(stream)
            at = 0
            for data, duration, key in packets * times:
                packet = av.Packet(data)
                packet.pts = packet.dts = at
                packet.duration, packet.time_base, packet.is_keyframe = duration, stream.time_base, key
                packet.stream = copy
                target.mux(packet)
                at += duration
    return path


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tempo_fast", "scan", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        cwd=Path(__file__).parents[2],
        # what runs in the background of a shell is born deaf to Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def lines_of(path: Path) -> list[str]:
    """Whole lines only: another process may be writing."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    return {Path(row["video"]).name: row for row in map(json.loads, lines_of(path))}


def children(pid: int) -> list[int]:
    """All processes below this one."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            below.setdefault(int(parent), []).append(int(stat.parent.name))
    out, queue = [], [pid]
    while queue:
        found = below.get(queue.pop(), [])
        out += found
        queue += found
    return out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_scan_goes_on_where_it_was(number, folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    words = [folder, "--out", out, "--workers", 2, "--decode", "all"]
    process = start(*words, "--fresh")
    assert until(lambda: len(lines_of(out)) >= 4)
    family = children(process.pid)
    assert len(family) >= 3, "two workers and what starts them"
    # as a terminal does: to the whole group
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    code, printed, err = end(process)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 75}[number]
    if number != signal.SIGKILL:
        assert err.count("\n") == 2 and "Traceback" not in err
        resume = f"the same command resumes: tempo-fast scan {shlex.join(map(str, words))}\n"
        assert err.endswith(resume), "with --fresh it would begin again"
    assert until(lambda: not any(alive(p) for p in family), 10), "no process is left"
    before = lines_of(out)
    assert 4 <= len(before) < FILES and not (tmp_path / "rows.summary.json").exists()
    if number == signal.SIGTERM:
        return
    with open(out, "a") as f:
        f.write('{"video": "half a li')

    code, printed, err = end(start(*words))
    assert code == 0, err
    after = lines_of(out)
    assert len(after) == FILES and set(before) <= set(after), "measured times included: nothing was scanned twice"
    assert f"{out}: {FILES} rows, {len(before)} of them from before" in printed
    assert [json.loads(line)["video"] for line in after] == sorted(str(p) for p in folder.iterdir())
    assert (tmp_path / "rows.summary.json").exists()


def test_an_interrupt_at_the_start_is_quiet(folder):
    """While this process and the one that workers come from still import."""
    process = start(folder, "--workers", 2)
    assert until(lambda: len(children(process.pid)) == 2)
    family = children(process.pid)
    time.sleep(0.7)
    os.killpg(process.pid, signal.SIGINT)
    code, printed, err = end(process)
    assert code == 130 and printed == "" and "Traceback" not in err and err.count("\n") <= 2, err
    assert until(lambda: not any(alive(p) for p in family), 30)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_repairs_go_on_where_they_were(number, folder, tmp_path):
    out, copies = tmp_path / "rows.jsonl", tmp_path / "copies"
    words = [folder, "--out", out, "--workers", 2, "--fix", copies, "--gop", 10, "--max-gop", 20, "--no-decode"]
    process = start(*words)
    assert until(lambda: sum('"fix": "reencode"' in line for line in lines_of(out)) >= 3)
    family = children(process.pid)
    os.kill(process.pid, number)
    code, printed, err = end(process)
    assert code == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    assert until(lambda: not any(alive(p) for p in family), 10)
    done = [row for row in map(json.loads, lines_of(out)) if row.get("fix") == "reencode"]
    assert 3 <= len(done) < FILES and not (copies / "videos.txt").exists()
    before = {row["fixed"]: os.stat(row["fixed"]).st_ino for row in done}
    if number == signal.SIGINT:
        assert not list(copies.glob(".*")), "no unfinished copy is left"
    for old in copies.glob(".*"):
        os.utime(old, (1, 1))  # as found days later

    code, printed, err = end(start(*words))
    assert code == 0, err
    rows = rows_of(out)
    assert len(rows) == FILES and {row["fix"] for row in rows.values()} == {"reencode"}
    assert {path: os.stat(path).st_ino for path in before} == before
    # all have the same bytes, and their own names
    assert len(list(copies.glob("*.mp4"))) == FILES and not list(copies.glob(".*"))
    assert (copies / "videos.txt").read_text().splitlines() == [rows[f"v{i:02d}.mp4"]["fixed"] for i in range(FILES)]


def test_files_in_work_when_the_group_is_terminated_are_repaired_later(folder, tmp_path):
    """As a scheduler does it: workers, and the process that they come from, end by the same signal."""
    out = tmp_path / "rows.jsonl"
    words = [f"{folder}/v0*.mp4", "--out", out, "--workers", 2, "--fix", tmp_path / "copies", "--no-decode"]
    words += ["--gop", 10, "--max-gop", 20]
    process = start(*words)
    assert until(lambda: sum('"fix": "reencode"' in line for line in lines_of(out)) >= 2)
    os.killpg(process.pid, signal.SIGTERM)
    code, printed, err = end(process)
    assert code == 75 and "Traceback" not in err, err
    fixes = [row["fix"] for row in rows_of(out).values() if "fix" in row]
    assert 2 <= len(fixes) < 10 and set(fixes) == {"reencode"}
    code, printed, err = end(start(*words))
    assert code == 0 and [row["fix"] for row in rows_of(out).values()] == ["reencode"] * 10, err


@pytest.mark.parametrize("wait", [0.0, 0.3, 0.7, 1.2])
def test_termination_at_the_start_is_75(wait, folder, tmp_path):
    """While this process and its workers import."""
    out = tmp_path / "rows.jsonl"
    process = start(folder, "--out", out, "--workers", 2, "--decode", "all")
    assert until(lambda: children(process.pid) != [])
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGTERM)
    code, printed, err = end(process)
    assert code == 75 and printed == "" and "Traceback" not in err and "cannot start" not in err, err
    assert all(row["ok"] for row in rows_of(out).values())


def test_without_a_file_nothing_is_kept(folder):
    process = start(folder, "--workers", 2, "--decode", "all")
    assert until(lambda: len(children(process.pid)) >= 4)
    os.kill(process.pid, signal.SIGINT)
    code, printed, err = end(process)
    assert code == 130 and printed == "" and "without --out no row is kept" in err


def test_a_killed_worker_names_its_file(folder, tmp_path):
    """SIGKILL, as the kernel does when memory is short."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(3):
        (videos / f"{i}.mp4").write_bytes((folder / "v00.mp4").read_bytes())
    long_clip(videos / "z.mp4", folder / "v00.mp4", 120)
    out = tmp_path / "rows.jsonl"
    words = [videos, "--out", out, "--workers", 1, "--decode", "all", "--timeout", 200]
    process = start(*words)
    assert until(lambda: len(lines_of(out)) == 3)
    time.sleep(0.2)
    # the youngest process is the worker: what it comes from was there before it
    worker = max(children(process.pid), key=lambda pid: int(stat_of(pid)[19]))
    os.kill(worker, signal.SIGKILL)
    code, printed, err = end(process)
    assert code == 0, err
    row = rows_of(out)["z.mp4"]
    assert (row["ok"], row["reason"]) == (False, "crashed the process (SIGKILL)")
    assert [rows_of(out)[f"{i}.mp4"]["ok"] for i in range(3)] == [True] * 3
    assert "3 of 4 videos can be read" in printed and "1 × crashed the process" in printed and "z.mp4" in printed
    code, printed, err = end(start(*words))
    assert code == 0 and "3 of them from before" in printed, "a crash is tried again: memory may be there now"
    assert rows_of(out)["z.mp4"]["ok"]


def test_a_slow_file_is_given_up_and_has_its_facts(folder, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes((folder / "v00.mp4").read_bytes())
    (videos / "c.mp4").write_bytes((folder / "v00.mp4").read_bytes())
    long_clip(videos / "b.mp4", write_counter(tmp_path / "w.mp4", 100, size=(360, 640)), 400)
    out = tmp_path / "rows.jsonl"
    words = [videos, "--out", out, "--workers", 1, "--decode", "all"]
    began = time.monotonic()
    code, printed, err = end(start(*words, "--timeout", 3))
    assert code == 0 and time.monotonic() - began < 60
    rows = rows_of(out)
    assert {name: row["ok"] for name, row in rows.items()} == {"a.mp4": True, "b.mp4": False, "c.mp4": True}
    assert rows["b.mp4"]["reason"] == "took longer than 3 s" and rows["b.mp4"]["frames"] == 40_000
    # with more time it is tried again, and again in vain
    assert "2 of them from before" in end(start(*words, "--timeout", 3.5))[1]
    assert rows_of(out)["b.mp4"]["reason"] == "took longer than 3.5 s"
