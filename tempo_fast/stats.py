"""Shares with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Stat = dict[str, Any]

_Z = 1.959964  # the normal distribution's 97.5 % quantile


def share_interval(k: int, n: int) -> Stat:
    """k / n with Wilson's 95 % score interval, which stays inside [0, 1] and is no point at k = 0 and k = n.

    For independent trials: one per video. (Wilson, Journal of the American Statistical Association 22, 1927.)

    Returns:
        {"value", "lo", "hi", "n"}; value, lo and hi are None for n = 0.

    Raises:
        ValueError: not 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n, got k={k}, n={n}")
    if n == 0:
        return {"value": None, "lo": None, "hi": None, "n": 0}
    p, z2 = k / n, _Z**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return {"value": p, "lo": max(0.0, min(p, middle - half)), "hi": min(1.0, max(p, middle + half)), "n": n}


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
    import numpy as np  # the intervals above are needed where numpy is not

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
