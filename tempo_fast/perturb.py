"""Temporal perturbations as index arithmetic on clips: the same function on every backend.

Rules as coded by the TEMPLE authors (arXiv 2503.16929, ``generator_base.py``): with n clips and difficulty r,
``drop`` keeps max(1, n // r) random clips in order; ``shuffle`` and ``reverse`` cut the sequence into consecutive
groups of max(1, n // r) clips and permute, or reverse, the groups. Large r is a heavy corruption, hence an easy pair.

One deliberate difference: a draw that leaves the sequence of labels unchanged is no perturbation and is redrawn
(the authors keep it; at r = 2 and even n that is every second shuffle).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

KINDS = ("drop", "shuffle", "reverse")


@dataclass(frozen=True)
class ClipOrder:
    """Which clips are shown, in which order.

    ``order`` holds indices into the n original clips. ``broken`` is the share of adjacent original pairs (i, i+1) that
    no longer follow one another, in [0, 1]; ``kept`` the share of clips kept, in (0, 1].
    """

    n: int
    order: tuple[int, ...]
    kind: str
    r: int
    seed: int

    @property
    def broken(self) -> float:
        return broken_adjacencies(self.n, self.order)

    @property
    def kept(self) -> float:
        return len(self.order) / self.n

    def apply(self, items: Sequence) -> list:
        """The items in perturbed order."""
        return [items[i] for i in self.order]


def broken_adjacencies(n: int, order: Sequence[int]) -> float:
    """Share of the n - 1 original adjacencies that ``order`` does not contain; 0 for n = 1."""
    if n < 2:
        return 0.0
    intact = {(a, b) for a, b in itertools.pairwise(order) if b == a + 1}
    return 1.0 - len(intact) / (n - 1)


def _groups(n: int, r: int) -> list[range]:
    size = max(1, n // r)
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def perturb(
    kind: str, n: int, r: int, seed: int, *, labels: Sequence[Hashable] | None = None, attempts: int = 64
) -> ClipOrder | None:
    """Draw one perturbation of n clips.

    Args:
        kind: ``drop``, ``shuffle`` or ``reverse``.
        n: number of clips, >= 1.
        r: difficulty factor, >= 2 (large is easy).
        seed: the draw depends on nothing but (kind, n, r, seed, labels).
        labels: one per clip (caption, group id). A draw whose label sequence equals the original's counts as identity.
        attempts: draws before giving up.

    Returns:
        The order, or None when no non-identical one was found (n = 1, or all labels equal).

    Raises:
        ValueError: an unknown kind, n < 1, r < 2, or a wrong number of labels.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown perturbation {kind!r}; known: {', '.join(KINDS)}")
    if n < 1 or r < 2:
        raise ValueError(f"perturb needs n >= 1 and r >= 2, got n={n}, r={r}")
    labels = list(range(n)) if labels is None else list(labels)
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} clips")
    rng = random.Random(f"{kind}/{n}/{r}/{seed}")
    for _ in range(attempts):
        if kind == "drop":
            order = sorted(rng.sample(range(n), max(1, n // r)))
        else:
            groups = _groups(n, r)
            if kind == "shuffle":
                rng.shuffle(groups)
            else:
                groups.reverse()
            order = [i for g in groups for i in g]
        if [labels[i] for i in order] != labels:
            return ClipOrder(n, tuple(order), kind, r, seed)
        if kind == "reverse":
            return None
    return None
