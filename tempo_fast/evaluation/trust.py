"""Does the reward follow what can be trusted? LeanPO's reward of an answer is its mean log-probability
(arXiv 2506.05260), and its data is meant to make answers likelier the nearer they are to the truth.

The pairs carry how near (``provenance["scores"]``, points of a metric against the reference); here a model adds how
likely, and Spearman's correlation says how far the two agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tempo_fast.evaluation.scoring import score
from tempo_fast.models.load import Bundle
from tempo_fast.schema import PreferenceRecord
from tempo_fast.stats import Stat


def add_rewards(
    bundle: Bundle, reader: Any, features: Any, records: Sequence[PreferenceRecord]
) -> list[PreferenceRecord]:
    """The records with ``provenance["rewards"]``: the mean log-probability per token (nats, the end of the turn
    counted) of ``chosen`` and of each of ``rejected``, about the whole video and the record's own prompt.

    Args:
        bundle: model (adapters that are on take part), tokenizer and family.
        reader, features: VideoReader and FeatureCache.

    Raises:
        DecodeError: a video cannot be read.
    """
    by_video: dict[str, list[int]] = {}
    for k, record in enumerate(records):
        by_video.setdefault(record.video, []).append(k)
    out: list[Any] = [None] * len(records)
    for video, places in by_video.items():
        asked = [(records[k].prompt, [records[k].chosen, *(x.text for x in records[k].rejected)]) for k in places]
        for k, found in zip(places, score(bundle, reader, features, [reader.plan(video)], asked), strict=True):
            chosen, *rejected = (round(s.mean, 6) for s in found)
            rewards = {"model": bundle.digest, "chosen": chosen, "rejected": rejected}
            out[k] = replace(records[k], provenance={**records[k].provenance, "rewards": rewards})
    return out


def trust_reward_correlation(records: Sequence[PreferenceRecord], *, resamples: int = 1000, seed: int = 0) -> Stat:
    """Spearman's rank correlation of reward and metric over the answers of all records, chosen and rejected.

    Args:
        records: as ``add_rewards`` returns them. Records without scores or rewards, and answers whose metric could not
            tell, are left out.
        resamples: whole records are drawn so often, with replacement, for the interval.
        seed: of these draws.

    Returns:
        {"value", "lo", "hi": 2.5 % and 97.5 % percentile, "n": records, "items": answers}; value, lo and hi are None
        where reward or metric do not vary, or there are fewer than two answers.
    """
    groups: list[list[tuple[float, float]]] = []
    for record in records:
        rewards, points = record.provenance.get("rewards"), record.provenance.get("scores")
        if rewards is None or points is None:
            continue
        both = zip([rewards["chosen"], *rewards["rejected"]], [points["chosen"], *points["rejected"]], strict=True)
        group = [(reward, metric) for reward, metric in both if metric is not None]
        if group:
            groups.append(group)
    pairs = np.array([pair for group in groups for pair in group], dtype=np.float64).reshape(-1, 2)
    value = spearman(pairs[:, 0], pairs[:, 1])
    out: Stat = {"value": value, "lo": None, "hi": None, "n": len(groups), "items": len(pairs)}
    if value is None:
        return out
    ends = np.cumsum([len(group) for group in groups])
    starts = ends - [len(group) for group in groups]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(resamples):
        picked = rng.integers(len(groups), size=len(groups))
        rows = np.concatenate([np.arange(starts[k], ends[k]) for k in picked])
        one = spearman(pairs[rows, 0], pairs[rows, 1])
        if one is not None:
            drawn.append(one)
    if drawn:
        out["lo"], out["hi"] = (float(x) for x in np.percentile(drawn, [2.5, 97.5]))
    return out


def spearman(a: Any, b: Any) -> float | None:
    """Pearson's correlation of the ranks of two float arrays [n], equal values sharing their mean rank; None where one
    of them does not vary."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean() if len(x) else x, y - y.mean() if len(y) else y
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(np.clip(x @ y / size, -1.0, 1.0)) if size > 0 else None


def _ranks(values: Any) -> Any:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
