"""When a stage ends: looks at held-out pairs, each with a decision that is written down.

A look depends on the weights and on the held-out records alone, and its rows travel in the checkpoints: a resumed run
decides as the undisturbed one. Every rank scores its share and decides by the scores of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempo_fast.config import AdaptiveConfig
from tempo_fast.files import digest, read_jsonl, write_jsonl
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.runtime.seeds import seed_of
from tempo_fast.stats import Stat, bootstrap
from tempo_fast.training.data import Item, micro_batches

log = logging.getLogger("tempo_fast")

_RESAMPLES = 1000
GO_ON, ADVANCE = "go on", "advance"


def split_held_out(items: Sequence[Item], config: AdaptiveConfig) -> tuple[list[Item], list[Item]]:
    """(trained, held out) records in their order, by the digest of their videos, or of the prompt where there is none.

    A video is on one side in every stage, whatever the seed. With ``every`` 0 all are trained.
    """
    if not config.every:
        return list(items), []
    parts: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        parts[seed_of("held out", item.group) < config.holdout * 2**63].append(item)
    return parts


def looked_at(held_out: Sequence[Item], config: AdaptiveConfig) -> list[Item]:
    """The held-out records that a look scores: whole groups' smallest digests first."""
    ordered = sorted(held_out, key=lambda i: (seed_of("held out", i.group), i.digest))
    return ordered[: config.max_records or None]


def budget_of(config: AdaptiveConfig, stages_left: int, spent: int) -> int:
    """Preference steps that the next of ``stages_left`` stages may take: an even share of what is left, at least one;
    0 is no limit."""
    if not (config.every and config.max_steps):
        return 0
    return max(1, (config.max_steps - spent) // stages_left)


@dataclass
class Looks:
    """The looks of one stage.

    ``items`` are scored; ``last`` is the stage's number of preference steps, where the last look is; ``path`` is the
    file of all decisions (the first rank's; None writes none), ``rows`` those of this stage so far.
    """

    stage: str
    config: AdaptiveConfig
    items: list[Item]
    seed: int
    path: Path | None = None
    last: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the decisions, beside the weights."""
        return {**vars(self.config), "held_out": digest([i.digest for i in self.items])}

    @property
    def ended(self) -> bool:
        """Whether a look has ended the stage."""
        return bool(self.rows) and self.rows[-1]["decision"] == ADVANCE

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Go on after these looks; rows of later ones, which a killed run may have written, leave the file."""
        self.rows = [dict(row) for row in rows]
        self._write()

    def due(self, step: int) -> bool:
        """Whether there is a look after so many preference steps."""
        return step % self.config.every == 0 or step == self.last

    def look(self, step: int, margins: Sequence[Sequence[float]]) -> bool:
        """Decide by the reward margins of each item's pairs; True ends the stage. The row is written and logged."""
        hits, counts, kinds, rs = _tally(self.items, margins)
        share = bootstrap(
            [float(h) for h in hits.values()], list(counts.values()), _RESAMPLES, seed_of(self.seed, self.stage, step)
        )
        best = max((row["accuracy"]["value"] for row in self.rows), default=-1.0)
        decision, why = self._decide(step, share["value"])
        row = {
            "stage": self.stage,
            "step": step,
            "accuracy": share,
            "best": max(best, share["value"]),
            "kinds": kinds,
            "r": rs,
            "decision": decision,
            "why": why,
        }
        self.rows.append(row)
        self._write()
        log.info(
            "%s: step %d, held-out accuracy %.3f [%.3f, %.3f] of %d pairs: %s, %s",
            self.stage, step, share["value"], share["lo"], share["hi"], share["items"], decision, why,
        )  # fmt: skip
        return decision == ADVANCE

    def _decide(self, step: int, value: float) -> tuple[str, str]:
        c = self.config
        if value >= c.threshold:
            return ADVANCE, f"the share {value:.4f} is at least the threshold {c.threshold:g}"
        values = [*(row["accuracy"]["value"] for row in self.rows), value]
        best = values.index(max(values))
        since = len(values) - 1 - best
        if c.patience and since >= c.patience:
            at = self.rows[best]["step"]
            return ADVANCE, f"{since} looks have not raised the best share {max(values):.4f} of step {at}"
        if step == self.last:
            return ADVANCE, f"the stage's {self.last} steps are over"
        return GO_ON, f"the share {value:.4f} is below the threshold {c.threshold:g}"

    def _write(self) -> None:
        if self.path is None:
            return
        others = [row for _, row in read_jsonl(self.path)] if self.path.is_file() else []
        write_jsonl(self.path, [*(row for row in others if row["stage"] != self.stage), *self.rows])


def _tally(
    items: Sequence[Item], margins: Sequence[Sequence[float]]
) -> tuple[dict[str, int], dict[str, int], dict[str, Stat], dict[str, Stat]]:
    """(right pairs, pairs) per video, and {"value", "items"} per kind and per r."""
    hits: dict[str, int] = {}
    counts: dict[str, int] = {}
    per: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for item, values in zip(items, margins, strict=True):
        hits[item.group] = hits.get(item.group, 0) + sum(m > 0 for m in values)
        counts[item.group] = counts.get(item.group, 0) + len(values)
        for kind, margin in zip(item.kinds, values, strict=True):
            for table, key in zip(per, (kind, str(item.r)), strict=True):
                pair = table.setdefault(key, [0, 0])
                pair[0] += margin > 0
                pair[1] += 1
    shares = [{k: {"value": h / n, "items": n} for k, (h, n) in sorted(table.items())} for table in per]
    return hits, counts, shares[0], shares[1]


def held_out_margins(
    items: list[Item], max_tokens: int, ranks: Ranks, score: Callable[[list[Item]], Tensor]
) -> list[list[float]]:
    """Reward margins of the pairs of each item, the same on every rank; ``score`` gives those of a micro-batch [Q].

    All ranks call ``score`` equally often.
    """
    micros, real = micro_batches(items, range(len(items)), max_tokens, ranks.rank, ranks.world)
    found: dict[int, list[float]] = {}
    with torch.no_grad():
        for number, micro in enumerate(micros):
            margins = score([items[i] for i in micro]).float().tolist()
            for i in micro if number < real else []:
                found[i], margins = margins[: items[i].n_pairs], margins[items[i].n_pairs :]
    every = {i: values for part in ranks.all_gather_object(found) for i, values in part.items()}
    return [every[i] for i in range(len(items))]
