"""``tempo-fast scan --fix``: copies of what cannot be used safely or cheaply, and a list of what to train on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counter_clips import hide_first, hide_last, read_counter, write_counter

from tempo_fast import cli
from tempo_fast.curate import list_videos
from tempo_fast.files import file_digest, read_json
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import probe


def shown(path: Path | str) -> list[int]:
    return read_counter(PyAVDecoder().decode(path, range(probe(path).n_frames)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of every kind, in two folders where names repeat."""
    out = tmp_path / "videos"
    (out / "a").mkdir(parents=True)
    (out / "b").mkdir()
    write_counter(out / "a" / "good.mp4", 60)
    write_counter(out / "b" / "vfr.mkv", 60, pts=[0, *np.cumsum(np.random.default_rng(1).integers(9, 70, 59)).tolist()])
    hide_first(write_counter(out / "a" / "same.mp4", 80, bframes=2), 7)
    hide_last(write_counter(out / "b" / "same.mp4", 80), 0.5)
    write_counter(out / "b" / "far.mp4", 300, gop=400, bframes=2, audio=True)
    first = write_counter(out / "a" / "cut.mp4", 90, container={"movflags": "faststart"})
    first.write_bytes(first.read_bytes()[:-600])
    short = write_counter(out / "b" / "short.mp4", 20, container={"movflags": "faststart"})
    short.write_bytes(short.read_bytes()[:-300])
    (out / "b" / "words.mp4").write_text("only words\n" * 90)
    return out


def run(folder: Path, tmp_path: Path, *words: object) -> dict[str, dict[str, Any]]:
    out = tmp_path / "rows.jsonl"
    given = [folder, "--out", out, "--fix", tmp_path / "fixed", *words]
    assert cli.main(["scan", *map(str, given)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {str(Path(row["video"]).relative_to(folder)): row for row in rows}


def test_every_file_gets_what_it_needs(folder, tmp_path, capsys):
    originals = {p: (file_digest(p), p.stat().st_mtime_ns) for p in folder.rglob("*.m*")}
    rows = run(folder, tmp_path, "--workers", 2)
    assert {name: (row["ok"], row["fix"]) for name, row in rows.items()} == {
        "a/cut.mp4": (False, "remux"), "a/good.mp4": (True, "none"), "a/same.mp4": (True, "reencode"),
        "b/far.mp4": (True, "reencode"), "b/same.mp4": (True, "remux"), "b/short.mp4": (False, "none"),
        "b/vfr.mkv": (True, "none"), "b/words.mp4": (False, "none"),
    }  # fmt: skip
    assert {p: (file_digest(p), p.stat().st_mtime_ns) for p in originals} == originals
    assert shown(rows["a/same.mp4"]["fixed"]) == list(range(7, 80)) == shown(folder / "a/same.mp4")
    assert shown(rows["b/same.mp4"]["fixed"]) == list(range(len(shown(folder / "b/same.mp4"))))
    assert shown(rows["b/far.mp4"]["fixed"]) == list(range(300))
    kept = shown(rows["a/cut.mp4"]["fixed"])
    assert kept == list(range(len(kept))) and 60 < len(kept) < 90
    assert f"is damaged after frame {len(kept) - 1}" in rows["a/cut.mp4"]["fix_reason"]
    assert "less than 1 s" in rows["b/short.mp4"]["fix_reason"] and rows["a/good.mp4"]["fix_reason"] == ""
    assert rows["b/far.mp4"]["fix_reason"] == "up to 300 frames lie between keyframes (more than 250)"

    listed = (tmp_path / "fixed/videos.txt").read_text().splitlines()
    assert listed == [row["fixed"] or row["video"] for row in rows.values() if row["fixed"] or row["ok"]]
    assert len(listed) == 6 and all(os.path.isabs(name) for name in listed)
    assert sorted(p.name for p in (tmp_path / "fixed").iterdir()) == sorted(
        ["videos.txt", *(Path(row["fixed"]).name for row in rows.values() if row["fixed"])]
    )
    said = read_json(tmp_path / "rows.summary.json")
    assert said["fix"] == {"none": 4, "remux": 2, "reencode": 2}
    printed = capsys.readouterr().out
    assert "repairs: 4 none, 2 remux, 2 reencode" in printed and "edit list, fixed by reencode" in printed
    assert "ends at" in next(line for line in printed.splitlines() if line.startswith("cut.mp4") and "by remux" in line)

    # everything on the list is good as it is
    again = tmp_path / "again.jsonl"
    assert cli.main(["scan", str(tmp_path / "fixed/videos.txt"), "--out", str(again), "--decode", "all"]) == 0
    checked = [json.loads(line) for line in again.read_text().splitlines()]
    assert [str(p) for p in list_videos(str(tmp_path / "fixed/videos.txt"))] == [row["video"] for row in checked]
    assert all(row["ok"] and not row["edit_list"] and row["longest_gop"] <= 250 for row in checked)


def test_copies_are_made_once_and_again_when_they_are_missing_or_asked_otherwise(folder, tmp_path):
    rows = run(folder, tmp_path, "--workers", 1)
    copies = {row["fixed"]: os.stat(row["fixed"]) for row in rows.values() if row["fixed"]}
    gone = rows["b/far.mp4"]["fixed"]
    os.unlink(gone)
    assert run(folder, tmp_path, "--workers", 2) == rows
    for path, stat in copies.items():
        same = (os.stat(path).st_ino, os.stat(path).st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)
        assert same == (path != gone)
    strict = run(folder, tmp_path, "--gop", 10, "--max-gop", 11)
    assert strict["a/good.mp4"]["fix"] == "reencode" and strict["a/good.mp4"]["digest"] == rows["a/good.mp4"]["digest"]
    assert shown(strict["a/good.mp4"]["fixed"]) == list(range(60))


def test_workers_make_the_same_copies(folder, tmp_path):
    found = []
    for workers in (1, 2):
        base = tmp_path / str(workers)
        base.mkdir()
        rows = run(folder, base, "--workers", workers)
        copies = {name: Path(row["fixed"]) for name, row in rows.items() if row["fixed"]}
        found.append({name: (path.name, file_digest(path)) for name, path in copies.items()})
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_whole_file_that_no_model_takes_gets_no_copy(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    write_counter(videos / "strip.mp4", 40, size=(16, 3216))
    rows = run(videos, tmp_path, "--workers", 1)
    row = rows["strip.mp4"]
    assert not row["ok"] and "aspect ratio" in row["reason"] and (row["fix"], row["fixed"]) == ("none", "")
    assert (tmp_path / "fixed/videos.txt").read_text() == ""


def test_names_with_a_colon(tmp_path, monkeypatch):
    """FFmpeg takes what stands before one for a protocol."""
    videos = tmp_path / "vid:eos"
    videos.mkdir()
    hide_first(write_counter(videos / "a:1.mp4", 40), 5)
    hide_last(write_counter(videos / "b:2.mp4", 60), 0.5)
    monkeypatch.chdir(tmp_path)
    words = ["scan", "vid:eos", "--fix", "cop:ies", "--out", "ro:ws.jsonl", "--workers", "1"]
    assert cli.main(words) == 0
    rows = [json.loads(line) for line in Path("ro:ws.jsonl").read_text().splitlines()]
    assert [row["fix"] for row in rows] == ["reencode", "remux"], [row["fix_reason"] for row in rows]
    assert [shown(row["fixed"]) for row in rows] == [list(range(5, 40)), list(range(45))]


def test_a_data_set_from_elsewhere(folder, tmp_path):
    """The folder of copies may lie beside the data set, as long as no video of it is inside."""
    data = folder / "sft.jsonl"
    data.write_text('{"video": "b/far.mp4"}\n{"video": "a/good.mp4"}\n{"video": "b/far.mp4"}\n')
    words = [data, "--fix", folder / "copies", "--workers", 1]
    assert cli.main(["scan", *map(str, words)]) == 0
    listed = (folder / "copies" / "videos.txt").read_text().splitlines()
    assert len(listed) == 2 and Path(listed[0]).parent == folder / "copies" and listed[1] == str(folder / "a/good.mp4")


def test_a_full_disk_is_one_sentence_and_the_scan_goes_on_with_room(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    noise = torch.Generator().manual_seed(1)
    for i in range(2):
        write_counter(
            videos / f"{i}.mp4", 60, gop=400,
            turn=lambda f: torch.randint(0, 256, f.shape, generator=noise, dtype=torch.uint8).numpy(),
        )  # fmt: skip
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    words = ["scan", str(videos), "--fix", str(disk / "fixed"), "--out", str(tmp_path / "rows.jsonl")]
    words += ["--max-gop", "50", "--workers", "2"]
    try:
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert "No space left" in err and str(disk / "fixed") in err and "Traceback" not in err
        assert not [p for p in (disk / "fixed").rglob("*") if p.is_file()]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert cli.main(words) == 0
        assert "2 reencode" in capsys.readouterr().out and len(list((disk / "fixed").glob("*.mp4"))) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
