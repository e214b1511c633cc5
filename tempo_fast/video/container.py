"""Opening a file, and telling a cut-off one from a whole one: what FFmpeg alone does not say."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av

from tempo_fast.errors import InputError
from tempo_fast.video.matroska import gap, segment_end

# FFmpeg decodes text files and cover art as "video"; nobody means those.
_NOT_VIDEO_CODECS = {"ansi", "bintext", "xbin", "idf"}
# what these play can change without a change of the file
_LISTS = {"concat", "hls", "dash", "imf"}
_MATROSKA = b"\x1aE\xdf\xa3"


class DecodeError(InputError):
    """A file that cannot give the frames asked of it; the message is one sentence that starts with its path."""


class DecodeTimeout(DecodeError):
    """Reading a file took too long: of the machine or the disk, perhaps, and not of the file."""


class Deadline:
    """The end of the ``timeout_s`` seconds, from now on, that reading a file may take; None for no end.

    All are equal: what is cached by arguments does not depend on the time left.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        self.timeout_s = timeout_s
        self._ends = math.inf if timeout_s is None else time.monotonic() + timeout_s

    def check(self, path: str) -> None:
        """Raises DecodeTimeout once it has passed."""
        if time.monotonic() > self._ends:
            raise DecodeTimeout(f"{path}: reading it took longer than {self.timeout_s:g} s")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Deadline)

    def __hash__(self) -> int:
        return 0


NO_END = Deadline()


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
            elif head[:4] == _MATROSKA:
                end = segment_end(f)
                if end is not None and end > size:
                    raise DecodeError(f"{path}: is truncated ({size} bytes of {end})")
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


def check_structure(path: str) -> None:
    """Raises DecodeError where a whole look at a Matroska/WebM file's elements finds one damaged; costs a read of all
    their headers. Raises it for a file that cannot be read, too."""
    try:
        with open(path, "rb") as f:
            at = gap(f) if f.read(4) == _MATROSKA else None
    except OSError as e:
        raise DecodeError(f"{path}: cannot be read ({e.strerror})") from e
    if at is not None:
        raise DecodeError(f"{path}: is damaged (no element where one should be, at byte {at})")


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
        # "file:", or a relative name with a colon in it is taken for a protocol
        with av.open(f"file:{path}", metadata_errors="replace") as container:
            if container.format.name in _LISTS:
                raise DecodeError(f"{path}: is a list of other files, not a video file")
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
