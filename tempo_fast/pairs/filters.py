"""Which pairs are kept, and what the audit says of them.

The official filters (TEMPLE's ``convert_to_swift.py``): a dropped answer must be shorter than the chosen one, the
chosen answer must not be a part of the rejected one, and a shuffled or reversed answer must be of like length.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from tempo_fast.schema import Rejected

REASONS = (
    "identity",
    "empty",
    "equal_to_chosen",
    "drop_not_shorter",
    "chosen_in_rejected",
    "length_ratio",
    "duplicate",
    "video_failed",
)


def reject_reason(chosen: str, rejected: str, kind: str, max_length_ratio: float) -> str | None:
    """Why a pair is no pair, one of REASONS, or None when it is one. Lengths are in characters."""
    if not rejected.strip():
        return "empty"
    if rejected == chosen:
        return "equal_to_chosen"
    if kind == "drop" and len(chosen) <= len(rejected):
        return "drop_not_shorter"
    if chosen in rejected:
        return "chosen_in_rejected"
    ratio = max(len(chosen), len(rejected)) / max(1, min(len(chosen), len(rejected)))
    if kind != "drop" and ratio > max_length_ratio:
        return "length_ratio"
    return None


def similarity(a: str, b: str) -> float:
    """2 * matching words / all words, words matched in order (difflib), in [0, 1]."""
    return SequenceMatcher(None, a.split(), b.split(), autojunk=False).ratio()


@dataclass
class Tally:
    """Counts and means of one (r, kind)."""

    made: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    length_ratio: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    broken: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)

    def add(self, chosen: str, rejected: Rejected) -> None:
        self.made += 1
        self.length_ratio.append(len(rejected.text) / len(chosen))
        self.similarity.append(similarity(chosen, rejected.text))
        self.broken.append(rejected.broken)
        self.kept.append(rejected.kept)

    def row(self) -> dict[str, Any]:
        """JSON: counts, and means over the pairs made (null when there are none)."""

        def mean(values: Sequence[float]) -> float | None:
            return round(sum(values) / len(values), 4) if values else None

        return {
            "made": self.made,
            "filtered": {r: self.filtered[r] for r in REASONS if self.filtered[r]},
            "length_ratio": mean(self.length_ratio),
            "similarity": mean(self.similarity),
            "broken": mean(self.broken),
            "kept": mean(self.kept),
        }


def coinciding(n_clips: Sequence[int], rs: Sequence[int]) -> list[dict[str, Any]]:
    """Difficulties that are the same perturbation for some videos: max(1, n // r) is equal.

    Returns:
        [{"r": [16, 8], "videos": how many, "of": all}], pairs of r without such a video left out.
    """
    out = []
    for a, b in itertools.combinations(sorted(set(rs), reverse=True), 2):
        same = sum(max(1, n // a) == max(1, n // b) for n in n_clips)
        if same:
            out.append({"r": [a, b], "videos": same, "of": len(n_clips)})
    return out
