"""What a stage trains on: its difficulties and kinds, mixed, with easier pairs replayed and some held out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tempo_fast.config import AdaptiveConfig, StageConfig
from tempo_fast.config.curriculum import easier_before
from tempo_fast.errors import InputError
from tempo_fast.runtime.seeds import generator
from tempo_fast.training.adaptive import looked_at, split_held_out
from tempo_fast.training.data import Item

log = logging.getLogger("tempo_fast")

Pool = Callable[[int, tuple[str, ...]], list[Item]]
"""(r, kinds; empty: all) to the records of that difficulty with pairs of these kinds."""


def stage_name(index: int, r: int | Sequence[int]) -> str:
    """``stage1_r16`` for index 0; ``stage1_r16_8`` where two are mixed."""
    return f"stage{index + 1}_r{r}" if isinstance(r, int) else f"stage{index + 1}_r{'_'.join(map(str, r))}"


@dataclass
class Chosen:
    """The records of a stage. Held-out ones are those that its looks score."""

    own: list[Item]
    replayed: list[Item]
    held_out: list[Item]

    @property
    def trained(self) -> list[Item]:
        return [*self.own, *self.replayed]

    @property
    def referred(self) -> list[Item]:
        """All whose reference statistics the stage reads."""
        return [*self.trained, *self.held_out]

    def audit(self) -> dict[str, Any]:
        """Records and pairs per r and kind: trained on, of these replayed, and held out."""
        out = _count(self.trained)
        for name, items in (("replayed", self.replayed), ("held_out", self.held_out)):
            if items:
                out[name] = _count(items)
        return out


def _count(items: Sequence[Item]) -> dict[str, Any]:
    per_r: dict[str, dict[str, Any]] = {}
    for item in sorted(items, key=lambda i: -i.r):
        row = per_r.setdefault(str(item.r), {"records": 0, "pairs": {}})
        row["records"] += 1
        for kind in item.kinds:
            row["pairs"][kind] = row["pairs"].get(kind, 0) + 1
    for row in per_r.values():
        row["pairs"] = dict(sorted(row["pairs"].items()))
    return {"records": len(items), "pairs": sum(i.n_pairs for i in items), "r": per_r}


def choose(stages: Sequence[StageConfig], index: int, pool: Pool, adaptive: AdaptiveConfig, seed: int) -> Chosen:
    """The records of stage ``index``, drawn by the seed alone where not all are taken.

    Raises:
        InputError: everything or nothing is held out.
    """
    settings = stages[index]
    name = stage_name(index, settings.r)
    parts: list[list[Item]] = []
    held_out: list[Item] = []
    for r in settings.rs:
        trained, held = split_held_out(pool(r, tuple(settings.kinds)), adaptive)
        parts.append(trained)
        held_out += held
    if adaptive.every and not (held_out and all(parts)):
        records = len(held_out) + sum(map(len, parts))
        raise InputError(
            f"train.adaptive.holdout: of {records} records of {name} {len(held_out)} are held out by"
            f" {adaptive.holdout:g}, which leaves nothing to {'train on' if held_out else 'look at'}"
        )
    own = mixed(parts, settings.mix, seed, name) if settings.mix else [i for part in parts for i in part]
    replayed: list[Item] = []
    if settings.replay:
        easier = [i for r, kinds in easier_before(stages, index) for i in split_held_out(pool(r, kinds), adaptive)[0]]
        pairs = sum(i.n_pairs for i in own)
        wanted = pairs * settings.replay / (1 - settings.replay)
        replayed = draw(easier, wanted, seed, name, "replay")
        there = sum(i.n_pairs for i in replayed)
        if there < wanted and len(replayed) == len(easier):
            told = "%s: all %d easier pairs are replayed, %.1f %% of the stage's pairs, fewer than asked for"
            log.warning(told, name, there, 100 * there / (there + pairs))
    return Chosen(own, replayed, looked_at(held_out, adaptive))


def mixed(parts: Sequence[Sequence[Item]], weights: Sequence[float], seed: int, name: str) -> list[Item]:
    """As many records of each part that pairs stand as ``weights`` and one part is used up; none is taken twice."""
    sizes = [sum(i.n_pairs for i in part) for part in parts]
    unit = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    drawn = [draw(part, unit * w, seed, name, "mix", k) for k, (part, w) in enumerate(zip(parts, weights, strict=True))]
    return [i for part in drawn for i in part]


def draw(items: Sequence[Item], pairs: float, *seed: Any) -> list[Item]:
    """Records with about so many pairs (half a record more or less, one at least), in their order."""
    taken: list[int] = []
    total = 0
    for i in torch.randperm(len(items), generator=generator(*seed)).tolist():
        n = items[i].n_pairs
        if taken and 2 * (pairs - total) < n:
            break
        taken.append(i)
        total += n
    return [items[i] for i in sorted(taken)]
