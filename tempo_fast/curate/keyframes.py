"""The two frames that stand for a clip: sharp ones near its thirds (TEMPLE: ``extract_frames``, ``laplacian.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sharpness(grey: np.ndarray) -> float:
    """Mean absolute Laplacian (ksize 3) of the Gaussian-blurred (3 x 3) grey picture, uint8 [H, W]."""
    import cv2

    blurred = cv2.GaussianBlur(grey, (3, 3), 0)
    return float(cv2.norm(cv2.Laplacian(blurred, cv2.CV_16S, ksize=3), cv2.NORM_L1)) / grey.size


def keyframes(start: int, end: int, scores: Sequence[float], n: int = 2) -> list[int]:
    """n frame numbers of the clip [start, end), around its points k / (n + 1).

    Each is the frame with the largest score x cosine window, the window reaching half an interval (clip length /
    (n + 1)) to both sides; with equal scores the frame nearest to the point. Clips too short for n frames give fewer.

    Args:
        scores: sharpness of every frame of the video.
    """
    interval = (end - start) / (n + 1)
    chosen: list[int] = []
    for k in range(1, n + 1):
        centre = start + k * interval
        frames = np.arange(max(start, int(np.ceil(centre - interval / 2))), min(end, int(centre + interval / 2) + 1))
        frames = frames[[int(f) not in chosen for f in frames]] if len(frames) else frames
        if not len(frames):  # a clip of a few frames: the nearest one that is left
            rest = [f for f in range(start, end) if f not in chosen]
            if rest:
                chosen.append(rest[int(np.abs(np.array(rest) - centre).argmin())])
            continue
        window = np.cos(np.pi * (frames - centre) / interval).clip(0)
        # The small constant lets the window decide in a flat clip.
        weight = (np.array([scores[int(f)] for f in frames], dtype=np.float64) + 1e-6) * window
        chosen.append(int(frames[int(weight.argmax())]))
    return sorted(chosen)
