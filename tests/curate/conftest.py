"""Videos with hard cuts between patterned places of far apart colours, with a block that moves inside each shot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# (dark tone, light tone) of a place: their order of brightness alternates, so that every cut is a strong one.
PLACES = [
    ((150, 20, 20), (250, 140, 60)), ((10, 60, 20), (60, 130, 50)), ((40, 60, 200), (120, 200, 250)),
    ((50, 10, 60), (110, 40, 110)), ((190, 180, 60), (250, 250, 190)), ((10, 50, 70), (30, 100, 110)),
]  # fmt: skip


def place_frame(place: int, t: float, height: int = 80, width: int = 96) -> np.ndarray:
    """uint8 [H, W, 3]: vertical bars of a place's two tones, and a grey block at t (0..1) of its way."""
    dark, light = PLACES[place]
    bars = (np.arange(width) // 12 + place) % 2 == 0
    frame = np.where(bars[None, :, None], np.uint8(light), np.uint8(dark)) * np.ones((height, 1, 1), np.uint8)
    x = int(t * (width - 14))
    frame[height // 2 - 6 : height // 2 + 6, x : x + 12] = 128
    return frame


def write_shots(path: Path, shots: Sequence[tuple[int, int]], rate: int = 12, size: tuple[int, int] = (80, 96)) -> Path:
    """Encode (place, frames) shots of ``size`` (height, width); place -1 is a black screen."""

    def images() -> Iterator[np.ndarray]:
        for place, n in shots:
            for i in range(n):
                dark = np.zeros((*size, 3), np.uint8)
                yield dark if place < 0 else place_frame(place, i / max(n - 1, 1), *size)

    return write_images(path, images(), rate)


def write_images(path: Path, images: Iterable[np.ndarray], rate: int = 12, crf: int = 18) -> Path:
    """Encode pictures, uint8 [H, W, 3] RGB; without loss of brightness at ``crf`` 0."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "ultrafast"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for i, image in enumerate(images):
            if i == 0:
                stream.height, stream.width = image.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def film() -> Any:
    class Film:
        write = staticmethod(write_shots)
        write_images = staticmethod(write_images)
        frame = staticmethod(place_frame)

    return Film
