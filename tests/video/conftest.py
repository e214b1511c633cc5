"""Counter clips: every frame shows its own number, so that a wrong frame is seen from its pixels.

A number is 12 bits; a bit is a bright block above a dark one, or the other way round. Numbers are read back from any
size and colour conversion, and a frame that shows none raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BITS = 12


def counter_frame(number: int, height: int = 64, width: int = 192) -> np.ndarray:
    """uint8 [H, W, 3]: one column of two blocks per bit, over a texture that moves."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([(x + 3 * number) % 256, (y * 2 + number) % 256, (x + y) % 256], -1).astype(np.uint8)
    block, half = width // BITS, height // 2
    for bit in range(BITS):
        on = number >> bit & 1
        frame[:half, bit * block : (bit + 1) * block] = 230 if on else 20
        frame[half:, bit * block : (bit + 1) * block] = 20 if on else 230
    return frame


def read_counter(frames: torch.Tensor) -> list[int]:
    """uint8 [F, H, W, 3] -> the numbers shown."""
    out = []
    for frame in frames.float().mean(-1).cpu():
        half, block = frame.shape[0] // 2, frame.shape[1] // BITS
        number = 0
        for bit in range(BITS):
            column = frame[:, bit * block + 2 : (bit + 1) * block - 2]
            top, bottom = column[: half - 2].mean(), column[half + 2 :].mean()
            assert abs(float(top - bottom)) > 80, "this frame shows no number"
            number |= int(top > bottom) << bit
        out.append(number)
    return out


def write_counter(
    path: Path,
    n: int = 60,
    *,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,
    rate: int = 30,
    gop: int = 12,
    bframes: int = 0,
    audio: bool = False,
    matrix: Sequence[int] | None = None,
    turn: Callable[[np.ndarray], np.ndarray] = lambda f: f,
    size: tuple[int, int] = (64, 192),
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    container: dict[str, str] | None = None,
) -> Path:
    """Encode n counter frames; ``pts`` in 1/600 s; ``turn`` is applied to what is stored."""
    import av

    options = {"g": str(gop), **(options or {})}
    if codec == "libx264":
        options |= {"bf": str(bframes), "preset": "ultrafast" if not bframes else "veryfast", "crf": "20"}
    if codec == "libvpx-vp9":
        options |= {"deadline": "realtime", "cpu-used": "8"}
    times = [i * 600 // rate for i in range(n)] if pts is None else list(pts)
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options)
        first = turn(counter_frame(0, *size))
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], pix_fmt
        stream.codec_context.thread_count = 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        sound = file.add_stream("aac", rate=22050, layout="mono") if audio else None
        for i, when in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(turn(counter_frame(i, *size))), format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, 22050 * n // rate, 1024):
                wave = np.sin(np.arange(start, start + 1024) / 9).astype(np.float32)[None]
                block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
                block.sample_rate, block.pts, block.time_base = 22050, start, Fraction(1, 22050)
                file.mux(sound.encode(block))
            file.mux(sound.encode(None))
    return path


@pytest.fixture(scope="session")
def counter() -> Any:
    """The helpers above, for tests that have no other way to import them."""

    class Counter:
        write = staticmethod(write_counter)
        read = staticmethod(read_counter)
        frame = staticmethod(counter_frame)

    return Counter


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of H.264 at 30 fps with B-frames, a keyframe every 12."""
    return write_counter(tmp_path_factory.mktemp("plain") / "plain.mp4", bframes=2)


@pytest.fixture(scope="session")
def geometry() -> Any:
    from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry

    return VideoGeometry(14, 2, 2, CLIP_MEAN, CLIP_STD)
