"""What a video file holds, found by one demux pass (and a full decode where the packets cannot be trusted)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from tempo_fast.files import file_digest
from tempo_fast.video.container import DecodeError, open_video

__all__ = ["DecodeError", "VideoInfo", "display_transform", "probe"]

# One packet is one presented frame in these, as long as nothing below speaks against it.
_ONE_TO_ONE = {"h264", "hevc", "vp9", "libvpx-vp9", "av1", "libdav1d", "mjpeg"}
_COLOR_SPACE = {0: "rgb", 1: "bt709", 2: "unspecified", 5: "bt601", 6: "bt601", 9: "bt2020"}
_COLOR_RANGE = {0: "unspecified", 1: "limited", 2: "full"}


@dataclass(frozen=True)
class VideoInfo:
    """Facts about one file. Frames are presented frames, counted from 0 in order of presentation.

    ``pts_s`` seconds from the first presented frame, ascending; ``fps`` the average rate (frames / duration, or the
    container's when they agree); ``width`` and ``height`` in pixels after the display rotation; ``rotation`` in degrees
    clockwise (0, 90, 180, 270), ``mirrored`` when the display matrix also flips; ``has_edit_list`` is true when the
    container hides packets from presentation; ``vfr`` when frame gaps differ by more than the container's rounding.

    For the decoder: ``ticks`` are the presentation times in stream units (empty when frames must be counted by decoding
    from the start), ``keyframes`` the frame numbers where decoding can start, ``seek_ticks`` their decode times.
    """

    path: str
    digest: str
    codec: str
    n_frames: int
    fps: float
    duration_s: float
    pts_s: tuple[float, ...]
    width: int
    height: int
    rotation: int
    mirrored: bool
    has_audio: bool
    has_edit_list: bool
    vfr: bool
    color_space: str
    color_range: str
    ticks: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    seek_ticks: tuple[int, ...] = ()

    @property
    def indexed(self) -> bool:
        """Frames can be found by timestamp after a seek."""
        return bool(self.ticks)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Probe a file; cached on (path, size, mtime).

    Raises:
        DecodeError: missing, empty, truncated, damaged, not a video, audio only, or an odd display matrix.
    """
    path = os.fspath(path)
    try:
        stat = os.stat(path)
    except OSError as e:
        what = "no such file" if isinstance(e, FileNotFoundError) else f"cannot be read ({e.strerror})"
        raise DecodeError(f"{path}: {what}") from e
    return _probe(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1024)
def _probe(path: str, size: int, mtime_ns: int) -> VideoInfo:
    with open_video(path) as (container, stream):
        packets = _packets(path, container, stream)
        if not packets:
            raise DecodeError(f"{path}: its video stream is empty")
        hidden = any(p.is_discard for p in packets)
        stated = float(stream.average_rate or stream.guessed_rate or 25)
        gap = 1.0 / stated
        unit = float(stream.time_base)
        codec, has_audio = stream.codec_context.name, bool(container.streams.audio)
        tail = float(packets[-1].duration or 0) * unit

    with open_video(path) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise DecodeError(f"{path}: no frame can be decoded")
        transform = display_transform(path, first)
        height, width = (first.width, first.height) if transform.swap else (first.height, first.width)
        color = _COLOR_SPACE.get(int(first.colorspace), str(int(first.colorspace)))
        color_range = _COLOR_RANGE.get(int(first.color_range), "unspecified")
        interlaced = bool(first.interlaced_frame)

    ticks: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    seek_ticks: tuple[int, ...] = ()
    if not hidden and not interlaced and _trustworthy(codec, packets):
        by_time = sorted(packets, key=lambda p: p.pts)
        ticks = tuple(p.pts for p in by_time)
        keys = [(i, p) for i, p in enumerate(by_time) if p.is_keyframe]
        keyframes = tuple(i for i, _ in keys)
        seek_ticks = tuple(p.pts if p.dts is None else p.dts for _, p in keys)
        times = [(t - ticks[0]) * unit for t in ticks]
    else:
        times = _decoded_times(path, gap)

    gaps = np.diff(times)
    if len(gaps):
        gap = tail if tail > 0 else float(median(gaps.tolist()))
    duration = times[-1] + gap
    fps = len(times) / duration
    if abs(fps - stated) < 0.005 * stated:
        fps = stated  # millisecond timestamps make 30.005 of 30, and a floor in the sampling rule then loses frames
    return VideoInfo(
        path=path,
        digest=file_digest(path),
        codec=codec,
        n_frames=len(times),
        fps=fps,
        duration_s=duration,
        pts_s=tuple(times),
        width=width,
        height=height,
        rotation=transform.clockwise,
        mirrored=transform.mirrored,
        has_audio=has_audio,
        has_edit_list=hidden,
        vfr=bool(len(gaps) and float(gaps.max() - gaps.min()) > 2.5 * unit + 1e-6),
        color_space=color,
        color_range=color_range,
        ticks=ticks,
        keyframes=keyframes,
        seek_ticks=seek_ticks,
    )


def _packets(path: str, container: Any, stream: Any) -> list[Any]:
    packets: list[Any] = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError(f"{path}: is truncated or damaged (packet {len(packets)} is incomplete)")
        if packet.size:
            packets.append(packet)
        elif packet.dts is not None or packet.pts is not None:
            packets.append(packet)  # a frame of zero bytes: repeats the one before it in some containers
    return packets


def _trustworthy(codec: str, packets: list[Any]) -> bool:
    """Whether the packets' timestamps are exactly the presented frames' timestamps."""
    times = [p.pts for p in packets]
    return (
        codec in _ONE_TO_ONE
        and None not in times
        and len(set(times)) == len(times)
        and all(p.size for p in packets)
        and packets[0].is_keyframe
        and min(times) == times[0]  # pictures shown before the first keyframe may not be decodable
    )


def _decoded_times(path: str, gap: float) -> list[float]:
    """Decode everything and note each presented frame's time; frames without one follow at the average rate."""
    times: list[float] = []
    with open_video(path) as (container, stream):
        for i, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise DecodeError(f"{path}: is damaged (frame {i} cannot be decoded)")
            times.append(i * gap if frame.pts is None else float(frame.pts * frame.time_base))
    if not times:
        raise DecodeError(f"{path}: no frame can be decoded")
    start = times[0]
    times = [t - start for t in times]
    if any(b <= a for a, b in zip(times, times[1:], strict=False)):
        times = [i * gap for i in range(len(times))]
    return times


@dataclass(frozen=True)
class DisplayTransform:
    """How stored pixels become displayed pixels: swap the axes, then flip columns, then rows."""

    swap: bool = False
    flip_x: bool = False
    flip_y: bool = False

    @property
    def clockwise(self) -> int:
        """The rotation part in degrees clockwise (mirrored pictures: of the nearest rotation)."""
        if self.swap:
            return 90 if self.flip_x else 270 if self.flip_y else 90
        return 180 if self.flip_x and self.flip_y else 0

    @property
    def mirrored(self) -> bool:
        """Not a pure rotation."""
        return self.swap ^ self.flip_x ^ self.flip_y

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] as stored -> as displayed."""
        if self.swap:
            image = image.transpose(1, 0, 2)
        if self.flip_x:
            image = image[:, ::-1]
        if self.flip_y:
            image = image[::-1]
        return image


def display_transform(path: str, frame: Any) -> DisplayTransform:
    """The frame's display matrix (a b u, c d v, x y w: x' = a x + c y, y' = b x + d y) as axis swap and flips.

    Raises:
        DecodeError: the matrix turns the picture by something else than quarter turns.
    """
    if not frame.rotation and not len(frame.side_data):
        return DisplayTransform()
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return DisplayTransform()
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if b == c == 0 and a and d:
        return DisplayTransform(False, a < 0, d < 0)
    if a == d == 0 and b and c:
        return DisplayTransform(True, c < 0, b < 0)
    raise DecodeError(
        f"{path}: its display matrix turns the picture by {frame.rotation} degrees; only quarter turns work"
    )


def check_indices(info: VideoInfo, indices: Sequence[int]) -> list[int]:
    """The indices as ints. Raises DecodeError for an empty list or one outside the file."""
    out = [int(i) for i in indices]
    if not out:
        raise DecodeError(f"{info.path}: no frames were asked for")
    for i in out:
        if not 0 <= i < info.n_frames:
            raise DecodeError(f"{info.path}: frame {i} does not exist (frames 0..{info.n_frames - 1})")
    return out
