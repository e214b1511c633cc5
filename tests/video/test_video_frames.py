"""Frames up to the first sign of damage, and errors that say nothing of a file."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import av
import pytest
from counter_clips import write_counter

from tempo_fast.video.container import DecodeError, open_video
from tempo_fast.video.frames import intact_frames, not_of_the_file


def told(*causes: BaseException) -> BaseException:
    """The first of these, each raised from the next."""
    for error, cause in zip(causes, causes[1:], strict=False):
        error.__cause__ = cause
    return causes[0]


def of_ffmpeg(number: int) -> Exception:
    with pytest.raises(av.error.FFmpegError) as raised:
        av.error.err_check(-number)
    return raised.value


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (told(DecodeError("x"), OSError(errno.EIO, "")), "io"),
        (told(DecodeError("x"), DecodeError("y"), PermissionError(errno.EPERM, "")), "io"),
        (told(DecodeError("x"), of_ffmpeg(errno.EIO)), "io"),
        (told(DecodeError("x"), of_ffmpeg(errno.EACCES)), "io"),
        (told(DecodeError("x"), of_ffmpeg(errno.ENOMEM)), "memory"),
        (told(DecodeError("x"), MemoryError()), "memory"),
        (MemoryError(), "memory"),
        (OSError(errno.ESTALE, ""), "io"),
        (DecodeError("x"), ""),
        (told(DecodeError("x"), of_ffmpeg(errno.EPERM)), ""),  # what a damaged HEVC header gives
        (told(DecodeError("x"), of_ffmpeg(errno.EINVAL)), ""),
        (told(DecodeError("x"), ValueError("y")), ""),
    ],
)
def test_whose_fault_an_error_is(error, failure):
    assert not_of_the_file(error) == failure


def frame(width: int = 8, height: int = 4, rotation: int = 0, is_corrupt: bool = False) -> Any:
    return SimpleNamespace(width=width, height=height, rotation=rotation, is_corrupt=is_corrupt)


def stream_of(*packets: Any) -> Any:
    """A container that gives these packets: lists of frames, or "" for a damaged one."""
    made = [SimpleNamespace(size=len(p), is_corrupt=p == "", decode=lambda p=p: p) for p in packets]
    return SimpleNamespace(demux=lambda stream: iter(made))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ([frame(width=10)], "the picture changes from 8x4 to 10x4"),
        ([frame(height=6)], "the picture changes from 8x4 to 8x6"),
        ([frame(rotation=90)], "the picture turns from 0 to 90 degrees"),
        ([frame(is_corrupt=True)], "a frame cannot be decoded"),
        ("", "a packet is incomplete"),
    ],
)
def test_frames_end_where_no_decoder_goes_on(odd, said):
    frames = intact_frames("f.mp4", stream_of([frame()], [frame(), frame()], odd, [frame()]), None)
    assert [next(frames).width for _ in range(3)] == [8, 8, 8]
    with pytest.raises(DecodeError, match=f"f.mp4: {said}"):
        next(frames)


@pytest.mark.parametrize("bframes", [0, 2])
def test_every_frame_in_order(bframes, tmp_path):
    path = write_counter(tmp_path / "a.mp4", 40, bframes=bframes)
    counts = []
    for cut in (False, True):
        with open_video(path) as (container, stream):
            times = [f.pts for f in intact_frames(str(path), container, stream, cut=cut)]
        assert times == sorted(times)
        counts.append(len(times))
    assert counts[0] == 40 and 40 - 2 * bframes - 1 <= counts[1] <= 40, "some wait for the end"
