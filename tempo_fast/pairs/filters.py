"""Which pairs are kept, and what the audit says of them.

The official filters (TEMPLE's ``convert_to_swift.py``): a dropped answer must be shorter than the chosen one, the
chosen answer must not be a part of the rejected one, and a shuffled or reversed answer must be of like length.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from tempo_fast.schema import Rejected


def reject_reason(chosen: str, rejected: str, kind: str, max_length_ratio: float) -> str | None:
    """Why a pair is no pair, in a word for the audit, or None when it is one. Lengths are in characters."""
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
    """Counts and sums of one (r, kind); those of several buckets add up."""

    made: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, chosen: str, rejected: Rejected) -> None:
        """A pair that was made."""
        self.made += 1
        self.measure(
            {
                "length_ratio": len(rejected.text) / len(chosen),
                "similarity": similarity(chosen, rejected.text),
                "broken": rejected.broken,
                "kept": rejected.kept,
            }
        )

    def measure(self, values: Mapping[str, float]) -> None:
        """Add to the mean of each name."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def merge(self, other: Tally) -> None:
        """Add another tally to this one."""
        self.made += other.made
        self.filtered.update(other.filtered)
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + other.counts[name]

    def row(self) -> dict[str, Any]:
        """JSON: counts, and means over the pairs made (null when there are none)."""
        names = dict.fromkeys(["length_ratio", "similarity", "broken", "kept", *self.sums])
        means = {n: round(self.sums[n] / self.counts[n], 4) if self.counts.get(n) else None for n in names}
        return {"made": self.made, "filtered": {r: self.filtered[r] for r in sorted(+self.filtered)}, **means}


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
