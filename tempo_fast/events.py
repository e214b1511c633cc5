"""What two tellings of the same events have in common: which events, and their order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def matched_order(told: Sequence[Hashable], true: Sequence[Hashable]) -> list[int]:
    """Indices into ``true`` of the events of ``told`` that match, in the order told; of equal ones the k-th told is
    the k-th true one."""
    places: dict[Hashable, list[int]] = {}
    for i, event in enumerate(true):
        places.setdefault(event, []).append(i)
    return [places[e].pop(0) for e in told if places.get(e)]


def kendall_tau(order: Sequence[int]) -> float | None:
    """(concordant - discordant) / all pairs of distinct numbers; None for fewer than two."""
    n = len(order)
    if n < 2:
        return None
    concordant = sum(order[i] < order[j] for i in range(n) for j in range(i + 1, n))
    pairs = n * (n - 1) // 2
    return (2 * concordant - pairs) / pairs
