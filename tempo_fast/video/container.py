"""Opening a file, and telling a cut-off one from a whole one: what FFmpeg alone does not say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av

from tempo_fast.errors import InputError

# FFmpeg decodes text files and cover art as "video"; nobody means those.
_NOT_VIDEO_CODECS = {"ansi", "bintext", "xbin", "idf"}
_UNSIZED = (1 << 56) - 1


class DecodeError(InputError):
    """A file that cannot give the frames asked of it; the message is one sentence that starts with its path."""


def reason(error: BaseException) -> str:
    """The library's own words, on one line, without the internal call they end in."""
    if isinstance(error, av.error.FFmpegError):
        return str(error.strerror)
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_file(path: str) -> None:
    """Raises DecodeError for a missing, empty, unreadable or visibly cut-off file."""
    if os.path.isdir(path):
        raise DecodeError(f"{path}: is a folder, not a video file")
    if not os.path.exists(path):
        raise DecodeError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise DecodeError(f"{path}: is a pipe or a device, not a video file")
    try:
        size = os.path.getsize(path)
        if size == 0:
            raise DecodeError(f"{path}: is empty (0 bytes)")
        with open(path, "rb") as f:
            head = f.read(64)
            if head[4:8] == b"ftyp":
                _check_iso(path, f, size)
            elif head[:4] == b"\x1aE\xdf\xa3":
                _check_matroska(path, head, size)
            elif head[:4] == b"RIFF":
                stated = 8 + int.from_bytes(head[4:8], "little")
                if stated > size:
                    raise DecodeError(f"{path}: is truncated ({size} bytes of {stated})")
    except OSError as e:
        raise DecodeError(f"{path}: cannot be read ({e.strerror})") from e


def _check_iso(path: str, f: Any, size: int) -> None:
    """MP4/MOV: every top-level box must end inside the file, and the index (moov) must be there."""
    at, kinds = 0, set()
    while at + 8 <= size:
        f.seek(at)
        header = f.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:
            length = size - at
        if length < 8:
            break
        if at + length > size:
            name = f"its '{kind.decode()}' box" if kind.isalnum() else "one of its boxes"
            raise DecodeError(f"{path}: is truncated ({size} bytes, {name} ends at {at + length})")
        kinds.add(kind)
        at += length
    if b"moov" not in kinds:
        raise DecodeError(f"{path}: is truncated or unfinished (it has no 'moov' box)")


def _check_matroska(path: str, head: bytes, size: int) -> None:
    """Matroska/WebM: a segment that states its size must fit into the file."""

    def number(at: int) -> tuple[int, int]:
        length = 9 - head[at].bit_length() if head[at] else 9
        if length > 8 or at + length > len(head):
            return -1, at
        value = head[at] & ((1 << (8 - length)) - 1)
        unknown = (1 << 7 * length) - 1
        for byte in head[at + 1 : at + length]:
            value = value << 8 | byte
        return (_UNSIZED if value == unknown else value), at + length

    length, at = number(4)
    if length < 0 or at + length + 5 > len(head) or head[at + length : at + length + 4] != b"\x18S\x80g":
        return
    segment, start = number(at + length + 4)
    if 0 <= segment < _UNSIZED and start + segment > size:
        raise DecodeError(f"{path}: is truncated ({size} bytes of {start + segment})")


@contextmanager
def open_video(path: str | os.PathLike[str], *, whole: bool = True) -> Iterator[tuple[Any, Any]]:
    """Yield (container, first real video stream). Every FFmpeg error inside the block becomes a DecodeError.

    ``whole`` False also opens files that are visibly cut off.

    Raises:
        DecodeError: missing, empty, truncated, unreadable, or without a video stream.
    """
    path = os.fspath(path)
    if whole:
        check_file(path)
    try:
        with av.open(path, metadata_errors="replace") as container:
            for stream in container.streams.video:
                codec = stream.codec_context
                cover = bool(stream.disposition & av.stream.Disposition.attached_pic)
                if codec is not None and codec.name not in _NOT_VIDEO_CODECS and not cover:
                    # Frame threads cost more than they give on small pictures.
                    stream.thread_type = "AUTO" if codec.width * codec.height > 400_000 else "NONE"
                    # Without this, damaged H.264 is patched up from neighbouring frames and handed out as good.
                    codec.options = {"err_detect": "explode"}
                    yield container, stream
                    return
            raise DecodeError(f"{path}: has no video stream")
    except av.error.FFmpegError as e:
        raise DecodeError(f"{path}: cannot be decoded ({reason(e)})") from e
