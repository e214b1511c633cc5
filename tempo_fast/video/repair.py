"""Copies of files that cannot be used safely or cheaply: the same frames at the same times, in a plain file.

A copy is a remux (the packets as they are, less the hidden ones) where that shows the same pictures, bit for bit, and
else H.264 with a keyframe every so many frames. It is verified before it gets its name; originals are only read.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np

from tempo_fast.files import digest, writing
from tempo_fast.video.container import DecodeError, check_file, open_video
from tempo_fast.video.display import DisplayTransform, display_transform
from tempo_fast.video.frames import intact_frames, not_of_the_file
from tempo_fast.video.probe import VideoInfo, content_digest, probe

_KEY = 12
MIN_KEPT_S = 1.0
"""A damaged file is worth a copy when this many seconds of it decode."""
RULES = 2
"""Part of a copy's name: raise it when the same file must give another copy."""
_KEPT_FORMATS = {"yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"}
_KEPT_SUFFIXES = {".mp4", ".m4v", ".mov", ".mkv", ".webm"}
_CONTAINERS = {".mov": "mov", ".mkv": "matroska", ".webm": "webm"}


@dataclass(frozen=True)
class RepairConfig:
    gop: int = 48
    """Keyframe interval of re-encoded copies, frames."""
    max_gop: int = 250
    """A file with more frames between two keyframes than this is re-encoded."""
    crf: int = 18
    """x264's constant rate factor; 18 is visually lossless to most."""
    preset: str = "veryfast"
    """x264's preset."""


@dataclass(frozen=True)
class Repair:
    """``kind`` of the copy at ``path``, "none" when there is none; ``reason`` says why the file wants one, and what was
    cut or kept it from working. ``failure`` as ``not_of_the_file`` names it: another try may give a copy."""

    kind: Literal["remux", "reencode", "none"]
    reason: str
    path: str = ""
    failure: str = ""


@dataclass(frozen=True)
class _Shown:
    """What the copy has to show: the times in seconds of its frames, how long the last one stays, and its shape as
    displayed. ``cut`` when the file goes on after them and cannot be decoded; ``last`` is then the timestamp of the
    last one, in stream units."""

    times: Sequence[float]
    tail_s: float
    height: int
    width: int
    display: DisplayTransform
    cut: bool = False
    last: int | None = None


def longest_gop(info: VideoInfo) -> int:
    """Most frames from one keyframe to the next, or to the end. Where frames have no index, packets are counted."""
    if info.indexed:
        ends = [*info.keyframes[1:], info.n_frames]
        return max(end - start for start, end in zip(info.keyframes, ends, strict=True))
    longest = run = 0
    with open_video(info.path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size:
                run = 1 if packet.is_keyframe else run + 1
                longest = max(longest, run)
    return longest


def why_repair(has_edit_list: bool, gop: int, config: RepairConfig) -> str:
    """Why a readable file wants a copy; "" when it is good as it is."""
    reasons = []
    if has_edit_list:
        reasons.append("its edit list hides frames")
    if gop > config.max_gop:
        reasons.append(f"up to {gop} frames lie between keyframes (more than {config.max_gop})")
    return " and ".join(reasons)


def repair(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    why: str,
    config: RepairConfig,
    *,
    scratch: str | os.PathLike[str] | None = None,
) -> Repair:
    """Write a copy of ``path`` into ``folder`` (which must exist), verified and under its final name, or none.

    The name is that of the file with a digest of its bytes and the settings. ``why`` is what ``why_repair`` said; empty
    for a damaged file, of which everything before the damage is kept. Sound is left out. ``scratch`` is a folder of the
    same file system for unfinished files; ``folder`` itself when it is None.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    path = os.fspath(path)
    try:
        return _repair(path, Path(folder), Path(scratch or folder), why, config)
    except DecodeError as e:
        reason = f"{why or 'is damaged'}; {str(e).removeprefix(f'{path}: ')}"
        return Repair("none", reason, failure=not_of_the_file(e))


def _repair(path: str, folder: Path, scratch: Path, why: str, config: RepairConfig) -> Repair:
    if why:
        info = probe(path)
        tail = info.duration_s - info.pts_s[-1]
        shown = _Shown(info.pts_s, tail, info.height, info.width, info.display)
        remux = info.has_edit_list and longest_gop(info) <= config.max_gop
    else:
        shown = _decodable(path)
        kept = shown.times[-1] + shown.tail_s
        why = f"is damaged after frame {len(shown.times) - 1}" if shown.cut else "is damaged, but every frame decodes"
        if kept < MIN_KEPT_S:
            return Repair("none", f"{why}; only {kept:.2f} s are left, less than {MIN_KEPT_S:g} s")
        why += f"; the {kept:.2f} s before it are kept" if shown.cut else ""
        remux = shown.cut  # otherwise it would be the same file again
    remuxed, encoded = _targets(path, folder, digest([content_digest(path), config, RULES])[:_KEY])
    if remux:
        made = _place(remuxed, scratch, lambda out, form: _remux(path, out, form, shown))
        if made:
            return Repair("remux", why, made)
    made = _place(encoded, scratch, lambda out, form: _encode(path, out, form, shown, config))
    if made:
        return Repair("reencode", why, made)
    return Repair("none", f"{why}; no copy shows the same frames")


def possible_names(path: str | os.PathLike[str]) -> set[str]:
    """Names that a copy of this file may get, with a made-up digest."""
    return {target.name for target in _targets(os.fspath(path), Path(), "0" * _KEY)}


def _targets(path: str, folder: Path, key: str) -> tuple[Path, Path]:
    """Where a remux and a re-encoded copy go."""
    original = Path(path)
    suffix = original.suffix.lower()
    remuxed = suffix if suffix in _KEPT_SUFFIXES else ".mp4"
    encoded = ".mkv" if suffix in (".mkv", ".webm") else ".mp4"  # the same rounding of timestamps as before
    return folder / f"{original.stem}-{key}{remuxed}", folder / f"{original.stem}-{key}{encoded}"


def _place(target: Path, scratch: Path, write: Callable[[Path, str], bool]) -> str:
    """Let ``write`` fill a temporary file (path, FFmpeg's name of the container); where it says that the copy is right,
    give it its name."""
    temporary = scratch / f".{uuid.uuid4().hex[:12]}.tmp"  # no video's suffix, should it be left behind
    try:
        with writing(target):
            temporary.touch()  # from here on, what cannot be written is the container's fault and not the folder's
        if not write(temporary, _CONTAINERS.get(target.suffix, "mp4")):
            return ""
        with writing(target):
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, target)
        return str(target)
    finally:
        temporary.unlink(missing_ok=True)


def _decodable(path: str) -> _Shown:
    """What a damaged file shows before the damage."""
    ticks: list[int | None] = []
    height = width = 0
    display = DisplayTransform()
    try:
        check_file(path)
        cut = False
    except DecodeError as e:
        if not_of_the_file(e):
            raise
        cut = True
    gap = unit = 0.0
    try:
        with open_video(path, whole=False) as (container, stream):
            stream.thread_type = "NONE"  # frame threads report damage late
            gap = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
            unit = float(stream.time_base)
            for frame in intact_frames(path, container, stream, cut=cut):
                if not ticks:
                    display = display_transform(path, frame)
                    height, width = display.size(frame.height, frame.width)
                ticks.append(frame.pts)
    except DecodeError as e:
        if not ticks or not_of_the_file(e):
            raise
        cut = True
    known = [t for t in ticks if t is not None]
    if len(known) == len(ticks) and all(a < b for a, b in zip(known, known[1:], strict=False)):
        times = [(t - known[0]) * unit for t in known]
        tail = times[-1] - times[-2] if len(times) > 1 else gap
    else:
        times, tail = [i * gap for i in range(len(ticks))], gap
    return _Shown(times, tail, height, width, display, cut, ticks[-1])


def _frames(path: str, shown: _Shown) -> Iterator[tuple[Any, Any]]:
    """(frame, its stream) of the frames to show, as stored."""
    with open_video(path, whole=not shown.cut) as (container, stream):
        if shown.cut:
            stream.thread_type = "NONE"
        for _, frame in zip(shown.times, intact_frames(path, container, stream, cut=shown.cut), strict=False):
            yield frame, stream


def _remux(path: str, out: Path, form: str, shown: _Shown) -> bool:
    """Copy the packets of the frames to show. False where that shows anything else, or cannot be done."""
    try:
        with open_video(path, whole=not shown.cut) as (container, stream):
            _copy_packets(container.demux(stream), stream, out, form, shown.last)
        return _verified(out, shown, shown.display) and _same_pictures(path, out, shown)
    except (DecodeError, ValueError) as e:  # a codec that the container does not take, timestamps that it refuses
        if not_of_the_file(e):
            raise
        return False


def _copy_packets(packets: Iterable[Any], stream: Any, out: Path, form: str, last: int | None) -> None:
    first: int | None = None
    with writing(out.parent), av.open(f"file:{out}", "w", format=form) as target:
        copy = target.add_stream_from_template(stream)
        for packet in packets:
            if packet.is_corrupt:
                break
            if not packet.size or packet.is_discard or (last is not None and (packet.pts is None or packet.pts > last)):
                continue
            if first is None:
                first = packet.pts or 0
            if packet.pts is not None:
                packet.pts -= first
            if packet.dts is not None:
                packet.dts -= first
            packet.stream = copy
            target.mux(packet)


def _same_pictures(path: str, out: Path, shown: _Shown) -> bool:
    pairs = zip_longest(_frames(path, shown), _frames(str(out), shown))
    for ours, theirs in pairs:
        if ours is None or theirs is None:
            return False
        if not np.array_equal(ours[0].to_ndarray(format="rgb24"), theirs[0].to_ndarray(format="rgb24")):
            return False
    return True


def _encode(path: str, out: Path, form: str, shown: _Shown, config: RepairConfig) -> bool:
    """H.264 without B-frames, so that frames lie in the order shown and the copy needs no edit list of its own."""
    target: Any = None
    encoder: Any = None
    turn: Any = None
    ends = [*shown.times[1:], shown.times[-1] + shown.tail_s]
    durations: dict[int, int] = {}
    try:
        with writing(out.parent):
            target = av.open(f"file:{out}", "w", format=form, options={"movflags": "+faststart"})
        for (frame, stream), start, end in zip(_frames(path, shown), shown.times, ends, strict=True):
            unit = Fraction(stream.time_base)
            if turn is None:
                turn = _turner(shown.display, frame, unit)
                encoder = _encoder(target, shown, frame, stream, config)
            picture = turn(frame).reformat(format=encoder.pix_fmt)
            picture.pts, picture.time_base = round(start / unit), unit
            picture.pict_type = 0  # the source's keyframes are none of ours
            durations[picture.pts] = round(end / unit) - picture.pts
            _write(target, encoder, picture, durations, out)
        _write(target, encoder, None, durations, out)
        with writing(out.parent):
            target.close()
    except (av.error.FFmpegError, ValueError) as e:  # a size that x264 refuses; fewer frames than were counted before
        if not_of_the_file(e):
            raise
        return False
    finally:
        if target is not None:
            _close(target)
    return _verified(out, shown, DisplayTransform()) and longest_gop(probe(out)) <= config.gop


def _close(target: Any) -> None:
    try:
        target.close()
    except av.error.FFmpegError:  # what went wrong before is told instead
        pass


def _write(target: Any, encoder: Any, picture: Any, durations: dict[int, int], out: Path) -> None:
    for packet in encoder.encode(picture):
        packet.duration = durations.pop(packet.pts, packet.duration)
        with writing(out.parent):
            target.mux(packet)


def _encoder(target: Any, shown: _Shown, frame: Any, stream: Any, config: RepairConfig) -> Any:
    options = {"crf": str(config.crf), "preset": config.preset, "g": str(config.gop), "bf": "0"}
    made = target.add_stream("libx264", rate=stream.average_rate or stream.guessed_rate or 25, options=options)
    made.height, made.width = shown.height, shown.width
    halves = shown.height % 2 or shown.width % 2  # half-size chroma cannot have them
    name = frame.format.name
    if halves or name in ("yuv422p", "yuvj422p") and shown.display.swap:
        name = "yuvj444p" if name.startswith("yuvj") else "yuv444p"
    made.pix_fmt = name if name in _KEPT_FORMATS else "yuv420p"
    context = made.codec_context
    context.thread_count = 1
    made.time_base = context.time_base = Fraction(stream.time_base)
    if not frame.format.is_rgb:
        for field in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(context, field, int(getattr(frame, field)))
    return made


def _turner(display: DisplayTransform, frame: Any, unit: Fraction) -> Any:
    """A function from a frame as stored to the same frame as displayed, without a way through RGB."""
    steps: list[tuple[str, str | None]] = [("transpose", "cclock_flip")] if display.swap else []
    steps += [("hflip", None)] if display.flip_x else []
    steps += [("vflip", None)] if display.flip_y else []
    if not steps:
        return lambda picture: picture
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=unit)
    graph.link_nodes(source, *(graph.add(*step) for step in steps), graph.add("buffersink")).configure()

    def turn(picture: Any) -> Any:
        graph.push(picture)
        return graph.pull()

    return turn


def _verified(out: Path, shown: _Shown, display: DisplayTransform) -> bool:
    """Whether the copy, read as any other file, has the frames and times it must have."""
    try:
        info = probe(out)
    except DecodeError as e:
        if not_of_the_file(e):
            raise
        return False
    return (
        info.n_frames == len(shown.times)
        and bool(np.allclose(info.pts_s, shown.times, rtol=0, atol=1e-6))
        and (info.height, info.width) == (shown.height, shown.width)
        and info.display == display
        and not info.has_edit_list
    )
