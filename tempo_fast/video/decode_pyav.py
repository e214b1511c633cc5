"""PyAV: every codec FFmpeg reads, exact frames, on the CPU."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor

from tempo_fast.video.container import NO_END, Deadline, DecodeError, open_video
from tempo_fast.video.decoder import Item, one_by_one, pick
from tempo_fast.video.probe import VideoInfo, check_indices, probe

_Frames = Callable[[bool], Iterator[Any]]


class Scale(NamedTuple):
    """Pictures of ``height`` x ``width`` as displayed, scaled by FFmpeg's filter ``by`` as they become RGB: for looking
    at all of a video. Both filters average over what a pixel covers; bicubic, FFmpeg's default, can overshoot."""

    height: int
    width: int
    by: Literal["area", "bicubic"] = "area"


class PyAVDecoder:
    """Seeks to the keyframe before a frame and decodes on to its exact timestamp, leaving out frames on the way that no
    other refers to; counts frames from the start where the probe found that timestamps cannot be trusted (so that an
    edit list's hidden frames are never counted).

    Args:
        timeout_s: seconds that decoding one file may take, looked at between packets and frames; None for no end.
    """

    name = "pyav"
    route = "pyav/swscale"

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s

    def refuses(self, info: VideoInfo) -> str:
        """Nothing that the probe could read."""
        return ""

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """See ``Decoder.decode``."""
        deadline = Deadline(self.timeout_s)
        info = probe(path, deadline)
        wanted = check_indices(info, indices)
        distinct = sorted(set(wanted))
        out = np.empty((len(distinct), info.height, info.width, 3), np.uint8)
        for row, (_, image) in enumerate(self.iterate(info, distinct, deadline)):
            out[row] = image
        return pick(torch.from_numpy(out), distinct, wanted)

    def decode_many(self, items: Sequence[Item]) -> list[Tensor | DecodeError]:
        """See ``Decoder.decode_many``."""
        return one_by_one(self, items)

    def iterate(
        self, info: VideoInfo, distinct: Sequence[int], deadline: Deadline = NO_END, scale: Scale | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, uint8 [H, W, 3]) for ascending distinct indices, one frame in memory at a time; with ``scale``
        of its size.

        Raises:
            DecodeError: a frame cannot be decoded exactly.
            DecodeTimeout: ``deadline`` has passed.
        """
        last = -1
        ticks = {info.ticks[i] for i in distinct} if info.indexed else set()
        reformatter = VideoReformatter()  # one for all frames: setting up a conversion costs as much as one
        with open_video(info.path) as (container, stream):

            def decoded(skipping: bool) -> Iterator[Any]:
                stream.codec_context.skip_frame = "DEFAULT"
                for packet in container.demux(stream):
                    deadline.check(info.path)
                    if skipping and packet.pts is not None:
                        # no other frame refers to what NONREF skips (B-pictures, mostly)
                        stream.codec_context.skip_frame = "DEFAULT" if packet.pts in ticks else "NONREF"
                    for frame in packet.decode():
                        deadline.check(info.path)
                        yield frame

            if info.indexed:
                found = self._seeking(info, distinct, container, stream, decoded)
            else:
                found = self._counting(info, distinct, decoded)
            for index, frame in found:
                last = index
                yield index, to_rgb(info, frame, reformatter, scale)
        if last != distinct[-1]:
            missing = next(i for i in distinct if i > last)
            raise DecodeError(f"{info.path}: frame {missing} cannot be decoded (the stream ends before it)")

    def _counting(self, info: VideoInfo, distinct: Sequence[int], decoded: _Frames) -> Iterator[tuple[int, Any]]:
        wanted = set(distinct)
        for i, frame in enumerate(decoded(False)):
            if i in wanted:
                if frame.is_corrupt:
                    raise DecodeError(f"{info.path}: frame {i} is damaged")
                yield i, frame
            if i >= distinct[-1]:
                return

    def _seeking(
        self, info: VideoInfo, distinct: Sequence[int], container: Any, stream: Any, decoded: _Frames
    ) -> Iterator[tuple[int, Any]]:
        skips = _may_skip(info.codec, stream.codec_context.extradata)
        frames: Iterator[Any] = iter(())
        first = info.seek_ticks[0]
        surest: tuple[int | None, bool] = first, False  # from the first frame, none left out
        at, way = -1, surest  # the last frame number that came out (-1: nothing yet), and how it was reached
        for index in distinct:
            k = max(0, bisect.bisect_right(info.keyframes, index) - 1)
            # None goes on from where decoding stands. MP4 seeks by presentation time, and by decode time would land one
            # keyframe early; others seek by decode time. A seek that lands after the frame shows in the timestamps, as
            # does damage that only frames before the keyframe can mend, or a left-out frame that others need after all.
            if at < 0 or info.keyframes[k] > at + 1:
                ways = [(info.ticks[info.keyframes[k]], skips), (info.seek_ticks[k], skips), surest]
            else:
                ways = [(None, skips)] if way == surest else [(None, skips), surest]
            ways = list(dict.fromkeys(ways))
            found = None
            for start, skipping in ways:
                if start is not None:
                    container.seek(start, stream=stream)
                    stream.codec_context.flush_buffers()
                    frames, way = decoded(skipping), (start, skipping)
                try:
                    found = self._advance(info, frames, index)
                except av.error.FFmpegError:
                    if (start, skipping) == ways[-1]:
                        raise
                if found is not None:
                    break
            if found is None:
                raise DecodeError(f"{info.path}: frame {index} cannot be decoded exactly")
            at = index
            yield index, found

    @staticmethod
    def _advance(info: VideoInfo, frames: Iterator[Any], index: int) -> Any | None:
        """The frame whose timestamp is exactly that of ``index``, or None when decoding passes it or it is damaged."""
        target = info.ticks[index]
        for frame in frames:
            if frame.pts is None or frame.pts > target:
                return None
            if frame.pts == target:
                return None if frame.is_corrupt else frame
        return None


def _may_skip(codec: str, setup: bytes | None) -> bool:
    """Whether the decoder can be told packet by packet to leave out what no other frame refers to (dav1d takes it for
    all of a file). HEVC pictures only tell it for their own temporal layer, so there must be one layer alone:
    numTemporalLayers of ISO/IEC 14496-15, 8.3.3.1, where the container has that record."""
    if codec == "hevc":
        return setup is not None and len(setup) > 21 and setup[0] == 1 and setup[21] >> 3 & 7 == 1
    return codec == "h264"


def to_rgb(info: VideoInfo, frame: Any, reformatter: VideoReformatter, scale: Scale | None = None) -> np.ndarray:
    """uint8 [H, W, 3] as displayed. Raises DecodeError when the picture changes its size or turns inside the file."""
    if frame.rotation != info.display.told:
        raise DecodeError(f"{info.path}: the picture turns from {info.display.told} to {frame.rotation} degrees")
    height, width = info.display.size(frame.height, frame.width)
    if (height, width) != (info.height, info.width):
        raise DecodeError(f"{info.path}: the picture changes from {info.width}x{info.height} to {width}x{height}")
    if scale is None:
        image = reformatter.reformat(frame, format="rgb24")
    else:
        height, width = info.display.size(scale.height, scale.width)
        image = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation=scale.by.upper())
    return info.display.apply(image.to_ndarray())
