"""A repaired copy shows the same frames at the same times as its original does, and the original stays as it is."""

from __future__ import annotations

import errno
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
from counter_clips import TURNS, hide_first, hide_last, turned

from tempo_fast.errors import InputError
from tempo_fast.files import file_digest
from tempo_fast.video import repair as repair_module
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import DecodeError, probe
from tempo_fast.video.repair import Repair, RepairConfig, longest_gop, repair, why_repair

CONFIG = RepairConfig()
N = 90
UNEVEN = [0, *np.cumsum(np.random.default_rng(5).integers(8, 60, N - 1)).tolist()]


def shown(counter, path) -> list[int]:
    return counter.read(PyAVDecoder().decode(path, range(probe(path).n_frames)))


def why(path: Path) -> str:
    info = probe(path)
    return why_repair(info.has_edit_list, longest_gop(info), CONFIG)


def check(counter, original: Path, copy: Repair, folder: Path) -> None:
    """Same frames, same times, same size, no leftovers, a name of its own."""
    before, after = probe(original), probe(copy.path)
    assert Path(copy.path).parent == folder and [str(p) for p in folder.iterdir()] == [copy.path]
    assert Path(copy.path).name.startswith(original.stem + "-")
    assert shown(counter, copy.path) == shown(counter, original)
    assert np.allclose(before.pts_s, after.pts_s, rtol=0, atol=1e-6)
    assert after.fps == pytest.approx(before.fps, rel=1e-6)
    assert (before.height, before.width, before.vfr) == (after.height, after.width, after.vfr)
    assert not after.has_edit_list and not after.has_audio and after.indexed
    assert (before.color_space, before.color_range) == (after.color_space, after.color_range)
    assert not why(Path(copy.path))


@pytest.mark.parametrize("hidden", [1, 7, 17, -6, -14])
@pytest.mark.parametrize("bframes", [0, 2])
def test_an_edit_list_is_undone(hidden, bframes, tmp_path, counter):
    path = counter.write(tmp_path / "e.mp4", N, bframes=bframes, audio=True)
    hide_first(path, hidden) if hidden > 0 else hide_last(path, -hidden / 30)
    digest = file_digest(path)
    assert why(path) == "its edit list hides frames"
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, why(path), CONFIG)
    # whole groups of pictures can be left out at the end; at the start and in the middle other frames may need them
    kinds = {-6: ["remux"], -14: ["remux", "reencode"]}.get(hidden, ["reencode"])
    assert copy.kind in kinds, copy.reason
    assert copy.reason == "its edit list hides frames"
    check(counter, path, copy, folder)
    assert shown(counter, copy.path) == list(range(max(0, hidden), N + min(0, hidden)))
    assert file_digest(path) == digest


# name -> write_counter's arguments; all have one keyframe, or two
LONG = {
    "plain": {"gop": 400},
    "bframes": {"gop": 400, "bframes": 3},
    "vfr": {"gop": 400, "pts": UNEVEN, "bframes": 2},
    "odd_444": {"gop": 400, "size": (66, 194), "pix_fmt": "yuv444p"},
    "odd_420": {"gop": 400, "codec": "libvpx-vp9", "size": (65, 193)},
    "422": {"gop": 400, "pix_fmt": "yuv422p"},
    "ten_bits": {"gop": 400, "pix_fmt": "yuv420p10le"},
    "full_range": {"gop": 400, "pix_fmt": "yuvj420p"},
    "bt709": {"gop": 400, "options": {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"}},
    "late": {"gop": 400, "pts": [900 + 20 * i for i in range(N)]},
}


@pytest.mark.parametrize("name", LONG)
def test_far_keyframes_are_brought_closer(name, tmp_path, counter):
    config = RepairConfig(gop=20, max_gop=60)
    path = counter.write(tmp_path / ("l.mkv" if name == "odd_420" else "l.mp4"), N, **LONG[name])
    assert longest_gop(probe(path)) == N
    folder = tmp_path / "fixed"
    folder.mkdir()
    reason = why_repair(False, N, config)
    assert reason == "up to 90 frames lie between keyframes (more than 60)"
    copy = repair(path, folder, reason, config)
    assert copy.kind == "reencode", copy.reason
    check(counter, path, copy, folder)
    assert longest_gop(probe(copy.path)) <= 20
    ours, theirs = (PyAVDecoder().decode(p, range(0, N, 9)).float() for p in (copy.path, path))
    assert (ours - theirs).abs().mean() < 3  # levels of 255; a wrong matrix or range is off by far more


@pytest.mark.parametrize("name", [name for name in TURNS if name != "upright"])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p"])
def test_rotation_is_baked_in(name, pix_fmt, tmp_path, counter):
    path = counter.write(tmp_path / "r.mp4", 40, gop=400, pix_fmt=pix_fmt, **turned(name))
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, "far keyframes", CONFIG)
    assert copy.kind == "reencode", copy.reason
    check(counter, path, copy, folder)
    assert (probe(copy.path).rotation, probe(copy.path).mirrored) == (0, False)


def test_a_remux_keeps_the_rotation_tag(tmp_path, counter):
    path = counter.write(tmp_path / "r.mp4", 60, **turned("clockwise"))
    hide_last(path, 0.5)
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, why(path), CONFIG)
    assert copy.kind == "remux" and probe(copy.path).rotation == 90
    check(counter, path, copy, folder)


def cut(path: Path, out: Path, part: float) -> tuple[Path, int]:
    """A file whose index comes first, up to this part of its packets, and how many of them are whole."""
    import av

    first = out.with_name(f"whole-{out.name}")
    with av.open(str(path)) as source, av.open(str(first), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(first)) as source:
        ends = [p.pos + p.size for p in source.demux(video=0) if p.size]
    n = round(len(ends) * part)
    out.write_bytes(first.read_bytes()[: ends[n] - 1])
    first.unlink()
    return out, n


@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("part", [0.4, 0.77, 0.95])
def test_what_comes_before_a_cut_is_kept(part, bframes, tmp_path, counter):
    path, whole = cut(counter.write(tmp_path / "w.mp4", N, bframes=bframes), tmp_path / "c.mp4", part)
    with pytest.raises(DecodeError):
        probe(path)
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, "", CONFIG)
    assert copy.kind == "remux" or (bframes and copy.kind == "reencode"), copy.reason
    frames = shown(counter, copy.path)
    assert frames == list(range(len(frames)))
    assert whole - bframes <= len(frames) <= whole, "all but those that wait for a later one"
    assert probe(copy.path).duration_s == pytest.approx(len(frames) / 30, abs=1e-3)
    assert copy.reason == (
        f"is damaged after frame {len(frames) - 1}; the {len(frames) / 30:.2f} s before it are kept"
    )


@pytest.mark.parametrize("suffix", ["webm", "avi"])
def test_other_containers_cut_off(suffix, tmp_path, counter):
    arguments = {
        "webm": {"codec": "libvpx-vp9"},
        "avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    }[suffix]
    whole = counter.write(tmp_path / f"w.{suffix}", N, **arguments).read_bytes()
    path = tmp_path / f"c.{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, "", CONFIG)
    assert copy.kind == "remux", copy.reason
    frames = shown(counter, copy.path)
    assert frames == list(range(len(frames))) and len(frames) >= 45


def test_damage_in_the_middle_ends_the_copy_there(tmp_path, counter):
    path = counter.write(tmp_path / "d.mp4", N, bframes=2)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    at = start + int.from_bytes(data[start - 4 : start], "big") * 2 // 3
    data[at : at + 300] = np.random.default_rng(1).bytes(300)
    path.write_bytes(data)
    with pytest.raises(DecodeError):
        shown(counter, path)
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, "", CONFIG)
    assert copy.kind != "none", copy.reason
    frames = shown(counter, copy.path)
    assert frames == list(range(len(frames))) and 30 <= len(frames) < N


def test_a_disk_that_stops_answering_is_no_damage(tmp_path, counter, monkeypatch):
    """Neither is what was read so far a copy, nor may the verdict be kept."""
    path, _ = cut(counter.write(tmp_path / "w.mp4", N), tmp_path / "c.mp4", 0.9)
    folder = tmp_path / "fixed"
    folder.mkdir()
    real = repair_module.intact_frames
    for stops in (1, 40):

        def failing(*args, stops=stops, **kwargs):
            yield from itertools.islice(real(*args, **kwargs), stops)
            raise DecodeError(f"{path}: cannot be decoded (Input/output error)") from OSError(errno.EIO, "")

        monkeypatch.setattr(repair_module, "intact_frames", failing)
        copy = repair(path, folder, "", CONFIG)
        assert (copy.kind, copy.failure, list(folder.iterdir())) == ("none", "io", [])
    monkeypatch.undo()
    assert repair(path, folder, "", CONFIG).failure == ""


def test_less_than_a_second_is_not_worth_it(tmp_path, counter):
    path, whole = cut(counter.write(tmp_path / "w.mp4", N), tmp_path / "c.mp4", 0.25)
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, "", CONFIG)
    assert copy.kind == "none" and copy.path == "" and not list(folder.iterdir())
    assert copy.reason == f"is damaged after frame {whole - 1}; only {whole / 30:.2f} s are left, less than 1 s"


@pytest.mark.parametrize("data", [b"", b"only words\n" * 40, b"\0\0\0\x18ftypisom" + b"\0" * 400])
def test_what_is_no_video_gets_no_copy(data, tmp_path):
    (tmp_path / "n.mp4").write_bytes(data)
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(tmp_path / "n.mp4", folder, "", CONFIG)
    assert copy.kind == "none" and copy.reason.startswith("is damaged; ") and not list(folder.iterdir())


def test_a_name_that_belongs_to_another_container(tmp_path, counter):
    """H.264 in MP4 called WebM cannot be copied into one, nor its times be kept in Matroska's milliseconds."""
    path = hide_last(counter.write(tmp_path / "w.mp4", 60), 0.5).rename(tmp_path / "w.webm")
    folder = tmp_path / "fixed"
    folder.mkdir()
    copy = repair(path, folder, why(path), CONFIG)
    assert copy == Repair("none", "its edit list hides frames; no copy shows the same frames")
    assert not list(folder.iterdir())


def test_the_same_file_and_settings_give_the_same_name(tmp_path, counter):
    path = counter.write(tmp_path / "l.mp4", 40, gop=400)
    folder = tmp_path / "fixed"
    folder.mkdir()
    first = repair(path, folder, "far keyframes", CONFIG)
    digest = file_digest(first.path)
    assert repair(path, folder, "far keyframes", CONFIG) == first and file_digest(first.path) == digest
    other = repair(path, folder, "far keyframes", RepairConfig(gop=10))
    assert other.path != first.path and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("kind", ["remux", "reencode"])
def test_a_full_disk_is_said_and_leaves_nothing(kind, tmp_path, counter):
    rng = np.random.default_rng(2)
    path = counter.write(tmp_path / "l.mp4", N, turn=lambda f: rng.integers(0, 256, f.shape, np.uint8))
    assert path.stat().st_size > 300_000
    hide_last(path, 0.5) if kind == "remux" else hide_first(path, 13)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        with pytest.raises(InputError, match=f"{disk}.*cannot be written .No space left") as caught:
            repair(path, disk, why(path), CONFIG)
        assert not isinstance(caught.value, DecodeError) and caught.value.__cause__.errno == errno.ENOSPC  # type: ignore[union-attr]
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
