"""No wrong frame, ever: every container and stream shape gives exactly the frames asked for, in that order."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from counter_clips import TURNS, hide_first, turned, upright

from tempo_fast.errors import InputError
from tempo_fast.video import decode as decode_module
from tempo_fast.video.decode import BACKENDS, DecodeError, available_backends, open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import probe

N = 60
UNEVEN = [0, *np.cumsum(np.random.default_rng(3).integers(8, 60, N - 1)).tolist()]
# name -> (file name, write_counter's arguments): stream shapes that break naive index arithmetic
SHAPES = {
    "h264": ("a.mp4", {}),
    "h264_bframes": ("b.mp4", {"bframes": 3}),
    "h264_open_gop": ("c.mp4", {"bframes": 3, "options": {"x264-params": "open-gop=1"}}),
    "h264_one_gop": ("d.mp4", {"gop": 250}),
    "h264_vfr": ("e.mp4", {"pts": UNEVEN, "bframes": 2}),
    "h264_mkv_vfr": ("f.mkv", {"pts": UNEVEN}),
    "h264_ts": ("g.ts", {"bframes": 2}),
    "h264_late_start": ("h.mp4", {"pts": [900 + 20 * i for i in range(N)], "bframes": 2}),
    "h264_audio": ("i.mp4", {"audio": True}),
    "h264_odd_444": ("j.mp4", {"size": (66, 194), "pix_fmt": "yuv444p"}),
    "portrait": ("k.mp4", {"size": (256, 132)}),
    "fragmented": ("l.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "vp9": ("m.webm", {"codec": "libvpx-vp9"}),
    "vp9_vfr": ("n.mkv", {"codec": "libvpx-vp9", "pts": UNEVEN}),
    "vp8": ("o.webm", {"codec": "libvpx"}),
    "mjpeg": ("p.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
    "mpeg4_avi": ("q.avi", {"codec": "mpeg4", "options": {"bf": "2"}}),
}


@pytest.fixture(scope="module")
def shape(request, tmp_path_factory, counter) -> Path:
    file_name, arguments = SHAPES[request.param]
    return counter.write(tmp_path_factory.mktemp(request.param) / file_name, N, **arguments)


@pytest.mark.parametrize("shape", SHAPES, indirect=True)
def test_every_stream_shape_gives_the_frames_asked_for(shape, counter):
    info = probe(shape)
    assert info.n_frames == N
    decoder = PyAVDecoder()
    assert counter.read(decoder.decode(shape, range(N))) == list(range(N))
    rng = random.Random(7)
    for _ in range(6):
        indices = [rng.randrange(N) for _ in range(rng.choice([1, 2, 7]))]
        frames = decoder.decode(shape, indices)
        assert frames.dtype == torch.uint8 and frames.shape == (len(indices), info.height, info.width, 3)
        assert counter.read(frames) == indices


def test_a_frame_is_the_same_however_it_is_reached(plain):
    decoder = PyAVDecoder()
    everything = decoder.decode(plain, range(N))
    for indices in ([59], [0], [11], [12], [13], [59, 0, 59, 30, 30], list(range(N))[::-1]):
        assert torch.equal(decoder.decode(plain, indices), everything[indices])


def test_repeated_frames_are_decoded_once(plain, monkeypatch):
    seen: list[int] = []
    iterate = PyAVDecoder.iterate

    def spy(self, info, distinct, deadline):
        seen.extend(distinct)
        return iterate(self, info, distinct, deadline)

    monkeypatch.setattr(PyAVDecoder, "iterate", spy)
    PyAVDecoder().decode(plain, [5, 3, 5, 5, 40, 3])
    assert seen == [3, 5, 40]


@pytest.mark.parametrize("name", TURNS)
def test_display_matrix_is_applied(name, tmp_path, counter):
    path = counter.write(tmp_path / "r.mp4", 20, **turned(name))
    info = probe(path)
    assert (info.height, info.width, info.rotation, info.mirrored) == (64, 192, *TURNS[name][2:])
    frames = PyAVDecoder().decode(path, [19, 4, 4, 0])
    assert counter.read(frames) == [19, 4, 4, 0] and upright(frames)


def test_a_matrix_that_is_no_quarter_turn_is_refused(tmp_path, counter):
    s = 46341  # cos 45 degrees in 16.16
    path = counter.write(tmp_path / "r.mp4", 4, matrix=[s, s, 0, -s, s, 0, 0, 0, 1 << 30])
    with pytest.raises(DecodeError, match=r"r\.mp4: its display matrix turns the picture by -?45"):
        probe(path)


@pytest.mark.parametrize("hidden", [1, 7, 12, 17])
def test_frames_hidden_by_an_edit_list_do_not_count(hidden, tmp_path, counter):
    path = hide_first(counter.write(tmp_path / "e.mp4", N, bframes=2), hidden)
    info = probe(path)
    frames = PyAVDecoder().decode(path, range(info.n_frames))
    shown = counter.read(frames)
    assert shown == list(range(hidden, N)), "frames are counted as they are presented"
    assert counter.read(PyAVDecoder().decode(path, [20, 0, 3])) == [20 + hidden, hidden, 3 + hidden]
    for name in ("torchcodec", "dali-cpu"):
        if not available_backends()[name] and info.has_edit_list:
            with pytest.raises(DecodeError):
                open_decoder(name).decode(path, [0])


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_a_stream_copied_cut_shows_what_ffmpeg_shows(tmp_path, counter):
    whole = counter.write(tmp_path / "w.mp4", N, bframes=2, gop=30)
    cut = tmp_path / "cut.mp4"
    quiet = ["ffmpeg", "-loglevel", "error", "-y"]
    subprocess.run([*quiet, "-ss", "0.7", "-i", whole, "-c", "copy", cut], check=True)
    raw = subprocess.run(
        [*quiet, "-i", cut, "-vsync", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    shown = counter.read(torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(-1, 64, 192, 3).copy()))
    info = probe(cut)
    assert info.has_edit_list and not info.indexed
    assert counter.read(PyAVDecoder().decode(cut, range(info.n_frames))) == shown


def test_damaged_h264_is_refused_or_right(tmp_path, counter):
    """Bytes overwritten inside the pictures: no concealed picture may come out under a frame's number."""
    path = counter.write(tmp_path / "d.mp4", N, bframes=2)
    data = path.read_bytes()
    start = data.index(b"mdat")
    size = int.from_bytes(data[start - 4 : start], "big")
    refused = 0
    for seed in range(12):
        rng = random.Random(seed)
        broken = bytearray(data)
        # After the encoder's settings, which lie in front of the first picture.
        at = start + 1500 + rng.randrange(size - 2200)
        for k in range(at, at + 60):
            broken[k] = rng.randrange(256)
        bad = tmp_path / f"d{seed}.mp4"
        bad.write_bytes(broken)
        for index in (3, 25, 59):
            try:
                assert counter.read(PyAVDecoder().decode(bad, [index])) == [index]
            except DecodeError as e:
                assert str(bad) in str(e)
                refused += 1
    assert refused > 0


def test_indices_outside_the_file_are_refused(plain):
    decoder = PyAVDecoder()
    for indices in ([60], [-1], [0, 5, 1000]):
        with pytest.raises(DecodeError, match=r"frame (60|-1|1000) does not exist \(frames 0\.\.59\)"):
            decoder.decode(plain, indices)
    with pytest.raises(DecodeError, match="no frames were asked for"):
        decoder.decode(plain, [])


def test_a_picture_that_changes_size_is_refused(tmp_path, counter):
    small, large = counter.write(tmp_path / "s.ts", 20), counter.write(tmp_path / "l.ts", 20, size=(128, 384))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(DecodeError, match=r"both\.ts"):
        PyAVDecoder().decode(both, range(probe(both).n_frames))


@pytest.mark.parametrize("name", [n for n in BACKENDS if n not in ("pyav", "dali-gpu")])
def test_other_backends_give_the_same_frames(name, tmp_path, counter, plain):
    if available_backends()[name]:
        pytest.skip(f"{name} is not installed")
    vp9 = counter.write(tmp_path / "v.webm", N, codec="libvpx-vp9")
    decoder = open_decoder(name)
    indices = [7, 0, 59, 33, 33, 12]
    for path in [vp9] if name == "dali-cpu" else [vp9, plain]:
        assert counter.read(decoder.decode(path, indices)) == indices
    with pytest.raises(DecodeError):
        decoder.decode(vp9, [60])
    assert counter.read(decoder.decode(vp9, [1])) == [1]  # and it still works after an error
    if name == "dali-cpu":
        with pytest.raises(DecodeError, match="dali-cpu reads VP8, VP9 and MJPEG only"):
            decoder.decode(plain, [0])


def test_a_backend_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(decode_module, "_installed", lambda name: name == "pyav")
    for name in ("torchcodec", "dali-cpu", "dali-gpu"):
        with pytest.raises(InputError, match=rf"video\.backend: {name} was asked for and is not installed"):
            open_decoder(name)
    with pytest.raises(InputError, match="unknown decoder 'decord'"):
        open_decoder("decord")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_dali_gpu_without_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(decode_module, "_installed", lambda name: True)
    with pytest.raises(InputError, match="finds no CUDA device"):
        open_decoder("dali-gpu")
    assert available_backends()["dali-gpu"] == "a CUDA device"


def test_auto_says_once_what_it_took(caplog):
    decode_module._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="tempo_fast.video.decode"):
        assert open_decoder("auto").name == open_decoder("auto", "cpu").name == "pyav"
    assert [r.message for r in caplog.records] == ["video.backend auto: pyav (no CUDA device in use)"]


@pytest.mark.parametrize("shape", ["h264_bframes", "h264_one_gop", "mpeg4_avi"], indirect=True)
def test_decoded_frames_do_not_wait_for_the_garbage_collector(shape):
    """PyAV's side data keeps its frame alive in a cycle: a gigabyte of large pictures before Python looks."""
    import gc

    info, decoder = probe(shape), PyAVDecoder()
    gc.collect()
    gc.disable()
    try:
        gc.set_debug(gc.DEBUG_SAVEALL)
        decoder.decode(shape, range(info.n_frames))
        gc.collect()
        assert not [x for x in gc.garbage if type(x).__name__ == "VideoFrame"]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
