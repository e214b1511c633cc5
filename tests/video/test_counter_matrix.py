"""Codecs by stream shapes by decoders: the frames asked for, upright, or an error; never a wrong frame."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counter_clips import hide_first, read_counter, turned, upright, write_counter

from tempo_fast.config import VideoConfig
from tempo_fast.video.decode import BACKENDS, DecodeError, available_backends, open_decoder
from tempo_fast.video.probe import probe
from tempo_fast.video.reader import VideoReader

N, HIDDEN = 40, 7
UNEVEN = [0, *np.cumsum(np.random.default_rng(5).integers(6, 60, N - 1)).tolist()]
CODECS: dict[str, dict[str, Any]] = {
    "h264": {"codec": "libx264"},
    "hevc": {"codec": "libx265"},
    "vp8": {"codec": "libvpx"},
    "vp9": {"codec": "libvpx-vp9"},
    "av1": {"codec": "libsvtav1"},
    "mpeg4": {"codec": "mpeg4"},
    "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "cfr": {},
    "vfr": {"pts": UNEVEN},
    "one_gop": {"gop": 250},
    "edit_list": {},
    "late_start": {"pts": [900 + 20 * i for i in range(N)]},
    "clockwise": turned("clockwise"),
    "half": turned("half"),
    "counterclockwise": turned("counterclockwise"),
    "mirrored": turned("mirrored"),
    "odd": {"size": (65, 195)},
    "portrait": {"size": (240, 132)},
    "audio": {"audio": True},
    "bframes": {"bframes": 3},
}
CLIPS = [
    (codec, shape)
    for codec in CODECS
    for shape in SHAPES
    # VP8 only goes into Matroska, which hides no packets; Motion JPEG has no groups, and these no B-frames
    if (codec, shape) not in {("vp8", "edit_list"), ("mjpeg", "one_gop")}
    and not (shape == "bframes" and codec in ("vp8", "vp9", "mjpeg"))
]


def write(folder: Path, codec: str, shape: str) -> Path:
    arguments = CODECS[codec] | SHAPES[shape]
    if shape == "odd" and codec in ("h264", "hevc"):
        arguments["pix_fmt"] = "yuv444p"  # half a chroma sample is no size in these
    if shape == "bframes" and codec == "mpeg4":
        arguments["options"] = {"bf": "2"}
    path = folder / f"{codec}_{shape}.{'webm' if codec == 'vp8' else 'mp4'}"
    write_counter(path, N, **arguments)
    return hide_first(path, HIDDEN) if shape == "edit_list" else path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module", params=CLIPS, ids=lambda p: f"{p[0]}-{p[1]}")
def clip(request, folder) -> tuple[Path, list[int], str, str]:
    """A file, the numbers its presented frames show, codec and shape."""
    codec, shape = request.param
    return write(folder, codec, shape), list(range(HIDDEN if shape == "edit_list" else 0, N)), codec, shape


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    missing = available_backends()[request.param]
    if missing:
        pytest.skip(f"{request.param}: {missing}")
    return request.param


def drawn(rng: random.Random, n: int) -> list[list[int]]:
    """Lists of frame numbers in any order, with repeats, with both ends."""
    lists = [list(range(n)), [n - 1], [0], [n - 1, 0, 0, n - 1]]
    return lists + [[rng.randrange(n) for _ in range(rng.choice([1, 3, 9]))] for _ in range(4)]


def refused(backend: str, codec: str, shape: str) -> bool:
    """What each backend may refuse; all else it has to decode."""
    if backend == "pyav":
        return False
    if shape == "edit_list" or codec == "mpeg4":
        return True
    if backend == "torchcodec":
        return shape == "mirrored"
    if backend == "dali-cpu":
        return codec not in ("vp8", "vp9", "mjpeg")
    return codec in ("mjpeg", "av1") or shape in ("odd", "bframes")


def test_the_probe_knows_the_frames(clip):
    path, shown, codec, shape = clip
    info = probe(path)
    assert info.codec == codec and info.n_frames == len(shown)
    assert (info.height, info.width) == SHAPES[shape].get("size", (64, 192))
    # where every frame is a keyframe the demuxer starts at the first one shown, and there is nothing to hide
    assert info.has_edit_list == (shape == "edit_list" and codec != "mjpeg")
    assert info.has_audio == (shape == "audio")
    assert info.vfr == (shape == "vfr")
    turn = {"clockwise": 90, "half": 180, "counterclockwise": 270}
    assert (info.rotation, info.mirrored) == (turn.get(shape, 0), shape == "mirrored")
    times = SHAPES[shape].get("pts", [20 * i for i in range(N)])
    assert np.allclose(info.pts_s, np.subtract(times, times[0])[: len(shown)] / 600, atol=1e-3)


def test_the_right_frames_or_an_error(clip, backend):
    path, shown, codec, shape = clip
    decoder, info = open_decoder(backend), probe(path)
    why = decoder.refuses(info)
    assert bool(why) <= refused(backend, codec, shape), why
    lists = drawn(random.Random(str(clip[2:])), len(shown))
    if why:
        with pytest.raises(DecodeError, match=f"{path.name}: .*use video.backend pyav"):
            decoder.decode(path, lists[0])
        return
    for indices, frames in zip(lists, decoder.decode_many([(path, x) for x in lists]), strict=True):
        assert not isinstance(frames, DecodeError), frames
        assert read_counter(frames) == [shown[i] for i in indices] and upright(frames)


def test_a_reader_takes_the_safe_decoder_and_names_it(clip, backend, geometry):
    path, shown, _, _ = clip
    reader = VideoReader(VideoConfig(backend=backend), geometry)
    plan = reader.plan(path, drawn(random.Random(3), len(shown))[-1])
    frames = reader.frames(plan)
    assert read_counter(frames) == [shown[i] for i in plan.indices] and upright(frames)
    used = "pyav" if reader.decoder.refuses(probe(path)) else backend
    assert f"decoder={used};" in plan.rule


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9", "av1"])
def test_an_edit_list_that_starts_at_a_keyframe(tmp_path, codec, backend):
    """FFmpeg leaves whole groups out without marking a packet, so that the probe sees no edit list."""
    path = hide_first(write_counter(tmp_path / f"{codec}.mp4", N, **CODECS[codec], gop=12), 12)
    decoder, info = open_decoder(backend), probe(path)
    assert info.n_frames == N - 12
    if decoder.refuses(info):
        assert backend != "pyav"
        return
    assert read_counter(decoder.decode(path, [0, 1, 5, N - 13])) == [12, 13, 17, N - 1]
