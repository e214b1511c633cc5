"""What the packets of a stream say about its frames, without decoding them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# One packet is one presented frame in these, as long as nothing below speaks against it.
_ONE_TO_ONE = {"h264", "hevc", "vp8", "vp9", "av1", "mjpeg"}
# FFmpeg names a decoder after its library
_CODEC = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}
_OBU_TILE_GROUP, _OBU_FRAME = 4, 6


class Packet(NamedTuple):
    """What is kept of a packet: times in stream units, its size in bytes, and what it does."""

    pts: int | None
    dts: int | None
    duration: int | None
    size: int
    keyframe: bool
    hidden: bool
    """The container keeps its frame from presentation (edit list)."""
    coded: bool
    """It codes a picture of its own, rather than showing an earlier one again (VP9, AV1)."""
    shown: bool
    """Its picture is meant to be seen (VP8 has pictures that only serve as references)."""


def codec_name(name: str) -> str:
    """The codec's own name where FFmpeg tells the library's."""
    return _CODEC.get(name, name)


def read_packet(codec: str, packet: Any) -> Packet:
    """Keep what matters of a PyAV packet; its bytes are let go."""
    coded = shown = True
    if packet.size and codec in ("vp8", "vp9", "av1"):
        data = memoryview(packet)
        if codec == "vp8":
            shown = bool(data[0] & 0x10)  # RFC 6386, 9.1: show_frame
        else:
            coded = not _vp9_shows_again(data) if codec == "vp9" else _av1_codes(data)
    return Packet(
        packet.pts, packet.dts, packet.duration, packet.size, packet.is_keyframe, packet.is_discard, coded, shown
    )


def _vp9_shows_again(data: memoryview) -> bool:
    """VP9 bitstream specification, 6.2: show_existing_frame follows the marker and the profile."""
    first = data[0]
    profile3 = first & 0x30 == 0x30
    return first >> 6 == 2 and bool(first & (0x04 if profile3 else 0x08))


def _av1_codes(data: memoryview) -> bool:
    """AV1 specification, 5.3: whether one of the units holds tiles."""
    at = 0
    while at < len(data):
        header = data[at]
        kind = header >> 3 & 15
        if kind in (_OBU_TILE_GROUP, _OBU_FRAME):
            return True
        at += 2 if header & 4 else 1
        if not header & 2:  # no size: it is the last
            return False
        size = shift = 0
        while at < len(data):
            byte = data[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        at += size
    return False


def trustworthy(codec: str, packets: Sequence[Packet]) -> bool:
    """Whether the packets' timestamps are exactly the presented frames' timestamps."""
    times = [p.pts for p in packets]
    return (
        codec in _ONE_TO_ONE
        and None not in times
        and len(set(times)) == len(times)
        and all(p.size and p.shown and not p.hidden for p in packets)
        and packets[0].keyframe
        and min(times) == times[0]  # type: ignore[type-var]  # shown before the first keyframe: may not be decodable
    )


def open_gop(packets: Sequence[Packet]) -> bool:
    """Whether frames are coded after a keyframe, other than the first, and shown before it."""
    last_key: int | None = None
    for p in packets[1:]:
        if p.keyframe:
            last_key = p.pts
        elif last_key is not None and p.pts is not None and p.pts < last_key:
            return True
    return False


def dense_keyframes(packets: Sequence[Packet]) -> bool:
    """Whether a keyframe is coded before the one before it is shown: a seek by time then lands on the wrong one."""
    keys = [p for p in packets if p.keyframe and p.pts is not None and p.dts is not None]
    return any(b.dts <= a.pts for a, b in zip(keys, keys[1:], strict=False))  # type: ignore[operator]
