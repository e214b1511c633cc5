"""A folder of videos, some bad: nothing stops the run, nothing is done twice, and a kill loses at most one file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempo_fast.config import CurateConfig
from tempo_fast.curate import curate_folder, list_videos
from tempo_fast.curate import folder as folder_module
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


@pytest.fixture(scope="module")
def undisturbed(videos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    curate_folder(videos, CONFIG, out)
    return out


def test_bad_and_unusable_videos_are_listed_with_reasons(videos, undisturbed):
    result = curate_folder(videos, CONFIG, undisturbed)
    assert [Path(c.video).name for c in result.clips] == [f"{i}.mp4" for i in range(6)]
    assert [(Path(r["video"]).name, r["reason"]) for r in result.filtered] == [
        ("single.mp4", "1 shot, fewer than curate.min_shots 4")
    ]
    assert [Path(r["video"]).name for r in result.quarantined] == ["cut.mp4", "text.mp4"]
    assert all(r["reason"] and r["video"] not in r["reason"] for r in result.quarantined)
    assert read_records(undisturbed / "clips.jsonl", Clips) == result.clips
    rows = [json.loads(line) for line in (undisturbed / "quarantine.jsonl").read_text().splitlines()]
    assert rows == result.quarantined


def test_nothing_is_done_twice(videos, tmp_path, monkeypatch):
    first = curate_folder(videos, CONFIG, tmp_path)
    done: list[str] = []
    real = folder_module.curate_video
    monkeypatch.setattr(folder_module, "curate_video", lambda p, *a: (done.append(Path(p).name), real(p, *a))[1])
    assert curate_folder(videos, CONFIG, tmp_path) == first and done == []
    # another config does everything again; the same bytes under two names are done once
    twin = tmp_path / "twin.mp4"
    twin.write_bytes(videos[0].read_bytes())
    result = curate_folder([videos[0], twin], CurateConfig(min_clips=3), tmp_path)
    assert done == ["0.mp4"]
    assert [c.video for c in result.clips] == [str(videos[0]), str(twin)]
    assert result.clips[0].clips == result.clips[1].clips


def test_a_missing_file_is_quarantined(videos, tmp_path):
    result = curate_folder([tmp_path / "gone.mp4", videos[0]], CONFIG, tmp_path / "out")
    assert result.quarantined[0]["video"].endswith("gone.mp4") and len(result.clips) == 1


def test_workers_give_the_same_files(videos, undisturbed, tmp_path):
    calls: list[tuple[int, int]] = []
    curate_folder(videos, CONFIG, tmp_path, workers=2, progress=lambda *a: calls.append(a))
    assert _results(tmp_path) == _results(undisturbed)
    assert calls[-1] == (len(videos), len(videos)) and [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_a_stop_keeps_what_is_done(videos, undisturbed, tmp_path):
    seen = []

    def check() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise Interrupted("stop", 130)

    with pytest.raises(Interrupted):
        curate_folder(videos, CONFIG, tmp_path, check=check)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "clips.jsonl").exists()
    curate_folder(videos, CONFIG, tmp_path)
    assert _results(tmp_path) == _results(undisturbed)


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_half_written_last_line_is_done_again(cut, videos, undisturbed, tmp_path):
    lines = (undisturbed / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    curate_folder(videos, CONFIG, tmp_path)
    assert _results(tmp_path) == _results(undisturbed)
    assert all(json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines())


def test_kill_nine_midway_then_again_gives_the_undisturbed_result(videos, undisturbed, tmp_path):
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from tempo_fast.config import CurateConfig\n"
        "from tempo_fast.curate import curate_folder, list_videos\n"
        "curate_folder(list_videos(sys.argv[1]), CurateConfig(), sys.argv[2], check=lambda: time.sleep(0.3))\n"
    )
    journal = tmp_path / "journal.jsonl"
    running = subprocess.Popen([sys.executable, "-c", script, str(videos[0].parent), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.02)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert not (tmp_path / "clips.jsonl").exists()
    before = journal.read_bytes()
    curate_folder(videos, CONFIG, tmp_path)
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert _results(tmp_path) == _results(undisturbed)


def test_a_decoder_that_takes_its_process_down_costs_one_file(videos, tmp_path, monkeypatch):
    """What a pool does when a worker dies, with the pool's own error and no real process."""

    def pooled(jobs, config, backend, workers):
        for key, path in jobs:
            if Path(path).name == "2.mp4":
                raise folder_module.BrokenProcessPool("died")
            yield folder_module._one(key, path, config, backend)

    monkeypatch.setattr(folder_module, "_pooled", pooled)
    result = curate_folder(videos, CONFIG, tmp_path, workers=2)
    assert [Path(c.video).name for c in result.clips] == [f"{i}.mp4" for i in (0, 1, 3, 4, 5)]
    assert {"video": str(videos[2]), "reason": "the process that read it died"} in result.quarantined


def test_a_folder_that_cannot_be_written_is_named(videos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="journal.jsonl: cannot be written"):
        curate_folder(videos, CONFIG, tmp_path / "file")


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
