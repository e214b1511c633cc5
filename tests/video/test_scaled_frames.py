"""Frames that FFmpeg scales as they become RGB: the same pictures, smaller, however the file turns them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import VideoReformatter
from counter_clips import TURNS, read_counter, turned, upright, write_counter

from tempo_fast.video.container import DecodeError
from tempo_fast.video.decode_pyav import PyAVDecoder, Scale, to_rgb
from tempo_fast.video.preprocess import resize
from tempo_fast.video.probe import probe


def scaled(path: Path, wanted: list[int], scale: Scale | None) -> torch.Tensor:
    found = list(PyAVDecoder().iterate(probe(path), wanted, scale=scale))
    assert [i for i, _ in found] == wanted
    return torch.from_numpy(np.stack([np.ascontiguousarray(frame) for _, frame in found]))


@pytest.mark.parametrize("name", TURNS)
@pytest.mark.parametrize("by", ["area", "bicubic"])
def test_scaled_frames_stand_upright(tmp_path: Path, name: str, by: str) -> None:
    path = write_counter(tmp_path / "clip.mp4", 40, size=(128, 384), **turned(name))
    wanted = [0, 3, 7, 21, 22, 39]
    small = scaled(path, wanted, Scale(64, 192, by))  # type: ignore[arg-type]
    assert small.shape == (6, 64, 192, 3) and read_counter(small) == wanted and upright(small)
    full = scaled(path, wanted, None)
    assert torch.equal(full, PyAVDecoder().decode(path, wanted))
    assert (small.float() - resize(full, 64, 192).float()).abs().mean() < 4


def test_area_never_goes_beyond_the_picture(plain: Path) -> None:
    wanted = list(range(60))
    full, small = scaled(plain, wanted, None), scaled(plain, wanted, Scale(27, 48, "area"))
    assert small.shape == (60, 27, 48, 3)
    luma = [(x.float() @ torch.tensor([0.299, 0.587, 0.114])).flatten(1) for x in (full, small)]
    assert (luma[1].amax(1) <= luma[0].amax(1) + 2).all() and (luma[1].amin(1) >= luma[0].amin(1) - 2).all()


@pytest.mark.parametrize("scale", [None, Scale(27, 48)])
def test_a_picture_that_changes_its_size_or_turns_is_refused(plain: Path, scale: Scale | None) -> None:
    info, reformatter = probe(plain), VideoReformatter()
    image = np.zeros((info.height, info.width, 3), np.uint8)
    same = av.VideoFrame.from_ndarray(image, format="rgb24")
    assert to_rgb(info, same, reformatter, scale).shape == ((27, 48, 3) if scale else image.shape)
    other = av.VideoFrame.from_ndarray(image[:-2], format="rgb24")
    with pytest.raises(DecodeError, match="the picture changes from 192x64 to 192x62"):
        to_rgb(info, other, reformatter, scale)
    turned_info = dataclasses.replace(info, display=dataclasses.replace(info.display, told=90))
    with pytest.raises(DecodeError, match="the picture turns from 90 to 0 degrees"):
        to_rgb(turned_info, same, reformatter, scale)
