"""Shares with 95 % intervals over videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Stat = dict[str, Any]


def bootstrap(hits: Sequence[float], counts: Sequence[float], resamples: int, seed: int) -> Stat:
    """sum(hits) / sum(counts) with its percentile interval, resampling whole videos with replacement.

    Args:
        hits: one number per video: correct answers, or the video's own score.
        counts: one number per video: questions asked, or 1. Videos with count 0 are left out.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        {"value", "lo", "hi": 2.5 % and 97.5 % percentile, "n": videos, "items": sum of counts}; value, lo and hi are
        None when no video counts.
    """
    pairs = np.array([(h, c) for h, c in zip(hits, counts, strict=True) if c > 0], dtype=np.float64).reshape(-1, 2)
    n = len(pairs)
    if n == 0:
        return {"value": None, "lo": None, "hi": None, "n": 0, "items": 0}
    value = pairs[:, 0].sum() / pairs[:, 1].sum()
    # a video's weight is how often it is drawn: one small matrix product instead of n * resamples numbers
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    sums = weights @ pairs
    lo, hi = np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5])
    items = float(pairs[:, 1].sum())
    return {"value": float(value), "lo": float(lo), "hi": float(hi), "n": n, "items": int(items)}
