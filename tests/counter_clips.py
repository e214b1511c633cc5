"""Counter clips: every frame shows its own number and which way is up, so that a wrong frame is seen from its pixels.

A number is 12 bits; a bit is a bright block above a dark one, or the other way round. Numbers are read back from any
size and colour conversion, and a frame that shows none raises. The upper left quarter is tinted red.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

BITS = 12
_RED = ((60, 0, 0), (250, 220, 220))  # as dark and as bright as the blocks without a tint


def counter_frame(number: int, height: int = 64, width: int = 192) -> np.ndarray:
    """uint8 [H, W, 3]: one column of two blocks per bit, over a texture that moves (where the columns do not reach)."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([(x + 3 * number) % 256, (y * 2 + number) % 256, (x + y) % 256], -1).astype(np.uint8)
    block, half = width // BITS, height // 2
    for bit in range(BITS):
        on = number >> bit & 1
        frame[:half, bit * block : (bit + 1) * block] = 230 if on else 20
        frame[half:, bit * block : (bit + 1) * block] = 20 if on else 230
        if bit < BITS // 2:
            frame[:half, bit * block : (bit + 1) * block] = _RED[on]
    return frame


def number_of(frame: torch.Tensor) -> int | None:
    """uint8 [H, W, 3] -> the number shown, None where a bit is not beside its inverse."""
    grey = frame.float().mean(-1).cpu()
    half, block = grey.shape[0] // 2, grey.shape[1] // BITS
    number = 0
    for bit in range(BITS):
        column = grey[:, bit * block + 2 : (bit + 1) * block - 2]
        top, bottom = float(column[: half - 2].mean()), float(column[half + 2 :].mean())
        if abs(top - bottom) <= 80:
            return None
        number |= int(top > bottom) << bit
    return number


def read_counter(frames: torch.Tensor) -> list[int]:
    """uint8 [F, H, W, 3] -> the numbers shown."""
    out = []
    for frame in frames:
        number = number_of(frame)
        assert number is not None, "this frame shows no number"
        out.append(number)
    return out


def upright(frames: torch.Tensor) -> bool:
    """Whether each of uint8 [F, H, W, 3] has its red quarter, and nothing else red, at the upper left."""
    red = frames[..., 0].float() - frames[..., 1].float()
    h, w = red.shape[1] // 2, red.shape[2] // BITS * (BITS // 2)
    rows, columns = (slice(0, h), slice(h, None)), (slice(0, w), slice(w, 2 * w))
    quarters = [red[:, y, x].mean((1, 2)) for y in rows for x in columns]
    return bool((quarters[0] > 20).all()) and all(bool((q.abs() < 10).all()) for q in quarters[1:])


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
    number: Callable[[int], int] = lambda i: i,
) -> Path:
    """Encode n frames; ``pts`` in 1/600 s; ``turn`` is applied to what is stored; frame i shows ``number(i)``."""
    import av

    options = {"g": str(gop), **(options or {})}
    if codec == "libx264":
        options |= {"bf": str(bframes), "preset": "ultrafast" if not bframes else "veryfast", "crf": "20"}
    if codec == "libx265":
        params = f"log-level=none:bframes={bframes}:keyint={gop}:min-keyint={gop}"
        options = {"preset": "veryfast" if bframes else "ultrafast", "x265-params": params, **options}
    if codec in ("libvpx", "libvpx-vp9"):
        options = {"deadline": "realtime", "cpu-used": "8", **options}
    if codec == "libsvtav1":
        options = {"preset": "8", "crf": "30", **options}  # faster ones lose whole blocks of pictures this small
    times = [i * 600 // rate for i in range(n)] if pts is None else list(pts)
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options)
        first = turn(counter_frame(0, *size))
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], pix_fmt
        stream.codec_context.thread_count = 1
        stream.time_base = stream.codec_context.time_base = Fraction(1, 600)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        sound_codec, hertz, block = ("libopus", 48000, 960) if path.suffix == ".webm" else ("aac", 22050, 1024)
        sound = file.add_stream(sound_codec, rate=hertz, layout="mono") if audio else None
        for i, when in enumerate(times):
            image = np.ascontiguousarray(turn(counter_frame(number(i), *size)))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = when, Fraction(1, 600)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            for start in range(0, hertz * n // rate, block):
                wave = np.sin(np.arange(start, start + block) / 9).astype(np.float32)[None]
                part = av.AudioFrame.from_ndarray(wave, format="fltp" if hertz == 22050 else "flt", layout="mono")
                part.sample_rate, part.pts, part.time_base = hertz, start, Fraction(1, hertz)
                file.mux(sound.encode(part))
            file.mux(sound.encode(None))
    return path


def hide_first(path: Path, frames: int, rate: int = 30) -> Path:
    """Let an MP4's edit list start so many frames later: their packets stay in the file and are not to be shown."""
    import av

    with av.open(str(path)) as file:
        ticks = round(1 / rate / file.streams.video[0].time_base)
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    assert int.from_bytes(data[at + 4 : at + 8], "big") == 1
    media_time = int.from_bytes(data[at + 12 : at + 16], "big", signed=True)
    data[at + 12 : at + 16] = (media_time + frames * ticks).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


def hide_last(path: Path, seconds: float) -> Path:
    """Let an MP4's edit list end so much earlier."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    shorter = int.from_bytes(data[at : at + 4], "big") - round(seconds * 1000)
    data[at : at + 4] = shorter.to_bytes(4, "big")
    path.write_bytes(data)
    return path


# name -> (display matrix a b c d, what to store so that the picture stands upright, degrees clockwise, mirrored)
TURNS: dict[str, tuple[list[int], Callable[[np.ndarray], np.ndarray], int, bool]] = {
    "upright": ([1, 0, 0, 1], lambda f: f, 0, False),
    "clockwise": ([0, 1, -1, 0], lambda f: np.rot90(f, 1), 90, False),
    "half": ([-1, 0, 0, -1], lambda f: np.rot90(f, 2), 180, False),
    "counterclockwise": ([0, -1, 1, 0], lambda f: np.rot90(f, -1), 270, False),
    "mirrored": ([-1, 0, 0, 1], lambda f: f[:, ::-1], 0, True),
    "upside_down": ([1, 0, 0, -1], lambda f: f[::-1], 0, True),
    "mirrored_turn": ([0, 1, 1, 0], lambda f: f.transpose(1, 0, 2), 90, True),
}


def turned(name: str) -> dict[str, Any]:
    """``write_counter``'s arguments for one of ``TURNS``: a b u, c d v, x y w in 16.16 and 2.30."""
    (a, b, c, d), store, _, _ = TURNS[name]
    return {"matrix": [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], "turn": store}
