"""The two frames that stand for a clip: sharp ones near its thirds.

Rules as coded by the TEMPLE authors (lscpku/TEMPLE: ``preprocess.py:extract_frames``, ``tools/laplacian.py``).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def sharpness(frame: np.ndarray) -> float:
    """Mean absolute Laplacian (ksize 3) of the Gaussian-blurred (3 x 3) picture in grey, of uint8 [H, W, 3] RGB.

    As ``tools/laplacian.py``: each pixel's value ends at 255, so that a few hard edges do not outweigh the rest.
    """
    import cv2

    grey = cv2.cvtColor(cv2.GaussianBlur(np.ascontiguousarray(frame), (3, 3), 0), cv2.COLOR_RGB2GRAY)
    return float(cv2.mean(cv2.convertScaleAbs(cv2.Laplacian(grey, cv2.CV_16S, ksize=3)))[0])


def windows(start: int, end: int, n: int = 2) -> list[range]:
    """The frames among which the keyframes of the clip [start, end) are looked for: around its points
    int(start + k * length / (n + 1)), half an interval to both sides, whole frames only, the last one left out.

    In a clip of fewer than 2 * (n + 1) frames, the points themselves; they may coincide.
    """
    interval = (end - start) / (n + 1)
    half = int(interval) // 2
    centres = [int(start + k * interval) for k in range(1, n + 1)]
    return [range(c - half, c + half) if half else range(c, c + 1) for c in centres]


def keyframes(start: int, end: int, scores: Mapping[int, float], n: int = 2) -> list[int]:
    """n frame numbers of the clip [start, end), each in its window (see ``windows``): the largest score x cosine,
    the cosine being 0 where the window begins and 1 in its middle. Equal ones: the first.

    Unlike the authors', a window in which every score is 0 (a flat picture) gives its middle, not its first frame.

    Args:
        scores: sharpness of the frames of the windows, by frame number.

    Returns:
        Ascending; fewer than n where the windows of a very short clip coincide.
    """
    chosen = []
    for window in windows(start, end, n):
        half = len(window) // 2
        cosine = np.cos(np.pi * np.arange(-half, len(window) - half) / max(2 * half, 1))
        weight = np.array([scores[i] for i in window], dtype=np.float64) * cosine
        chosen.append(window[int(weight.argmax())] if weight.any() else window[half])
    return sorted(set(chosen))
