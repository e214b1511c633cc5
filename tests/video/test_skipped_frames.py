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


def test_frames_are_really_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_counter(tmp_path / "h264.mp4", 80, codec="libx264", bframes=3, gop=80)
    info, seen = probe(path), []
    advance = PyAVDecoder._advance

    def counting(info: Any, frames: Any, index: int) -> Any:
        return advance(info, (seen.append(frame.pts) or frame for frame in frames), index)  # type: ignore[func-returns-value]

    monkeypatch.setattr(PyAVDecoder, "_advance", staticmethod(counting))
    PyAVDecoder().decode(path, [79])
    assert info.indexed and len(seen) < 60
