"""``tempo-fast scan`` over dozens of real files, good, damaged and strange."""

from __future__ import annotations

import json
import os
import random
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from counter_clips import write_counter
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast import cli
from tempo_fast.files import read_json, write_jsonl
from tempo_fast.pairs.formats import FORMATS, write_pairs
from tempo_fast.scan.row import frames_to_decode
from tempo_fast.scan.sources import find_videos
from tempo_fast.scan.summary import percentile, reason_kind
from tempo_fast.schema import PreferenceRecord, Rejected
from tempo_fast.video.container import DecodeError
from tempo_fast.video.decode_pyav import PyAVDecoder

GOOD = 24
BAD = ("cut.mp4", "empty.mp4", "noise.mkv", "silent.mp4", "text.mp4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 good files of several shapes, in two folders, and five bad ones."""
    out = tmp_path_factory.mktemp("videos")
    (out / "sub").mkdir()
    shapes: list[dict[str, Any]] = [{}, {"bframes": 2}, {"gop": 60}, {"audio": True}, {"size": (132, 256)}]
    shapes.append({"rate": 10})
    for i in range(GOOD):
        suffix = "mkv" if i % 5 == 4 else "mp4"
        write_counter(out / ("sub" if i % 3 else ".") / f"v{i:02d}.{suffix}", 20 + 3 * i, **shapes[i % len(shapes)])
    whole = (out / "v00.mp4").read_bytes()
    (out / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (out / "empty.mp4").write_bytes(b"")
    (out / "sub" / "noise.mkv").write_bytes(random.Random(0).randbytes(4000))
    (out / "text.mp4").write_text("not a film, only words\n" * 50)
    (out / "silent.mp4").write_bytes(b"\0\0\0\x18ftypisom\0\0\0\0isommp42\0\0\0\x08moov")
    return out


def scan(*words: object) -> int:
    return cli.main(["scan", *map(str, words)])


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what is measured."""
    return [{k: v for k, v in row.items() if k != "decode_s"} for row in rows]


def test_rows_do_not_depend_on_the_number_of_workers(folder, tmp_path, capsys):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    found = {}
    for workers in (1, 2, 5):
        out = tmp_path / f"{workers}.jsonl"
        assert scan(folder, "--out", out, "--workers", workers) == 0
        found[workers] = rows_of(out)
        assert [row["video"] for row in found[workers]] == list(map(str, files)), "rows stand in the order of the files"
        assert f"{GOOD} of {GOOD + len(BAD)} videos can be read" in capsys.readouterr().out
    assert timeless(found[1]) == timeless(found[2]) == timeless(found[5])
    for row in found[1]:
        assert row["ok"] == (Path(row["video"]).name not in BAD) and bool(row["reason"]) != row["ok"]
        assert row["size_bytes"] == os.path.getsize(row["video"])
        if row["ok"]:
            assert 0 < row["decode_s"] < 60 and row["sampled_frames"] <= row["frames_to_decode"] <= row["frames"]


def test_facts_of_one_file(tmp_path, capsys):
    path = write_counter(
        tmp_path / "a.mp4", 100, gop=40, rate=25, audio=True,
        options={"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709:scenecut=0"},
    )  # fmt: skip
    out = tmp_path / "o.jsonl"
    assert scan(path, "--out", out, "--workers", 1) == 0
    [row] = rows_of(out)
    facts = {
        "ok": True, "codec": "h264", "width": 192, "height": 64, "fps": 25.0, "frames": 100, "duration_s": 4.0,
        "rotation": 0, "edit_list": False, "vfr": False, "has_audio": True, "color_space": "bt709",
        "color_range": "limited", "longest_gop": 40, "sampled_frames": 4, "mirrored": False,
    }  # fmt: skip
    assert {k: row[k] for k in facts} == facts
    assert row["profile"] and row["tokens"] == 2 * row["resized"][0] * row["resized"][1] // 28**2
    # frames 0, 33, 66, 99 from keyframes 0, 40, 80
    assert row["frames_to_decode"] == 1 + 33 + 27 + 20
    assert "a.mp4  h264   192x64   25     100      4.0   40" in capsys.readouterr().out


def test_rows_are_kept_until_their_file_or_the_question_changes(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(4):
        write_counter(videos / f"{i}.mp4", 30 + i)
    out = tmp_path / "rows" / "rows.jsonl"

    def again(*words: object) -> tuple[int, list[str]]:
        assert scan(videos, "--out", out, "--workers", 1, *words) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        kept = int(last.rpartition(", ")[2].split()[0]) if "from before" in last else 0
        return kept, out.read_text().splitlines()

    kept, first = again()
    assert kept == 0 and len(first) == 4 and again() == (4, first)
    write_counter(videos / "1.mp4", 50)
    os.utime(videos / "2.mp4", ns=(1, 1))
    (videos / "3.mp4").unlink()
    kept, second = again()
    assert kept == 1 and second[0] == first[0] and len(second) == 3 and json.loads(second[1])["frames"] == 50
    other = ("--video.fps", 8, "--model.path", "tinyworld")
    assert again(*other)[0] == 0 and again(*other)[0] == 3 and again(*other, "--fresh")[0] == 0
    assert again(*other, "--decode", "all")[0] == 0


def test_the_summary_beside_the_rows(folder, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\nvideo: {{fps: 4, min_pixels: 50176}}\ntrain: {{max_tokens: 300}}\n")
    assert scan(folder, "--out", out, "--recipe", recipe) == 0
    said = read_json(tmp_path / "o.summary.json")
    rows = rows_of(out)
    tokens = sorted(r["tokens"] for r in rows if r["ok"])
    assert (said["videos"], said["ok"]) == (len(rows), GOOD)
    assert said["hours"] == round(sum(r["duration_s"] for r in rows if r["ok"]) / 3600, 4)
    assert said["codecs"] == {"h264": GOOD} and said["size_bytes"] == sum(r["size_bytes"] for r in rows)
    over = sum(t > 300 for t in tokens)
    assert 0 < over < GOOD, "the limit lies inside the range"
    assert said["tokens"]["over_max_tokens"] == over and said["tokens"]["max_tokens"] == 300
    assert (said["tokens"]["most"], said["tokens"]["together"]) == (tokens[-1], sum(tokens))
    assert said["tokens"]["median"] == tokens[(GOOD - 1) // 2] and said["tokens"]["p95"] == tokens[22]
    assert said["decode"]["frames_to_decode"] == sum(r["frames_to_decode"] for r in rows if r["ok"])
    assert sum(q["videos"] for q in said["quarantine"]) == len(BAD)
    assert {Path(v).name for q in said["quarantine"] for v in q["first"]} == set(BAD)
    printed = capsys.readouterr().out
    assert f"{over} over train.max_tokens (300)" in printed and f"{out}: {len(rows)} rows" in printed


@given(values=st.lists(st.integers(0, 10**6), min_size=1, max_size=60), percent=st.integers(1, 100))
def test_percentiles_are_nearest_ranks(values, percent):
    values.sort()
    at = percentile(values, percent)
    assert sum(v <= at for v in values) * 100 >= percent * len(values)
    assert sum(v < at for v in values) * 100 < percent * len(values)


def test_reasons_are_counted_without_their_numbers():
    kinds = {
        reason_kind(f"is truncated ({n} bytes, its 'mdat' box ends at {n + 7})") for n in (3, 512, 10**9)
    } | {reason_kind("is truncated (18 bytes of 19)")}  # fmt: skip
    assert kinds == {"is truncated"} and reason_kind("took longer than 2.5 s") == "took longer than … s"


@given(data=st.data())
def test_frames_to_decode_is_what_a_walk_counts(data):
    n = data.draw(st.integers(1, 60))
    indexed = data.draw(st.booleans())
    keys = {0, *data.draw(st.lists(st.integers(0, n - 1)))}
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1))

    class Info:
        n_frames = n
        keyframes = tuple(sorted(keys))

    Info.indexed = indexed  # type: ignore[attr-defined]
    walked, at = 0, -1
    for index in sorted(set(indices)):
        back = index
        while not (back == at + 1 or (indexed and back in keys)):
            back -= 1
        walked += index - back + 1
        at = index
    assert frames_to_decode(Info, indices) == walked  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", FORMATS)
def test_data_sets_name_their_videos(fmt, folder, tmp_path, monkeypatch):
    rejected = [Rejected(text="B, then A.", kind="shuffle", r=4)]
    names = [str(folder / "v00.mp4"), str(folder / "v03.mp4"), str(folder / "none.mp4"), str(folder / "v00.mp4")]
    records = [
        PreferenceRecord(id=str(i), video=name, prompt="What?", chosen="A, then B.", rejected=rejected, r=4)
        for i, name in enumerate(names)
    ]
    write_pairs(tmp_path / "pairs.jsonl", records, fmt)
    assert find_videos(str(tmp_path / "pairs.jsonl")) == [Path(n) for n in dict.fromkeys(names)]


def test_paths_in_data_sets_and_what_is_wrong_with_them(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "beside.mp4").write_bytes(b"")
    data = tmp_path / "sft.jsonl"
    inline = [{"role": "user", "content": [{"type": "video", "video": "v06.mp4"}, {"type": "text", "text": "?"}]}]
    write_jsonl(
        data,
        [
            {"video": "beside.mp4"}, {"video": "v00.mp4"}, {"videos": ["v03.mp4", "v00.mp4"]},
            {"prompt": "words alone"}, {"prompt": inline}, {"media_path": "nowhere.mp4"},
        ],
    )  # fmt: skip
    assert find_videos(str(data)) == [
        tmp_path / "beside.mp4", Path("v00.mp4"), Path("v03.mp4"), Path("v06.mp4"), tmp_path / "nowhere.mp4",
    ]  # fmt: skip
    out = tmp_path / "o.jsonl"
    assert scan(data, "--out", out, "--workers", 1) == 0
    assert [row["ok"] for row in rows_of(out)] == [False, True, True, True, False]
    assert "no such file" in capsys.readouterr().out
    for row, words in (
        ({"video": 3}, "sft.jsonl:1: field 'video' must be a path, got int"),
        ({"videos": "a.mp4"}, "sft.jsonl:1: field 'videos' must be a list of paths"),
        ({"prompt": "a"}, "no row names a video"),
    ):
        write_jsonl(data, [row])
        assert scan(data) == 2 and words in capsys.readouterr().err


def test_lists_globs_pipes_and_names_that_no_list_can_hold(folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.mp4")
    source = (folder / "v00.mp4").read_bytes()
    (tmp_path / "two\nlines.mp4").write_bytes(source)
    (tmp_path / "ünï côdé 视频.mp4").write_bytes(source)
    with open(os.fsencode(tmp_path) + b"/caf\xe9.mp4", "wb") as f:
        f.write(source)
    out = tmp_path / "o.jsonl"
    (tmp_path / "list.txt").write_text("pipe.mp4\nünï côdé 视频.mp4\n# a comment\nmissing.mp4\n")
    assert scan(tmp_path / "list.txt", "--out", out, "--workers", 1) == 0
    reasons = [row["reason"] for row in rows_of(out)]
    assert "pipe" in reasons[0] and reasons[1:] == ["", "no such file"]
    assert scan(tmp_path, "--out", out, "--workers", 1, "--fix", tmp_path.parent / "copies") == 0
    oks = {row["video"]: row["ok"] for row in rows_of(out)}
    assert sorted(oks.values()) == [False, False, True]
    assert (tmp_path.parent / "copies/videos.txt").read_text() == f"{tmp_path}/ünï côdé 视频.mp4\n"
    assert scan(f"{folder}/sub/*.mkv", "--out", out, "--fresh", "--no-decode") == 0
    assert [Path(r["video"]).suffix for r in rows_of(out)] == [".mkv"] * len(rows_of(out)) and len(rows_of(out)) > 2
    assert "decode_s" not in rows_of(out)[0]


def test_damage_in_the_middle_needs_every_frame(tmp_path):
    path = write_counter(tmp_path / "d.mp4", 300, bframes=2)
    data = bytearray(path.read_bytes())
    import av

    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    at, size = packets[151]
    data[at + 5 : at + size] = random.Random(3).randbytes(size - 5)
    path.write_bytes(data)
    out = tmp_path / "o.jsonl"
    assert scan(tmp_path, "--out", out, "--decode", "none") == 0 and rows_of(out)[0]["ok"]
    assert scan(tmp_path, "--out", out, "--decode", "all") == 0
    [row] = rows_of(out)
    assert not row["ok"] and "is damaged after 1" in row["reason"] and "of 300 frames" in row["reason"]
    assert row["frames"] == 300 and row["tokens"] > 0, "what the index says is told all the same"


def write_changing(path: Path, n: int, others: range) -> None:
    """MJPEG, every picture of its own; ``others`` have another size."""
    import av
    import numpy as np

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=30)
        stream.width, stream.height, stream.pix_fmt = 192, 64, "yuvj420p"
        rng = np.random.default_rng(n)
        for i in range(n):
            height, width = (96, 96) if i in others else (64, 192)
            coder = av.CodecContext.create("mjpeg", "w")
            coder.height, coder.width, coder.pix_fmt, coder.framerate = height, width, "yuvj420p", 30
            coder.time_base = Fraction(1, 30)
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (height, width, 3), np.uint8), format="rgb24")
            frame.pts = i
            for packet in [*coder.encode(frame.reformat(format="yuvj420p")), *coder.encode(None)]:
                packet.stream = stream
                file.mux(packet)


def test_a_picture_that_changes_in_the_middle_needs_every_frame(tmp_path):
    path = tmp_path / "m.mkv"
    write_changing(path, 40, range(17, 19))
    with pytest.raises(DecodeError, match="the picture changes from 192x64 to 96x96"):
        PyAVDecoder().decode(path, range(40))
    out = tmp_path / "o.jsonl"
    assert scan(path, "--out", out) == 0 and rows_of(out)[0]["ok"], "none of the two was sampled"
    assert scan(path, "--out", out, "--decode", "all", "--fix", tmp_path / "fixed") == 0
    [row] = rows_of(out)
    said = "is damaged after 17 of 40 frames (the picture changes from 192x64 to 96x96)"
    assert (row["ok"], row["reason"]) == (False, said)
    assert row["fix"] == "none" and "is damaged after frame 16; only 0.57 s are left" in row["fix_reason"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{tmp}/none"], "none matches no file"),
        (["{tmp}"], "holds no video files"),
        (["{tmp}/empty.txt"], "lists no paths"),
        (["{tmp}/bad.jsonl"], "bad.jsonl:1: not valid JSON"),
        (["{folder}", "--fix", "{folder}/fixed"], "is reached by"),
        (["{folder}/*.mp4", "--fix", "{folder}"], "is reached by"),
        (["{folder}", "--fix", "/proc/copies"], "--fix: /proc/copies cannot be written"),
        (["{folder}", "--fix", "{tmp}/empty.txt/x"], "empty.txt/x cannot be written"),
        (["{folder}", "--out", "/proc/rows.jsonl"], "/proc/rows.jsonl: cannot be written"),
        (["{folder}", "--out", "{tmp}/mine.jsonl"], "mine.jsonl: line 1 was not written by a scan"),
        (["{folder}", "--out", "{tmp}/mine.jsonl", "--fresh"], "was not written by a scan"),
        (["{folder}", "--workers", "-1"], "--workers must be at least 0, got -1"),
        (["{folder}", "--timeout", "0"], "--timeout must be a number of seconds over 0, got 0"),
        (["{folder}", "--timeout", "nan"], "--timeout must be a number of seconds over 0, got nan"),
        (["{folder}", "--gop", "0"], "--gop must be at least 1, got 0"),
        (["{folder}", "--gop", "100", "--max-gop", "50"], "--max-gop must be at least --gop (100), got 50"),
        (["{folder}", "--fres"], "--fres is not a known key"),
        (["{folder}", "--wrokers", "1"], "--wrokers is not a known key"),
        (["{folder}", "--decode", "some"], "invalid choice: 'some'"),
        (["{folder}", "--video.backend", "dali-gpu"], "dali-gpu was asked for"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence_and_2(words, said, folder, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "mine.jsonl").write_text('{"video": "a.mp4", "prompt": "mine"}\n')
    before = sorted(folder.rglob("*"))
    assert scan(*(w.format(folder=folder, tmp=tmp_path) for w in words)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert (tmp_path / "mine.jsonl").read_text() == '{"video": "a.mp4", "prompt": "mine"}\n'
    assert sorted(folder.rglob("*")) == before


def test_a_full_disk_keeps_the_rows_so_far(folder, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    words = [folder, "--out", disk / "rows.jsonl", "--workers", 1]
    try:
        assert scan(*words) == 2
        assert f"{disk}/rows.jsonl: cannot be written (No space left on device)" in capsys.readouterr().err
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert scan(*words) == 0
        assert len(rows_of(disk / "rows.jsonl")) == GOOD + len(BAD) and "of them from before" in capsys.readouterr().out
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, capsys):
    """As for a user without the right; root reads everything, hence the stand-in for the system's answer."""
    locked = tmp_path / "locked"
    locked.mkdir()
    real = os.listdir

    def listdir(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert scan(locked) == 2
    assert f"{locked}: cannot be read (Permission denied)" in capsys.readouterr().err
