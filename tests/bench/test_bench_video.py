"""``python -m bench video`` on very small clips: every side that exists makes the same input, and one that does not is
found out."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from bench import video
from bench.head import NO_TIME
from bench.measure import Deadline
from bench.videos import peers
from bench.videos.clips import CLIPS, Clip, pictures
from bench.videos.sides import GEOMETRY, Absent, Case, Judge, Read, Sections, Side
from tempo_fast.video.probe import probe
from tempo_fast.video.reader import VideoReader

SMALL = {"seconds": 2.0, "width": 64, "height": 64, "gop": 20, "bitrate": 100_000}
FRAMES = 6
HERE = ["pyav", "pyav_cold", "decode_only"]
"""Sides that need nothing but the project's own dependencies."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


def make_case(folder: Path, codec: str = "h264", **changes: Any) -> Case:
    clip = Clip(codec, **{**SMALL, **changes})  # type: ignore[arg-type]
    return Case(clip, clip.make(folder), FRAMES)


@pytest.fixture(scope="module")
def case(folder: Path) -> Case:
    return make_case(folder)


# -- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_what_it_says(name: str, folder: Path) -> None:
    clip = dataclasses.replace(CLIPS[name], seconds=9.0, width=96, height=64, bitrate=150_000)
    path = clip.make(folder)
    info = probe(path)
    assert (info.n_frames, info.width, info.height, info.fps) == (270, 96, 64, 30)
    assert info.codec.removeprefix("lib").startswith(clip.codec)
    assert list(info.keyframes) == list(clip.keyframes) and len(info.keyframes) > 1
    stamp = path.stat().st_mtime_ns
    assert clip.make(folder) == path and path.stat().st_mtime_ns == stamp  # made once


def test_an_interrupted_clip_leaves_nothing_that_passes_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = Clip("h264", **SMALL)  # type: ignore[arg-type]

    def broken(clip: Clip) -> Any:
        yield from list(pictures(dataclasses.replace(clip, seconds=0.5)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bench.videos.clips.pictures", broken)
        clip.make(tmp_path)
    assert probe(clip.make(tmp_path)).n_frames == 60


def test_pictures_move_stay_in_range_and_repeat(folder: Path) -> None:
    clip = Clip("h264", **SMALL)  # type: ignore[arg-type]
    first, again = list(pictures(clip)), list(pictures(clip))
    assert len(first) == 60 and all((a == b).all() for a, b in zip(first, again, strict=True))
    luma = np.stack([picture[:64] for picture in first]).astype(int)
    assert 16 <= luma.min() and luma.max() <= 235  # no sum has wrapped around
    assert np.abs(np.diff(luma, axis=0)).mean((1, 2)).min() > 0.3  # grey levels from each frame to the next


def test_frames_to_decode_are_counted_from_their_keyframes() -> None:
    clip = Clip("h264", gop=10, seconds=2)
    assert clip.must_decode([0]) == 1
    assert clip.must_decode([9, 3]) == 10  # one run, no frame twice
    assert clip.must_decode([12, 19, 35]) == 10 + 6
    assert clip.must_decode(list(range(60))) == 60


# -- sides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_our_sides_make_the_readers_pixels(codec: str, folder: Path) -> None:
    case = make_case(folder, codec)
    reader = VideoReader(case.config(), GEOMETRY)
    expected = reader.pixels(reader.plan(case.path))
    rows = video.measure_case(case, [video.SIDES[name] for name in HERE], 2)
    assert [row["impl"] for row in rows] == HERE
    for name in HERE[:2]:
        read = video.SIDES[name].open(case, {})
        found = read()
        assert found is not None and torch.equal(found, expected)
        read.close()
    for row in rows:
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["repetitions"] == 2
        assert row["frames_per_s"] == pytest.approx(FRAMES * row["videos_per_s"])
        assert 0 < sum(row["split"].values()) <= 1.05 * row["ms_max"]
        assert row["must"] == case.clip.must_decode(list(case.plan.indices))
    assert rows[0]["error"] == rows[1]["error"] == {"shift": 0, "max": 0.0, "mean": 0.0}
    assert rows[1]["split"]["probe"] > 0 and "probe" not in rows[0]["split"]
    assert {str(tried["skip"]) for tried in rows[2]["tried"]} == {"True", "False"}
    assert not [p for p in folder.iterdir() if p.is_dir()]  # the cold side's names are gone


def test_a_cold_side_asks_for_a_new_file_every_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    plan = VideoReader.plan

    def spy(self: VideoReader, path: Any, *rest: Any) -> Any:
        seen.append(str(path))
        return plan(self, path, *rest)

    monkeypatch.setattr(VideoReader, "plan", spy)
    read = video.SIDES["pyav_cold"].open(case, {})
    del seen[:]
    read(), read()
    read.close()
    assert len(set(seen)) == 2 and str(case.path) not in seen


@pytest.mark.parametrize("name", video.RIVALS)
def test_a_peer_makes_the_same_input_or_says_why_it_is_not_there(name: str, case: Case) -> None:
    (row,) = video.measure_case(case, [video.SIDES[name]], 1)
    if "skipped" in row:
        package = {"qwen": "qwen_vl_utils", "llama": "llamafactory", "pyav": "torchvision"}.get(
            name.split("_")[0], name.split("_")[0]
        )
        assert importlib.util.find_spec(package) is None or importlib.util.find_spec("torchvision") is None
        assert not row["skipped"].startswith("failed") and video.failed([row]) == []
        pytest.skip(row["skipped"])
    else:
        assert "wrong" not in row["error"], row["error"]
        assert row["error"]["mean"] < 12 and row["route"]


class Fake(Side):
    """Ours, made to give ``frames`` of the file and to say ``said``."""

    name = "fake"

    def __init__(self, frames: list[int], said: list[int] | None = None, cut: int = 0) -> None:
        self.frames, self.said, self.cut = frames, said or frames, cut

    def open(self, case: Case, settings: dict[str, Any]) -> Read:
        fake, reader = self, VideoReader(case.config(), GEOMETRY)
        plan = reader.plan(case.path, self.frames)

        class FakeRead(Read):
            indices = fake.said

            def __call__(self) -> torch.Tensor:
                return reader.pixels(plan)[fake.cut :]

        return FakeRead(case, settings)


def test_a_side_with_other_frames_or_another_shape_is_found_out(case: Case) -> None:
    right = list(case.plan.indices)
    late = [min(i + 1, 59) for i in right]
    one_off = [*right[:2], right[2] + 1, *right[3:]]
    wrong = {
        "other frames, and it says so": Fake(late),
        "other frames under the right numbers": Fake(late, said=right),
        "one frame of six": Fake(one_off, said=right),
        "too few frames": Fake(right[:4]),
        "rows missing": Fake(right, cut=3),
    }
    for what, side in wrong.items():
        (row,) = video.measure_case(case, [side], 1)
        assert "wrong" in row["error"], what
        assert video.failed([row]) == [row] and f"WRONG {case.name} fake" in video.report([row])
    (row,) = video.measure_case(case, [Fake(right)], 1)
    assert row["error"] == {"shift": 0, "max": 0.0, "mean": 0.0} and not video.failed([row])


def test_another_rule_is_held_at_its_own_frames(case: Case) -> None:
    late = [min(i + 1, 59) for i in case.plan.indices]
    side = Fake(late)
    side.rule = "one later"
    (row,) = video.measure_case(case, [side], 1)
    assert row["error"] == {"shift": 1, "max": 0.0, "mean": 0.0}


def test_differences_are_in_grey_levels(case: Case) -> None:
    """A frame one level brighter in red differs by one level there, a third of one on average."""
    reader = VideoReader(case.config(), GEOMETRY)
    found = reader.pixels(case.plan).view(-1, 3, GEOMETRY.temporal * GEOMETRY.patch**2).clone()
    found[:, 0] += 1 / (255 * GEOMETRY.std[0])
    error = Judge(case).of(found.flatten(1), case.plan.indices, Side.rule)
    assert error["max"] == pytest.approx(1, abs=1e-3) and error["mean"] == pytest.approx(1 / 3, abs=1e-4)


def test_the_fastest_settings_are_measured(case: Case) -> None:
    class Slow(Fake):
        def choices(self, case: Case) -> list[dict[str, Any]]:
            return [{"wait": 0.2}, {"wait": 0.0}, {"wait": 0.1}]

        def open(self, case: Case, settings: dict[str, Any]) -> Read:
            read = super().open(case, settings)
            call = type(read).__call__

            def waiting(self: Read) -> Any:
                import time

                time.sleep(settings["wait"])
                return call(self)

            type(read).__call__ = waiting  # type: ignore[method-assign]
            return read

    (row,) = video.measure_case(case, [Slow(list(case.plan.indices))], 1)
    assert row["settings"] == {"wait": 0.0} and [tried["wait"] for tried in row["tried"]] == [0.2, 0.0, 0.1]


def test_a_side_that_breaks_or_is_late_harms_no_other(case: Case) -> None:
    class Broken(Side):
        name = "broken"

        def open(self, case: Case, settings: dict[str, Any]) -> Read:
            raise ValueError("no such thing\nat all")

    class Away(Broken):
        name = "away"

        def choices(self, case: Case) -> list[dict[str, Any]]:
            raise Absent("it is not installed")

    rows = video.measure_case(case, [Broken(), Away(), video.SIDES["pyav"]], 1)
    assert rows[0]["skipped"] == "failed: ValueError: no such thing" and rows[1]["skipped"] == "it is not installed"
    assert rows[2]["ms"] > 0 and video.failed(rows) == []
    assert video.failed([{**rows[0], "ours": True}])
    text = video.report([*rows, {"case": "other", "impl": "away", "ours": False, "skipped": "it is not installed"}])
    assert f"skipped broken: failed: ValueError: no such thing ({case.name})" in text
    assert "skipped away: it is not installed\n" in text + "\n"
    late = video.measure_case(case, [video.SIDES["pyav"]], 1, deadline=Deadline(-1))
    assert late[0]["skipped"] == NO_TIME


def test_sections_count_no_time_twice() -> None:
    import time

    sections = Sections("cpu")
    inner = sections.timed("inner", lambda: time.sleep(0.05))
    outer = sections.timed("outer", lambda: (inner(), inner(), time.sleep(0.02)))
    outer()
    assert 100 <= sections.ms["inner"] < 190 and 20 <= sections.ms["outer"] < 90


# -- the loader -------------------------------------------------------------------------------------------------------


def test_a_loader_waits_less_with_workers(case: Case) -> None:
    rows = video.measure_loader(case, "pyav", 60.0, 4, (0, 2))
    assert [row["workers"] for row in rows] == [0, 2]
    assert 0 < rows[1]["wait_frac"] < rows[0]["wait_frac"] < 1
    assert "wait_frac" in video.report(rows)


# -- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "video", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(video.__file__).parents[1], timeout=240)


def test_the_command_writes_rows_and_names_what_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "video.json"
    done = run(
        "--seconds", "2", "--size", "64", "64", "--clip", "vp9_gop250", "--frames", "4", "--repetitions", "1",
        "--impls", *HERE, "dali-gpu", "--loader", "--step-ms", "5", "--videos", "2", "--threads", "1",
        "--clips", str(tmp_path / "clips"), "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["env"]["threads"] == 1 and found["env"]["packages"]["av"] == av.__version__
    assert found["clips"][0]["clip"] == "vp9_gop250" and found["clips"][0]["mbit_per_s"] > 0
    rows = {row["impl"]: row for row in found["rows"] if "workers" not in row}
    assert set(rows) == {*HERE, "dali-gpu"} and rows["pyav"]["case"] == "vp9_gop250/4"
    if not torch.cuda.is_available():
        assert "dali-gpu" in rows["dali-gpu"]["skipped"] and "skipped dali-gpu: " in done.stdout
    for name in HERE:
        assert {"ms", "cpu_s", "settings", "split", "must", "floor", "route"} <= set(rows[name])
    assert [row["workers"] for row in found["rows"] if "workers" in row] == [0, 1, 2]
    assert len(list((tmp_path / "clips").iterdir())) == 1  # the clip, kept for the next time


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--impls", "none"], "--impls"),
        (["--clip", "av1"], "--clip"),
        (["--frames", "3"], "--frames"),
        (["--frames", "64", "--seconds", "2"], "--frames"),
        (["--size", "63", "64"], "--size"),
        (["--repetitions", "0"], "--repetitions"),
        (["--tries", "0"], "--tries"),
        (["--threads", "4096"], "--threads"),
        (["--videos", "1"], "--videos"),
    ],
)
def test_wrong_arguments(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        video.main(arguments)
    assert end.value.code == 2 and word in capsys.readouterr().err


def test_the_bench_lists_it() -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "bench", "-h"], capture_output=True, text=True, cwd=Path(video.__file__).parents[1]
    )
    assert "  video  " in listing.stdout


def test_torchvision_for_another_torch_is_made_importable_or_named_as_missing() -> None:
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(Absent, match="torchvision is not installed"):
            peers.load_torchvision()
    else:
        assert peers.load_torchvision().__version__
