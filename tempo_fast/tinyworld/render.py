"""Pixels of a film, and its H.264 file.

Shape legend: F frames, H height, W width; frames are uint8 [F, H, W, 3] RGB.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from tempo_fast.tinyworld.world import (
    COLOURS,
    FPS,
    SCENES,
    Clip,
    Event,
    Film,
    Shot,
    Tone,
    light_mask,
)

RADIUS = 20.0
OUTLINE = 2
TICKS = 600  # ticks per second of the stream, 50 per frame
AUDIO_RATE = 22050
# the look-ahead of x264 makes its output differ from run to run on frames this small
X264 = {"crf": "18", "preset": "veryfast", "g": "24", "bf": "2", "x264-params": "rc-lookahead=0:mbtree=0"}


def _rgb(tone: Tone) -> tuple[int, int, int]:
    r, g, b = colorsys.hsv_to_rgb(tone.hue / 180, tone.saturation / 255, tone.value / 255)
    return round(r * 255), round(g * 255), round(b * 255)


@lru_cache(maxsize=256)
def background(scene: int, view: int, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3], shared: do not write into it."""
    place = SCENES[scene]
    mask = light_mask(place.pattern, view, height, width)[..., None]
    return np.where(mask, np.array(_rgb(place.light), np.uint8), np.array(_rgb(place.dark), np.uint8))


@lru_cache(maxsize=4096)
def _sprite(shape: str, half_radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage (0..1) of a shape and of its outline; `half_radius` counts half pixels. Four samples per pixel side."""
    radius = half_radius / 2
    size = int(np.ceil(radius)) + OUTLINE + 1
    axis = (np.arange(-size * 4, size * 4 + 4) + 0.5 - 2) / 4
    y, x = np.meshgrid(axis, axis, indexing="ij")

    def inside(r: float) -> np.ndarray:
        grow = r - radius
        if shape == "circle":
            return x**2 + y**2 <= r**2
        if shape == "square":
            return np.maximum(abs(x), abs(y)) <= r * 0.88
        if shape == "triangle":
            return (y <= radius * 0.8 + grow) & (y >= -r + 2 * abs(x) * 0.95 - 1.2 * grow)
        if shape == "ring":
            d = np.sqrt(x**2 + y**2)
            return (d <= r) & (d >= max(0.0, radius * 0.55 - grow))
        arm = radius * 0.3 + grow
        return (np.minimum(abs(x), abs(y)) <= arm) & (np.maximum(abs(x), abs(y)) <= r)

    def coverage(mask: np.ndarray) -> np.ndarray:
        n = 2 * size + 1
        return mask[: 4 * n, : 4 * n].reshape(n, 4, n, 4).mean((1, 3), dtype=np.float32)

    return coverage(inside(radius)), coverage(inside(radius + OUTLINE))


def state(event: Event, shot: Shot, t: float, height: int, width: int) -> tuple[float, float, float] | None:
    """Centre and radius of the object at progress t (0..1) of its shot, or None while it is absent."""
    x, y, radius = shot.x * width, shot.y * height, RADIUS * shot.scale
    travel = (t - 0.5) * 58 * shot.reach
    if event.action in ("left", "right"):
        x = width / 2 + (shot.x - 0.5) * 30 + (travel if event.action == "right" else -travel)
    elif event.action in ("up", "down"):
        y = height / 2 + (shot.y - 0.5) * 30 + (travel if event.action == "down" else -travel)
    elif event.action in ("grow", "shrink"):
        s = t if event.action == "grow" else 1 - t
        radius *= 0.55 + 0.9 * s * min(1.0, shot.reach)
    elif (t >= shot.turn) == (event.action == "disappear"):
        return None
    return x, y, radius


def draw(clip: Clip, shot: Shot, t: float, height: int, width: int) -> np.ndarray:
    """One frame uint8 [H, W, 3] of a shot at progress t."""
    frame = background(clip.scene, shot.view, height, width).copy()
    where = state(clip.event, shot, t, height, width)
    if where is None:
        return frame
    x, y, radius = where
    fill, edge = _sprite(clip.event.shape, round(radius * 2))
    n = fill.shape[0]
    top, left = round(y) - n // 2, round(x) - n // 2
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + n, height), min(left + n, width)
    if y0 >= y1 or x0 >= x1:
        return frame
    crop = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    f, e = fill[crop][..., None], edge[crop][..., None]
    patch = frame[y0:y1, x0:x1].astype(np.float32)
    patch = patch * (1 - e) + 12.0 * (e - f) + np.array(COLOURS[clip.event.colour], np.float32) * f
    frame[y0:y1, x0:x1] = np.clip(patch + 0.5, 0, 255).astype(np.uint8)
    return frame


def frames(film: Film, indices: Sequence[int]) -> np.ndarray:
    """uint8 [F, H, W, 3]: the film's frames at these indices, as the encoder gets them."""
    takes = [(clip, shot) for clip in film.clips for shot in clip.shots]
    ends = np.cumsum([shot.n_frames for _, shot in takes])
    out = np.empty((len(indices), film.height, film.width, 3), np.uint8)
    for row, index in enumerate(indices):
        k = int(np.searchsorted(ends, index, side="right"))
        clip, shot = takes[k]
        t = (index - (ends[k] - shot.n_frames)) / (shot.n_frames - 1)
        out[row] = draw(clip, shot, float(t), film.height, film.width)
    return out


def timestamps(film: Film, seed: int) -> list[int]:
    """Presentation time of every frame in ticks of 1/600 s; uneven for the variable-frame-rate variant."""
    step = TICKS // FPS
    pts = np.arange(film.n_frames) * step
    if film.variant == "vfr":
        shift = np.random.default_rng([seed, 11]).integers(-step // 3, step // 3 + 1, film.n_frames)
        shift[0] = 0
        pts = pts + shift
    return [int(p) for p in pts]


def encode(film: Film, path: Path, seed: int = 0) -> list[int]:
    """Write the film as an H.264 MP4 (one thread, so that bytes repeat), atomically; returns the timestamps."""
    import av

    pts = timestamps(film, seed)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.mp4")
    try:
        with av.open(str(temporary), "w", options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream("libx264", rate=FPS, options=X264)
            stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
            stream.codec_context.thread_count = 1
            stream.time_base = stream.codec_context.time_base = Fraction(1, TICKS)
            audio = container.add_stream("aac", rate=AUDIO_RATE, layout="mono") if film.variant == "audio" else None
            pictures = frames(film, range(film.n_frames))
            for picture, when in zip(pictures, pts, strict=True):
                planes = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p").to_ndarray()
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                frame.pts, frame.time_base = when, Fraction(1, TICKS)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
            if audio is not None:
                _add_sound(container, audio, film, seed)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return pts


def _add_sound(container, audio, film: Film, seed: int) -> None:
    """A note per clip: enough to make the file have a sound track."""
    import av

    rng = np.random.default_rng([seed, 12])
    notes = [np.full(clip.n_frames * AUDIO_RATE // FPS, rng.uniform(220, 660)) for clip in film.clips]
    wave = 0.2 * np.sin(2 * np.pi * np.cumsum(np.concatenate(notes)) / AUDIO_RATE)
    for start in range(0, len(wave), 1024):
        block = wave[start : start + 1024].astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = AUDIO_RATE, start, Fraction(1, AUDIO_RATE)
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
