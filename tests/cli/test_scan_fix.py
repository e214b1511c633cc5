"""``tempo-fast scan --fix``: copies of what cannot be used safely or cheaply, and a list of what to train on."""

from __future__ import annotations

import glob
import json
import os
import random
import re
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
from tempo_fast.scan.sources import reaches
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import probe
from tempo_fast.video.repair import RepairConfig, possible_names, repair


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
    assert (said["fix"], said["unfixed"]) == ({"none": 4, "remux": 2, "reencode": 2}, 2)
    printed = capsys.readouterr().out
    assert "repairs: 2 remuxed, 2 re-encoded; 2 wanted a copy and got none\n" in printed
    assert "edit list, fixed by reencode" in printed
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


@pytest.mark.parametrize(
    ("pattern", "fixed", "fits"),
    [
        ("{tmp}/g/**/*.mp4", "{tmp}/g/fixed", False), ("{tmp}/g/**/*.mp4", "{tmp}/g/a/b/fixed", False),
        ("{tmp}/g/*/*.m*", "{tmp}/g/fixed", False), ("{tmp}/g/**", "{tmp}/g/fixed", False),
        ("g/**/*.mp4", "{tmp}/g/fixed", False), ("g/*/../**/v*.mp4", "g/fixed", False),
        ("{tmp}/g/*/v.mp4", "{tmp}/g/fixed", True), ("{tmp}/g/*/*.mp4", "{tmp}/g/a/fixed", True),
        ("{tmp}/g/**/*.mp4", "{tmp}/fixed", True), ("{tmp}/g/**/*.mp4", "{tmp}/g/.fixed", True),
        ("{tmp}/g/*.mp4", "{tmp}/g/fixed", True),
    ],
)  # fmt: skip
def test_the_next_scan_finds_the_same_files(pattern, fixed, fits, tmp_path, monkeypatch, capsys):
    (tmp_path / "g" / "a").mkdir(parents=True)
    hide_first(write_counter(tmp_path / "g" / "v.mp4", 40), 5)
    hide_first(write_counter(tmp_path / "g" / "a" / "v.mp4", 41), 5)
    monkeypatch.chdir(tmp_path)
    words = ["scan", pattern.format(tmp=tmp_path), "--fix", fixed.format(tmp=tmp_path), "--workers", "1"]
    before = sorted(tmp_path.rglob("*"))
    code = cli.main(words)
    assert code == (0 if fits else 2)
    printed, err = capsys.readouterr()
    if fits:
        assert cli.main(words) == 0 and capsys.readouterr().out.splitlines()[0] == printed.splitlines()[0]
        assert len(list(Path(fixed.format(tmp=tmp_path)).glob("*.mp4"))) == printed.count("fixed by")
    else:
        assert "whose next scan would take the copies for originals" in err and sorted(tmp_path.rglob("*")) == before


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
        assert "repairs: 2 re-encoded\n" in capsys.readouterr().out and len(list((disk / "fixed").glob("*.mp4"))) == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["a.mp4", "a.b.MOV", "c.webm", "d.MKV", "e.avi", "f", ".hidden.mp4", "ünï.ts"])
def test_copies_have_one_of_their_possible_names(name, tmp_path):
    """Which tells whether a pattern will find them."""
    if name.lower().endswith(("mkv", "webm")):
        source = write_counter(tmp_path / "w.mkv", 60)
    else:
        source = hide_last(write_counter(tmp_path / "w.mp4", 60), 0.5)
    names = set()
    for gop in (12, 5):  # copied as it is, where there is an edit list; encoded anew
        source.rename(tmp_path / name) if source.exists() else None
        made = repair(tmp_path / name, tmp_path, "wants a copy", RepairConfig(gop=gop - 1, max_gop=gop))
        names.add(re.sub(r"-[0-9a-f]{12}", "-000000000000", Path(made.path).name))
    possible = possible_names(tmp_path / name)
    assert names == possible if source.suffix == ".mp4" else names <= possible


def test_patterns_reach_what_glob_finds(tmp_path):
    """Against files that are there."""
    rng = random.Random(5)
    folders = [tmp_path / "/".join(rng.choices(["a", "b", ".c"], k=rng.randint(0, 3))) for _ in range(12)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "v-1.mp4").write_text("")
    parts = ["a", "*", "**", "?", "[ab]", ".c", ".*"]
    seen = set()
    for _ in range(300):
        last = rng.choice(["*.mp4", "**", "v*", "*.mkv"])
        spec = os.path.join(tmp_path, *rng.choices(parts, k=rng.randint(0, 3)), last)
        found = {os.path.dirname(p) for p in glob.glob(spec, recursive=True) if os.path.isfile(p)}
        for folder in folders:
            told = reaches(spec, folder, ["v-1.mp4"])
            assert told == (str(folder) in found), (spec, folder)
            seen.add(told)
    assert seen == {True, False}
