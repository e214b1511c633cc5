"""The module that is trained: model, head and objective in one forward.

An engine wraps this module, not the model: under ZeRO-3 the head is gathered inside the wrapped forward, which is the
only place where its backward works.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.family import Family
from tempo_fast.runtime.head import apply_head
from tempo_fast.trees.batch import PackedBatch
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.vision import Pixels, encode_pixels
from tempo_kernels.head import HeadOutput, HeadStatistics, linear_logp
from tempo_kernels.objectives import BranchBatch, Objective, ObjectiveOutput, make_objective


@dataclass
class Sums:
    """Metric name -> (sum, count); added over micro-batches, steps and ranks, divided once."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        total = self.values.setdefault(name, [0.0, 0.0])
        total[0] += float(values.detach().double().sum())
        total[1] += values.numel()

    def merge(self, other: Sums) -> None:
        for name, (s, n) in other.values.items():
            total = self.values.setdefault(name, [0.0, 0.0])
            total[0] += s
            total[1] += n

    def means(self) -> dict[str, float]:
        return {name: s / n for name, (s, n) in sorted(self.values.items()) if n}


class TrainModule(nn.Module):
    """Packed batch in, loss sum out; ``attention`` as ``train.attention``."""

    def __init__(self, model: nn.Module, family: Family, objective: Objective, attention: str = "auto") -> None:
        super().__init__()
        self.model = model
        self.family = family
        self.objective = objective
        self.imitation = make_objective("sft")
        self.attention = attention

    def forward(
        self,
        packed: PackedBatch,
        batch: BranchBatch,
        kinds: list[str],
        *,
        features: Tensor | None = None,
        pixels: Pixels | None = None,
        blank: bool = False,
        reference: HeadStatistics | Tensor | None = None,
        imitate: bool = False,
        score: bool = False,
    ) -> tuple[Tensor, Sums]:
        """
        Args:
            packed: N response tokens in T packed positions.
            batch: its Q pairs.
            kinds: perturbation kind of each pair, for the metrics.
            features: visual features [G, D] of a frozen tower, or
            pixels: decoded videos, encoded here with gradient.
            blank: the pixels belong to no video of the batch: they are encoded, with gradient zero.
            reference: statistics of the N tokens; ``mean_embedding`` may be None when no KL is needed. Or the
                reference's hidden states [N, D], for a head that is frozen.
            imitate: the loss is SFT's, whatever the objective.
            score: only compare.

        Returns:
            The sum of the Q pair losses (scalar, float32) and the metric sums; with ``score`` the reward margins [Q]
            and no metric.

        Raises:
            InputError: hidden states of a reference, and a head that trains.
        """
        if pixels is not None:
            features = encode_pixels(self.family, self.model, pixels)
        unused = features.sum() * 0 if blank and features is not None else None
        if blank:
            features = None
        objective = self.imitation if imitate else self.objective
        hidden = tree_hidden(self.family, self.model, packed, features, self.attention)

        def values(hidden: Tensor, weight: Tensor) -> HeadOutput:
            if isinstance(reference, Tensor) and weight.requires_grad:
                raise InputError(
                    "reference.keep: hidden states stand for the reference only under the head they were computed for,"
                    " and this one trains; set it to mean_embedding"
                )
            # cached statistics give no KL once the head trains, and only some objectives need one
            kl = objective.needs_kl or not (weight.requires_grad or score)
            return linear_logp(hidden, weight, packed.labels, reference=reference, kl=kl)

        head = apply_head(self.family.head(self.model), hidden, values)
        out = objective(head.logp, head.ref_logp, head.kl, batch)
        if score:
            return out.chosen_rewards - out.rejected_rewards, Sums()
        sums = self._metrics(objective, out, kinds)
        loss = out.losses.sum()
        return loss if unused is None else loss + unused, sums

    @torch.no_grad()
    def _metrics(self, objective: Objective, out: ObjectiveOutput, kinds: list[str]) -> Sums:
        sums = Sums()
        sums.add("loss", out.losses)
        for name, values in out.metrics.items():
            sums.add(name, values)
        if objective.name == "sft":
            return sums
        margins = out.chosen_rewards - out.rejected_rewards
        right = (margins > 0).float()
        sums.add("rewards/chosen", out.chosen_rewards)
        sums.add("rewards/rejected", out.rejected_rewards)
        sums.add("rewards/margins", margins)
        sums.add("rewards/accuracies", right)
        for kind in sorted(set(kinds)):
            of_kind = torch.tensor([k == kind for k in kinds], device=right.device)
            sums.add(f"rewards/accuracies/{kind}", right[of_kind])
            sums.add(f"rewards/margins/{kind}", margins[of_kind])
        return sums
