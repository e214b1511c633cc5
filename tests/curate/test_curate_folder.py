"""A folder of videos, some bad: nothing stops the run, nothing is done twice, and what may pass is tried again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import curate_runs
import numpy as np
import pytest

from tempo_fast.config import CurateConfig
from tempo_fast.curate import CurateResult, curate_folder, list_videos
from tempo_fast.curate import folder as folder_module
from tempo_fast.curate.sources import stamp_of
from tempo_fast.curate.work import Job, Shared, curate_file
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.schema import Clips, read_records

CONFIG = CurateConfig()
RESULTS = ("clips.jsonl", "filtered.jsonl", "quarantine.jsonl")


@pytest.fixture(scope="module")
def videos(tmp_path_factory, film) -> list[Path]:
    """Six usable films, one of a single shot, one truncated, one text file, in this order by name."""
    root = tmp_path_factory.mktemp("videos")
    out = []
    for i in range(6):
        plan = [(p, 10 + i) for p in (i % 6, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6)]
        out.append(film.write(root / f"{i}.mp4", plan))
    out.append(film.write(root / "single.mp4", [(0, 30)]))
    (root / "cut.mp4").write_bytes(out[0].read_bytes()[:-2000])
    (root / "text.mp4").write_text("no film")
    return sorted(root.glob("*.mp4"))


def _results(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def _curate(paths, out: Path, **options) -> CurateResult:
    found = curate_folder(paths, options.pop("config", CONFIG), out, **options)
    assert found is not None
    return found


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]


def _worked_on(out: Path) -> list[str]:
    """Files about which there are rows, by name, in the order of rows."""
    return [Path(row["video"]).name for row in _lines(out)]


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    _curate(videos, out)
    return out


def test_bad_and_unusable_videos_are_listed_with_reasons(videos, undisturbed):
    result = _curate(videos, undisturbed)
    assert [Path(c.video).name for c in result.clips] == [f"{i}.mp4" for i in range(6)]
    assert [(Path(r["video"]).name, r["reason"]) for r in result.filtered] == [
        ("single.mp4", "1 shot, fewer than curate.min_shots 4")
    ]
    assert [Path(r["video"]).name for r in result.quarantined] == ["cut.mp4", "text.mp4"]
    assert all(r["reason"] and r["video"] not in r["reason"] for r in result.quarantined)
    assert (result.n_usable, result.n_filtered, result.n_quarantined, result.n_clips) == (6, 1, 2, 24)
    assert read_records(undisturbed / "clips.jsonl", Clips) == result.clips


def test_nothing_is_done_twice(videos, tmp_path):
    first = _curate(videos, tmp_path)
    before = _lines(tmp_path)
    assert _curate(videos, tmp_path, workers=3) == first and _lines(tmp_path) == before
    # another config does everything again
    _curate(videos[:1], tmp_path, config=CurateConfig(min_clips=3))
    assert _worked_on(tmp_path)[len(before) :] == ["0.mp4"]
    # more patience and other processes change nothing
    _curate(videos, tmp_path, config=CurateConfig(workers=7, timeout_s=1000))
    assert len(_lines(tmp_path)) == len(before) + 1


def test_the_same_bytes_are_curated_once_whatever_their_name_and_time(videos, tmp_path):
    twin = tmp_path / "twin.mp4"
    twin.write_bytes(videos[0].read_bytes())
    result = _curate([videos[0], twin], tmp_path)
    one, other = result.clips
    assert [one.video, other.video] == [str(videos[0]), str(twin)] and one.clips == other.clips
    os.utime(twin)  # looked at again, and known by its bytes
    [first, *_] = _lines(tmp_path)
    assert curate_file(Job(str(twin), stamp_of(str(twin)), first["key"]), Shared(CONFIG))["same"]
    assert _curate([videos[0], twin], tmp_path).clips == [one, other]


def test_files_that_differ_in_the_middle_are_told_apart(tmp_path, film):
    rng = np.random.default_rng(0)
    path = tmp_path / "a.mp4"
    film.write_images(path, (rng.integers(0, 256, (80, 96, 3), dtype=np.uint8) for _ in range(20)))
    data = bytearray(path.read_bytes() + b"\0\1\0\0free" + bytes(65528))  # longer than the ends that are looked at
    path.write_bytes(data)
    assert len(data) > 140_000
    data[40_000] ^= 255
    (tmp_path / "b.mp4").write_bytes(data)
    _curate([path, tmp_path / "b.mp4"], tmp_path)
    one, other = _lines(tmp_path)
    assert one["sample"] == other["sample"] and one["key"] and other["key"] and one["key"] != other["key"]


def test_a_changed_file_is_done_again(videos, tmp_path):
    path = tmp_path / "v.mp4"
    shutil.copy(videos[0], path)
    first = _curate([path], tmp_path / "out").clips
    shutil.copy(videos[1], path)
    assert _curate([path], tmp_path / "out").clips != first
    shutil.copy(videos[-1], path)  # text
    assert _curate([path], tmp_path / "out").n_quarantined == 1


def test_what_may_pass_is_tried_again(videos, tmp_path, monkeypatch, film):
    names = ["crash.mp4", "hang.mp4", "memory.mp4"]
    for i, name in enumerate(names):
        shutil.copy(videos[i], tmp_path / name)
    paths = [*(tmp_path / n for n in names), tmp_path / "gone.mp4", tmp_path / "pipe.mp4", videos[4], videos[-1]]
    os.mkfifo(tmp_path / "pipe.mp4")
    out = tmp_path / "out"
    monkeypatch.setattr(folder_module, "curate_file", curate_runs.misbehave)
    result = _curate(paths, out, workers=2, timeout_s=3.0)
    reasons = {Path(r["video"]).name: r["reason"] for r in result.quarantined}
    assert reasons.pop("text.mp4") and reasons == {
        "crash.mp4": "crashed the process (SIGABRT)", "hang.mp4": "took longer than 3 s",
        "memory.mp4": "failed (MemoryError: )", "gone.mp4": "no such file",
        "pipe.mp4": "is a pipe or a device, not a video file",
    }  # fmt: skip
    assert [c.video for c in result.clips] == [str(videos[4])]
    shutil.copy(videos[5], tmp_path / "gone.mp4")
    done = len(_lines(out))
    monkeypatch.undo()
    result = _curate(paths, out, timeout_s=2.9)
    tried = {Path(row["video"]).name for row in _lines(out)[done:]}
    assert tried == {"crash.mp4", "memory.mp4", "gone.mp4", "pipe.mp4"}, "a timeout is for more time"
    assert result.n_usable == 4 and {Path(r["video"]).name for r in result.quarantined} == {
        "hang.mp4", "pipe.mp4", "text.mp4",
    }  # fmt: skip
    assert _curate(paths, out, timeout_s=60.0).n_usable == 5


def test_workers_give_the_same_files(videos, undisturbed, tmp_path):
    calls: list[tuple[int, int]] = []
    _curate(videos, tmp_path, workers=2, progress=lambda *a: calls.append(a))
    assert _results(tmp_path) == _results(undisturbed)
    assert calls == [(i, len(videos)) for i in range(len(videos) + 1)]


def test_a_stop_keeps_what_is_done(videos, undisturbed, tmp_path):
    journal = tmp_path / "journal.jsonl"

    def check() -> None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 3:
            raise Interrupted("stop", 130)

    with pytest.raises(Interrupted):
        _curate(videos, tmp_path, check=check)
    assert len(_lines(tmp_path)) == 3 and not (tmp_path / "clips.jsonl").exists()
    _curate(videos, tmp_path)
    assert _results(tmp_path) == _results(undisturbed)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_half_written_last_line_is_done_again(cut, videos, undisturbed, tmp_path):
    lines = (undisturbed / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    _curate(videos, tmp_path)
    assert _results(tmp_path) == _results(undisturbed)
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(b"".join(lines[:2])) and _lines(tmp_path)


def test_what_is_missing_for_all_files_is_an_error_of_the_run(videos, tmp_path):
    siglip = CurateConfig(embedder="siglip", embedder_path=str(tmp_path))
    with pytest.raises(InputError, match="curate.embedder_path"):
        _curate(videos, tmp_path / "a", config=siglip)
    (tmp_path / "config.json").write_text("{}")  # found out by a worker
    with pytest.raises(InputError, match="curate.embedder_path: .* cannot be loaded"):
        _curate(videos, tmp_path / "b", config=siglip)
    with pytest.raises(InputError, match="video.backend"):
        _curate(videos, tmp_path / "c", backend="none")


def test_a_folder_that_cannot_be_written_is_named(videos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="journal.jsonl: cannot be written"):
        _curate(videos, tmp_path / "file")


def test_names_that_are_not_utf8(videos, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")
    shutil.copy(videos[0], odd)
    assert _curate([odd], tmp_path / "out").clips[0].video == odd
    assert _curate([odd], tmp_path / "out").n_usable == 1 and len(_lines(tmp_path / "out")) == 1


def test_what_list_videos_finds(tmp_path, videos):
    (tmp_path / "sub").mkdir()
    for name in ("b.MP4", "a.webm", "notes.txt", "sub/c.mkv", "sub/d.jpg"):
        (tmp_path / name).write_bytes(b"x")
    assert [str(p.relative_to(tmp_path)) for p in list_videos(str(tmp_path))] == ["a.webm", "b.MP4", "sub/c.mkv"]
    assert list_videos(str(tmp_path / "*.MP4")) == [tmp_path / "b.MP4"]
    assert list_videos(str(tmp_path / "a.webm")) == [tmp_path / "a.webm"]
    (tmp_path / "list.txt").write_text("# mine\nsub/c.mkv\n\na.webm\n/absolute.mp4\na.webm\n")
    assert list_videos(str(tmp_path / "list.txt")) == [
        tmp_path / "sub/c.mkv", tmp_path / "a.webm", Path("/absolute.mp4"),
    ]  # fmt: skip


def test_list_videos_refuses_what_holds_nothing(tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for spec, words in [
        ("", "is empty"), (str(tmp_path), "holds no video files"), (str(tmp_path / "*.mp4"), "matches no file"),
        (str(tmp_path / "empty.txt"), "lists no paths"), (str(tmp_path / "none"), "matches no file"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=f"data.videos: .*{words}"):
            list_videos(spec)
