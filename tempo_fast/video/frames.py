"""Every frame of a file in the order shown, up to the first that no decoder would hand out; and whose fault an error
was."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import av

from tempo_fast.video.container import DecodeError

# What reading a file answers when the disk or the network does not. FFmpeg also says EPERM, of bytes that it rejects.
_DISK = {errno.EACCES, errno.EIO, errno.ENXIO, errno.ENODEV, errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT}


def intact_frames(path: str, container: Any, stream: Any, *, cut: bool = False) -> Iterator[Any]:
    """PyAV's frames as stored, in the order shown.

    Of a file that is ``cut`` off, pictures that wait for others at the end are left out: some before them may be
    missing.

    Raises:
        DecodeError: a packet is incomplete, a frame is damaged, or the picture changes its size or turns.
    """
    shape = None
    for packet in container.demux(stream):
        if cut and not packet.size:
            return
        if packet.is_corrupt:
            raise DecodeError(f"{path}: a packet is incomplete")
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(f"{path}: a frame cannot be decoded")
            now = frame.width, frame.height, frame.rotation
            shape = shape or now
            if now[:2] != shape[:2]:
                raise DecodeError(f"{path}: the picture changes from {shape[0]}x{shape[1]} to {now[0]}x{now[1]}")
            if now != shape:
                raise DecodeError(f"{path}: the picture turns from {shape[2]} to {now[2]} degrees")
            yield frame


def not_of_the_file(error: BaseException) -> str:
    """Whether an error may be gone next time: "io" of one that came from the disk, the network or a missing right,
    "memory" where it was short; "" of one that the file's bytes cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "memory"
        if isinstance(cause, OSError) and (not isinstance(cause, av.error.FFmpegError) or cause.errno in _DISK):
            return "io"
        cause = cause.__cause__
    return ""
