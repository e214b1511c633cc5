"""What a video file holds, found by one demux pass (and a full decode where the packets cannot be trusted)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from tempo_fast.errors import InputError
from tempo_fast.files import file_digest
from tempo_fast.video.container import NO_END, Deadline, DecodeError, check_file, check_structure, open_video
from tempo_fast.video.display import DisplayTransform, display_transform
from tempo_fast.video.frames import intact_frames
from tempo_fast.video.packets import Packet, codec_name, dense_keyframes, open_gop, read_packet, trustworthy

__all__ = ["DecodeError", "VideoInfo", "check_indices", "content_digest", "probe"]

_EDGE = 1 << 15
# Containers that store times. In the others (AVI) they are counted while reading, and differ after a seek where the
# file is damaged.
_TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "flv", "ivf"}
# ITU-T H.273; FFmpeg's numbers are its code points
_COLOR_SPACE = {0: "rgb", 1: "bt709", 2: "unspecified", 5: "bt601", 6: "bt601", 9: "bt2020"}
_PRIMARIES = {1: "bt709", 2: "unspecified", 5: "bt601-625", 6: "bt601-525", 9: "bt2020", 12: "display-p3"}
_TRANSFER = {1: "bt709", 2: "unspecified", 6: "bt601", 13: "srgb", 14: "bt2020", 16: "pq", 18: "hlg"}
_COLOR_RANGE = {0: "unspecified", 1: "limited", 2: "full"}


@dataclass(frozen=True)
class VideoInfo:
    """Facts about one file. Frames are presented frames, counted from 0 in order of presentation.

    ``pts_s`` seconds from the first presented frame, ascending; ``fps`` the average rate (frames / duration, or the
    container's when they agree); ``width`` and ``height`` in pixels after ``display``, which turns stored pixels into
    displayed ones; ``has_edit_list`` is true when the container hides packets from presentation; ``vfr`` when frame
    gaps differ by more than the container's rounding; ``profile`` as FFmpeg names it, "" where it has none; the colours
    as the stream states them, else "unspecified".

    For the decoder: ``ticks`` are the presentation times in stream units (empty when frames must be counted by decoding
    from the start), ``keyframes`` the frame numbers where decoding can start, ``seek_ticks`` their decode times;
    ``video_streams`` counts cover art too; ``open_gop``, ``dense_keyframes`` as in ``packets``; ``shows_again`` when
    packets show an earlier picture and code none.
    """

    path: str
    digest: str
    codec: str
    profile: str
    pix_fmt: str
    n_frames: int
    fps: float
    duration_s: float
    pts_s: tuple[float, ...]
    width: int
    height: int
    display: DisplayTransform
    has_audio: bool
    has_edit_list: bool
    interlaced: bool
    vfr: bool
    color_space: str
    color_range: str
    color_primaries: str
    color_transfer: str
    video_streams: int
    open_gop: bool
    dense_keyframes: bool
    shows_again: bool
    ticks: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    seek_ticks: tuple[int, ...] = ()

    @property
    def rotation(self) -> int:
        """Degrees clockwise: 0, 90, 180, 270."""
        return self.display.clockwise

    @property
    def mirrored(self) -> bool:
        """The display matrix flips the picture too."""
        return self.display.mirrored

    @property
    def indexed(self) -> bool:
        """Frames can be found by timestamp after a seek."""
        return bool(self.ticks)


def probe(path: str | os.PathLike[str], deadline: Deadline = NO_END) -> VideoInfo:
    """Probe a file; kept in memory for (path, size, mtime, digest of the file's two ends).

    Raises:
        DecodeError: missing, empty, truncated, damaged, not a video, audio only, or an odd display matrix.
        DecodeTimeout: ``deadline`` has passed.
    """
    path = os.fspath(path)
    return _probe(path, *_stamp(path), deadline)


def content_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes, read once for as long as the file stays the same. Raises DecodeError."""
    path = os.fspath(path)
    return _content_digest(path, *_stamp(path))


def _stamp(path: str) -> tuple[int, int, str]:
    """Size, time of change, and a digest of both ends, for files that are rewritten within a tick of the clock."""
    try:
        if not os.path.isfile(path):
            check_file(path)
        stat = os.stat(path)
        with open(path, "rb") as f:
            ends = hashlib.sha256(f.read(_EDGE))
            f.seek(max(0, stat.st_size - _EDGE))
            ends.update(f.read(_EDGE))
    except OSError as e:
        raise DecodeError(f"{path}: cannot be read ({e.strerror})") from e
    return stat.st_size, stat.st_mtime_ns, ends.hexdigest()


# Small, and dear to make again: it outlives the infos, of which an hour of video fills several megabytes.
@lru_cache(maxsize=1 << 16)
def _content_digest(path: str, size: int, mtime_ns: int, ends: str) -> str:
    try:
        return file_digest(path)
    except InputError as e:
        raise DecodeError(str(e)) from e


@lru_cache(maxsize=512)
def _probe(path: str, size: int, mtime_ns: int, ends: str, deadline: Deadline) -> VideoInfo:
    with open_video(path) as (container, stream):
        check_structure(path)
        codec = codec_name(stream.codec_context.name)
        packets, first = _demux(path, codec, container, stream, deadline)
        display = display_transform(path, first)
        stated = float(stream.average_rate or stream.guessed_rate or 25)
        unit = float(stream.time_base)
        facts = {
            "codec": codec,
            "profile": stream.profile or "",
            "pix_fmt": first.format.name,
            "has_audio": bool(container.streams.audio),
            "video_streams": len(container.streams.video),
            "interlaced": bool(first.interlaced_frame),
            "color_space": _named(_COLOR_SPACE, first.colorspace),
            "color_range": _named(_COLOR_RANGE, first.color_range),
            "color_primaries": _named(_PRIMARIES, first.color_primaries),
            "color_transfer": _named(_TRANSFER, first.color_trc),
        }
        height, width = display.size(first.height, first.width)
        timed = container.format.name in _TIMED

    gap = 1.0 / stated
    ticks: tuple[int, ...] = ()
    keyframes: tuple[int, ...] = ()
    seek_ticks: tuple[int, ...] = ()
    if timed and not facts["interlaced"] and trustworthy(codec, packets):
        by_time = sorted(packets, key=lambda p: p.pts)  # type: ignore[arg-type, return-value]
        ticks = tuple(p.pts for p in by_time)  # type: ignore[misc]
        keys = [(i, p) for i, p in enumerate(by_time) if p.keyframe]
        keyframes = tuple(i for i, _ in keys)
        seek_ticks = tuple(p.pts if p.dts is None else p.dts for _, p in keys)  # type: ignore[misc]
        times = [(t - ticks[0]) * unit for t in ticks]
    else:
        times = _decoded_times(path, gap, deadline)

    gaps = np.diff(times)
    if len(gaps):
        tail = float(packets[-1].duration or 0) * unit
        gap = tail if tail > 0 else float(median(gaps.tolist()))
    duration = times[-1] + gap
    fps = len(times) / duration
    if abs(fps - stated) < 0.005 * stated:
        fps = stated  # millisecond timestamps make 30.005 of 30, and a floor in the sampling rule then loses frames
    return VideoInfo(
        path=path,
        digest=_content_digest(path, size, mtime_ns, ends),
        n_frames=len(times),
        fps=fps,
        duration_s=duration,
        pts_s=tuple(times),
        width=width,
        height=height,
        display=display,
        has_edit_list=any(p.hidden for p in packets),
        vfr=bool(len(gaps) and float(gaps.max() - gaps.min()) > 2.5 * unit + 1e-6),
        open_gop=open_gop(packets),
        dense_keyframes=dense_keyframes(packets),
        shows_again=not all(p.coded for p in packets),
        ticks=ticks,
        keyframes=keyframes,
        seek_ticks=seek_ticks,
        **facts,
    )


def _named(names: dict[int, str], value: Any) -> str:
    return names.get(int(value), str(int(value)))


def _demux(path: str, codec: str, container: Any, stream: Any, deadline: Deadline) -> tuple[list[Packet], Any]:
    """All packets, and the first frame presented."""
    packets: list[Packet] = []
    first = None
    for packet in container.demux(stream):
        deadline.check(path)
        if packet.is_corrupt:
            raise DecodeError(f"{path}: is truncated or damaged (packet {len(packets)} is incomplete)")
        # of zero bytes with a time: repeats the frame before it in some containers; without: the end
        if packet.size or packet.dts is not None or packet.pts is not None:
            packets.append(read_packet(codec, packet))
        if first is None:
            first = next(iter(packet.decode()), None)
    if not packets:
        raise DecodeError(f"{path}: its video stream is empty")
    if first is None:
        raise DecodeError(f"{path}: no frame can be decoded")
    return packets, first


def _decoded_times(path: str, gap: float, deadline: Deadline) -> list[float]:
    """Decode everything and note each presented frame's time; frames without one follow at the average rate."""
    times: list[float] = []
    with open_video(path) as (container, stream):
        for i, frame in enumerate(intact_frames(path, container, stream)):
            deadline.check(path)
            times.append(i * gap if frame.pts is None else float(frame.pts * frame.time_base))
    if not times:
        raise DecodeError(f"{path}: no frame can be decoded")
    start = times[0]
    times = [t - start for t in times]
    if any(b <= a for a, b in zip(times, times[1:], strict=False)):
        times = [i * gap for i in range(len(times))]
    return times


def check_indices(info: VideoInfo, indices: Sequence[int]) -> list[int]:
    """The indices as ints. Raises DecodeError for an empty list or one outside the file."""
    out = [int(i) for i in indices]
    if not out:
        raise DecodeError(f"{info.path}: no frames were asked for")
    for i in out:
        if not 0 <= i < info.n_frames:
            raise DecodeError(f"{info.path}: frame {i} does not exist (frames 0..{info.n_frames - 1})")
    return out
