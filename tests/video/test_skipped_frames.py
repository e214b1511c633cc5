"""Frames that nothing refers to are left out on the way to a wanted one: every pixel as if all were decoded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from counter_clips import write_counter

from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import probe

# x264's B-pictures refer to each other (b-pyramid) when there are three; 720x960 is large enough for frame threads
CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {"codec": "libx264", "bframes": 3, "gop": 40},
    "h264_weighted.mp4": {
        "codec": "libx264", "bframes": 5, "gop": 40,
        "options": {"x264-params": "b-pyramid=normal:weightp=2:ref=4:open-gop=1"},
    },
    "h264_threads.mp4": {"codec": "libx264", "bframes": 3, "gop": 40, "size": (720, 960)},
    "hevc.mp4": {"codec": "libx265", "bframes": 3, "gop": 40},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": 40, "options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 40},
    "av1.mp4": {"codec": "libsvtav1", "gop": 40},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
}  # fmt: skip


def every_frame(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("name", CLIPS)
def test_wanted_frames_are_those_of_a_whole_decode(tmp_path: Path, name: str) -> None:
    path = write_counter(tmp_path / name, 80, **CLIPS[name])
    whole = every_frame(path)
    rng, decoder = random.Random(name), PyAVDecoder()
    assert len(whole) == probe(path).n_frames == 80
    for count in (1, 2, 5, 16, 80):
        wanted = sorted(rng.sample(range(80), count))
        for index, image in zip(wanted, decoder.decode(path, wanted), strict=True):
            assert torch.equal(image, torch.from_numpy(whole[index])), (name, wanted, index)


def temporal_layers(path: Path, *, told: bool) -> Path:
    """HEVC in three temporal layers, where a picture of the middle one that no other of its layer refers to says so
    (TSA_N for TSA_R: legal, and the pictures of the highest layer refer to it). The container tells the layers or not.
    """
    params = "log-level=none:bframes=7:keyint=40:min-keyint=40:temporal-layers=3:b-pyramid=1"
    write_counter(path, 80, codec="libx265", bframes=7, gop=40, options={"x265-params": params})
    data, renamed = bytearray(path.read_bytes()), 0
    with av.open(str(path)) as file:
        record = file.streams.video[0].codec_context.extradata
        for packet in file.demux(video=0):
            coded, at = bytes(packet), 0
            while at < len(coded):  # NAL units, each behind its length
                if coded[at + 4] >> 1 == 3:
                    data[packet.pos + at + 4] = 2 << 1
                    renamed += 1
                at += 4 + int.from_bytes(coded[at : at + 4], "big")
    assert renamed > 5 and record[21] >> 3 & 7 == 3
    if not told:
        data[data.index(record) + 21] ^= (3 ^ 1) << 3
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("told", [True, False])
def test_pictures_that_only_higher_temporal_layers_refer_to(tmp_path: Path, told: bool) -> None:
    path = temporal_layers(tmp_path / "layers.mp4", told=told)
    whole, decoder = every_frame(path), PyAVDecoder()
    assert len(whole) == probe(path).n_frames == 80
    for index in range(80):
        assert torch.equal(decoder.decode(path, [index])[0], torch.from_numpy(whole[index])), index
    wanted = [3, 17, 18, 30, 31, 45, 79]
    for index, image in zip(wanted, decoder.decode(path, wanted), strict=True):
        assert torch.equal(image, torch.from_numpy(whole[index])), index


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_are_really_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    path = write_counter(tmp_path / "clip.mp4", 80, codec=codec, bframes=3, gop=80)
    info, seen = probe(path), []
    advance = PyAVDecoder._advance

    def counting(info: Any, frames: Any, index: int) -> Any:
        return advance(info, (seen.append(frame.pts) or frame for frame in frames), index)  # type: ignore[func-returns-value]

    monkeypatch.setattr(PyAVDecoder, "_advance", staticmethod(counting))
    PyAVDecoder().decode(path, [79])
    assert info.indexed and len(seen) < 60
