"""SFT batches between the steps of a preference stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tempo_fast.config import SFTConfig
from tempo_fast.files import digest
from tempo_fast.training.data import Item, plan_steps


@dataclass
class Interleaved:
    """The SFT batches that a stage may take, and how often.

    ``items`` are the SFT records; ``batches`` index into them, those that earlier stages took left out.
    """

    items: list[Item]
    batches: list[list[int]]
    ratio: float
    learning_rate: float

    @staticmethod
    def of(config: SFTConfig, items: list[Item], seed: int, taken: int) -> Interleaved:
        """All batches of ``config.epochs`` passes, without the first ``taken``."""
        batches = plan_steps([i.n_pairs for i in items], config.batch_size, seed, "interleaved", config.epochs)
        return Interleaved(items, batches[: config.max_steps or None][taken:], config.ratio, config.learning_rate)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result of a stage that takes these batches."""
        data = digest([i.digest for i in self.items])
        return {"ratio": self.ratio, "learning_rate": self.learning_rate, "batches": digest(self.batches), "data": data}

    def weave(self, steps: Sequence[list[int]], first: int) -> list[list[int]]:
        """The preference ``steps`` with SFT batches behind them; record i of ``items`` stands there as ``first + i``.

        After k preference steps floor(k * ratio) SFT batches have run, or all there are.
        """
        out: list[list[int]] = []
        ratio, done = Fraction(str(self.ratio)), 0
        for k, step in enumerate(steps, 1):
            out.append(step)
            due = min(int(k * ratio), len(self.batches))
            out += [[first + i for i in batch] for batch in self.batches[done:due]]
            done = due
        return out
