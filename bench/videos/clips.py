"""The clips of the video bench, made once: a moving view of a textured wall, moving light, grain and shapes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

GRAIN = 3.0
"""Standard deviation of the noise laid over every frame, in grey levels."""
LOOK = 1
"""Counts up when the pictures or the encoders' settings change, so that no old file stands for a new one."""


@dataclass(frozen=True)
class Clip:
    """What a file holds. ``gop`` frames from keyframe to keyframe; ``bitrate`` asked of the encoder, bit/s."""

    codec: str
    gop: int
    seconds: float = 60.0
    width: int = 1280
    height: int = 720
    fps: int = 30
    bitrate: int = 1_500_000

    @property
    def name(self) -> str:
        return f"{self.codec}_gop{self.gop}"

    @property
    def frames(self) -> int:
        return round(self.seconds * self.fps)

    @property
    def keyframes(self) -> range:
        return range(0, self.frames, self.gop)

    def must_decode(self, indices: list[int]) -> int:
        """Frames that a decoder has to go through for these: each from the keyframe before it, none of them twice."""
        return len({j for i in indices for j in range(i - i % self.gop, i + 1)})

    def make(self, folder: Path) -> Path:
        """The file in ``folder``, written when it is not there; complete or absent."""
        size = f"{self.width}x{self.height}_{self.seconds:g}s_{self.fps}fps_{self.bitrate // 1000}k"
        path = folder / f"{self.name}_{size}_{LOOK}.mp4"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.mp4")
            _encode(self, part)
            part.replace(path)
        return path


CLIPS = {clip.name: clip for clip in (Clip("h264", 250), Clip("h264", 48), Clip("vp9", 250))}
_ENCODERS = {
    # no keyframe but the asked-for ones; the rest as the preset has it: three B-frames, CABAC, deblocking
    "h264": ("libx264", {"preset": "faster", "sc_threshold": "0"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "tile-columns": "2"}),
}


def _encode(clip: Clip, path: Path) -> None:
    encoder, options = _ENCODERS[clip.codec]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(encoder, rate=Fraction(clip.fps))
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.bit_rate, stream.gop_size = clip.bitrate, clip.gop
        stream.options = {**options, "keyint_min": str(clip.gop)}
        for picture in pictures(clip):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        out.mux(stream.encode(None))


def pictures(clip: Clip) -> Iterator[np.ndarray]:
    """Planes of YUV 4:2:0, uint8 [height * 3 / 2, width], in order; the same ones at every call."""
    rng = np.random.default_rng(0)
    h, w = clip.height, clip.width
    grain = rng.normal(0, GRAIN, (8, h, w)).round().clip(-12, 12).astype(np.int8).view(np.uint8)  # sums wrap around
    scene = _Scene(rng, h, w)
    for n in range(clip.frames):
        t = n / clip.fps
        luma = scene.luma(t) + grain[rng.integers(len(grain))]
        yield np.concatenate([luma, scene.chroma(t).reshape(h // 2, w)])


class _Scene:
    """A textured wall larger than the picture, a camera that pans over it, moving light, and shapes before it."""

    def __init__(self, rng: np.random.Generator, h: int, w: int) -> None:
        self.h, self.w = h, w
        self.margin = max(2, h // 4 // 2 * 2)
        tall, wide = h + self.margin, w + self.margin
        wall = sum(_noise(rng, tall, wide, cell) * 6 * cell**0.4 for cell in (2, 5, 16, 64))
        self.wall = (120 + wall).clip(60, 190).astype(np.uint8)
        self.colour = np.stack([_noise(rng, tall // 2, wide // 2, 40) * 14 for _ in range(2)]) + 128
        self.colour = self.colour.clip(16, 240).astype(np.uint8)
        self.light = np.linspace(0, 2 * np.pi, w, dtype=np.float32)
        self.phase, self.turn = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.6)
        self.angle = rng.uniform(0, 2 * np.pi)
        self.shapes = [
            (rng.uniform(0.1, 0.9, 2), rng.uniform(-0.15, 0.15, 2), int(h * rng.uniform(0.05, 0.15)) + 2,
             int(rng.integers(40, 220)), rng.integers(40, 215, 2), bool(rng.integers(2)))
            for _ in range(5)
        ]  # fmt: skip

    def _corner(self, t: float) -> tuple[int, int]:
        """Of the picture on the wall: an even number of rows and columns."""
        down, right = np.sin(self.angle + 0.5 * t), np.cos(self.angle + 0.35 * t)
        return int(self.margin / 4 * (1 + down)) * 2, int(self.margin / 4 * (1 + right)) * 2

    def luma(self, t: float) -> np.ndarray:
        """uint8 [h, w], at least 12 grey levels inside the limited range."""
        y, x = self._corner(t)
        light = (30 * np.sin(self.light + self.phase + self.turn * t)).astype(np.int8).view(np.uint8)
        out = self.wall[y : y + self.h, x : x + self.w] + light
        for rows, columns, inside, grey, _ in self._placed(t, 1):
            out[rows, columns][inside] = grey
        return out

    def chroma(self, t: float) -> np.ndarray:
        """uint8 [2, h / 2, w / 2]."""
        y, x = (v // 2 for v in self._corner(t))
        out = self.colour[:, y : y + self.h // 2, x : x + self.w // 2].copy()
        for rows, columns, inside, _, hue in self._placed(t, 2):
            for plane in range(2):
                out[plane, rows, columns][inside] = hue[plane]
        return out

    def _placed(self, t: float, step: int) -> Iterator[tuple[slice, slice, np.ndarray, int, np.ndarray]]:
        """Window and mask of each shape in a plane of every ``step``-th pixel, its grey and its hue."""
        h, w = self.h // step, self.w // step
        for at, speed, radius, grey, hue, round_ in self.shapes:
            r = max(1, radius // step)
            y, x = ((at + speed * t) % 1 * (h, w)).astype(int)
            top, left = max(0, y - r), max(0, x - r)
            rows, columns = slice(top, min(h, y + r)), slice(left, min(w, x + r))
            dy = np.arange(rows.start, rows.stop)[:, None] - y
            dx = np.arange(columns.start, columns.stop)[None] - x
            inside = dy**2 + dx**2 < r**2 if round_ else np.maximum(abs(dy), abs(dx)) < r
            yield rows, columns, inside, grey, hue


def _noise(rng: np.random.Generator, h: int, w: int, cell: int) -> np.ndarray:
    """Smooth noise float32 [h, w] of unit variance at its knots, ``cell`` pixels apart, linear between them."""
    knots = rng.standard_normal((h // cell + 2, w // cell + 2), dtype=np.float32)

    def lines(n: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(n, dtype=np.float32) / cell
        return at.astype(int), (at % 1).astype(np.float32)

    rows, y = lines(h)
    columns, x = lines(w)
    tall = knots[rows] * (1 - y[:, None]) + knots[rows + 1] * y[:, None]
    return tall[:, columns] * (1 - x) + tall[:, columns + 1] * x
