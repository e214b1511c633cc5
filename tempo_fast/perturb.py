"""Temporal perturbations as index arithmetic on clips or frames: the same function on every backend.

A unit is a clip or a frame, as the caller decides; there are n of them, and g = max(1, n // r). Large r is a heavy
corruption, hence an easy pair. ``KINDS`` make preference pairs, as coded by the TEMPLE authors (arXiv 2503.16929,
``generator_base.py``):

- ``drop`` keeps g random units in order;
- ``shuffle`` and ``reverse`` cut the sequence into consecutive groups of g units and permute, or reverse, the groups.

``EDITS`` keep the length: n units are shown. The first three are after RRPO (arXiv 2504.12083), which masks 25 to 50 %
of what is seen and shuffles frames (its code is not released; a figure of its authors covers a part of every frame,
here whole units go blank); how r enters is this project's:

- ``mask`` blanks k units, k drawn uniformly from the whole numbers in [n/4, n/2]: the groups of ``shuffle`` go blank in
  random order until k units are, the last group in part. At g = 1 these are k single units;
- ``local_shuffle`` permutes pieces of max(1, g // 4) units inside windows of max(2, n // 4); windows keep their order;
- ``mask_local_shuffle`` is ``local_shuffle`` with k single units blank, whatever r;
- ``freeze`` holds one unit in place of the n - g units that follow it: g units stay, as in ``drop``;
- ``repeat`` plays a segment again, and again, in place of the n - g units that follow it. The segment is of 2 to g
  units, of one when g = 1, which is a freeze;
- ``splice`` shows n - g units of another video, in a row, in place of as many;
- ``speed`` plays 2s units at twice the rate (every second one is skipped) and the next s at half of it (each is shown
  twice), or s at half the rate and then 2s at twice, so that the rest is in step again; s = max(1, (n - g) // 3), and
  n >= 3.

One deliberate difference from TEMPLE's authors: a draw that leaves the sequence of labels unchanged is no perturbation
and is redrawn (they keep it; at r = 2 and even n that is every second shuffle).

How heavy a perturbation is, is told by ``broken``. For one n it never falls as r grows: for ``reverse``, ``speed``,
``freeze``, ``repeat`` and ``splice`` whatever the seed, for the others in its mean over the draws (single draws vary).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

KINDS = ("drop", "shuffle", "reverse")
EDITS = ("mask", "local_shuffle", "mask_local_shuffle", "speed", "freeze", "repeat", "splice")

_BLANKING = ("mask", "mask_local_shuffle")
_WINDOWS = 4  # a window of local_shuffle is a quarter of the video


@dataclass(frozen=True)
class ClipOrder:
    """Which units (clips or frames) are shown, in which order.

    ``order`` holds one source unit for each shown one: i < n is one of the n original units, n + j is unit j of another
    video. ``blank`` says which shown units are blank; it is empty when none is. ``broken`` is the share of adjacent
    original pairs (i, i+1) that nowhere follow one another, in [0, 1]; ``kept`` the share of the n units still seen.
    """

    n: int
    order: tuple[int, ...]
    kind: str
    r: int
    seed: int
    blank: tuple[bool, ...] = ()

    @property
    def broken(self) -> float:
        return broken_adjacencies(self.n, self.order, self.blank)

    @property
    def kept(self) -> float:
        return sum(i < self.n for i in self.visible) / self.n

    @property
    def visible(self) -> frozenset[int]:
        """The source units seen at least once, those of another video (n + j) among them."""
        blank = self.blank or (False,) * len(self.order)
        return frozenset(i for i, hidden in zip(self.order, blank, strict=True) if not hidden)

    def apply(self, items: Sequence) -> list:
        """The items in perturbed order, blank or not; after a splice they are the other video's as well."""
        return [items[i] for i in self.order]


def broken_adjacencies(n: int, order: Sequence[int], blank: Sequence[bool] = ()) -> float:
    """Share of the n - 1 original adjacencies that ``order`` does not contain; 0 for n = 1.

    An adjacency (i, i+1) is intact when i is followed by i+1 at least once, neither of them blank: a repeated unit
    breaks nothing by itself, a blank one breaks both of its adjacencies.
    """
    if n < 2:
        return 0.0
    pairs = enumerate(itertools.pairwise(order))
    intact = {a for k, (a, b) in pairs if b == a + 1 and b < n and not any(blank[k : k + 2])}
    return 1.0 - len(intact) / (n - 1)


def _groups(units: range, size: int) -> list[range]:
    return [units[i : i + size] for i in range(0, len(units), size)]


def _flat(groups: Sequence[range]) -> list[int]:
    return [i for group in groups for i in group]


def _drop(n: int, g: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(n), g))


def _shuffle(n: int, g: int, rng: random.Random) -> list[int]:
    groups = _groups(range(n), g)
    rng.shuffle(groups)
    return _flat(groups)


def _reverse(n: int, g: int, rng: random.Random) -> list[int]:
    return _flat(_groups(range(n), g)[::-1])


def _untouched(n: int, g: int, rng: random.Random) -> list[int]:
    return list(range(n))


def _local_shuffle(n: int, g: int, rng: random.Random) -> list[int]:
    """n >= 2; never the identity, so that ``mask_local_shuffle`` is always both."""
    order = list(range(n))
    while order == list(range(n)):
        order = []
        for window in _groups(range(n), max(2, n // _WINDOWS)):
            pieces = _groups(window, max(1, g // _WINDOWS))
            rng.shuffle(pieces)
            order += _flat(pieces)
    return order


def _speed(n: int, g: int, rng: random.Random) -> list[int]:
    """The identity for n = 2, which has no room."""
    s = min(max(1, (n - g) // 3), n // 3)
    start = rng.randint(0, n - 3 * s)
    warp = [*range(0, 2 * s, 2), *(i for i in range(2 * s, 3 * s) for _ in range(2))]
    if rng.random() < 0.5:
        warp = [3 * s - 1 - i for i in reversed(warp)]
    return [*range(start), *(start + i for i in warp), *range(start + 3 * s, n)]


def _loop(n: int, g: int, start: int, length: int) -> list[int]:
    """Units [start, start + length) play on over the n - g that follow them; start + length <= g."""
    end = start + length
    return [*range(end), *(start + k % length for k in range(n - g)), *range(end + n - g, n)]


def _freeze(n: int, g: int, rng: random.Random) -> list[int]:
    return _loop(n, g, rng.randrange(g), 1)


def _repeat(n: int, g: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, max(0, g - 2))
    return _loop(n, g, start, rng.randint(min(2, g - start), g - start))


def _splice(n: int, g: int, rng: random.Random, other: int) -> list[int]:
    start, first = rng.randint(0, g), n + rng.randint(0, other - (n - g))
    return [*range(start), *range(first, first + n - g), *range(start + n - g, n)]


_ORDERS: dict[str, Callable[[int, int, random.Random], list[int]]] = {
    "drop": _drop,
    "shuffle": _shuffle,
    "reverse": _reverse,
    "mask": _untouched,
    "local_shuffle": _local_shuffle,
    "mask_local_shuffle": _local_shuffle,
    "speed": _speed,
    "freeze": _freeze,
    "repeat": _repeat,
}


def _blank(n: int, g: int, rng: random.Random) -> tuple[bool, ...]:
    count = rng.randint(-(-n // 4), n // 2)
    chosen = set(_shuffle(n, g, rng)[:count])
    return tuple(i in chosen for i in range(n))


def perturb(
    kind: str,
    n: int,
    r: int,
    seed: int,
    *,
    labels: Sequence[Hashable] | None = None,
    attempts: int = 64,
    other: int | None = None,
) -> ClipOrder | None:
    """Draw one perturbation of n units.

    Args:
        kind: one of ``KINDS`` or ``EDITS``.
        n: number of clips or frames, >= 1.
        r: difficulty factor, >= 2 (large is easy).
        seed: the draw depends on nothing but the arguments; for ``EDITS``, r's of equal max(1, n // r) draw the same.
        labels: one per unit (caption, group id). A draw whose label sequence equals the original's counts as identity,
            unless some unit is blank or of another video.
        attempts: draws before giving up.
        other: for ``splice`` the number of units of the other video, at least n - max(1, n // r); else without effect.

    Returns:
        The order, or None when no non-identical one was found (n = 1, or all labels equal and nothing blank).

    Raises:
        ValueError: an unknown kind, n < 1, r < 2, a wrong number of labels, or an other video missing or too short.
    """
    if kind not in KINDS + EDITS:
        raise ValueError(f"unknown perturbation {kind!r}; known: {', '.join(KINDS + EDITS)}")
    if n < 1 or r < 2:
        raise ValueError(f"perturb needs n >= 1 and r >= 2, got n={n}, r={r}")
    labels = list(range(n)) if labels is None else list(labels)
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} units")
    g = max(1, n // r)
    if kind == "splice" and (other is None or other < n - g):
        raise ValueError(f"splice at n={n}, r={r} needs another video: other >= {n - g}, got other={other}")
    if n == 1:
        return None
    rng = random.Random(f"{kind}/{n}/{r if kind in KINDS else g}/{seed}")
    for _ in range(attempts):
        order = _splice(n, g, rng, other or 0) if kind == "splice" else _ORDERS[kind](n, g, rng)
        blank = _blank(n, g if kind == "mask" else 1, rng) if kind in _BLANKING else ()
        if any(blank) or max(order) >= n or [labels[i] for i in order] != labels:
            return ClipOrder(n, tuple(order), kind, r, seed, blank)
        if kind == "reverse":
            return None
    return None
