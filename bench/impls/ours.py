"""The paths of tempo_kernels.head."""

from __future__ import annotations

from torch import Tensor

from bench.cases import Case, Inputs
from bench.impls.base import Impl, Outputs
from tempo_kernels.head import linear_logp

#            forward, backward                                what they are
GEMMS = {
    "one_pass": {
        "dpo_live": (3, 0),  # sums + mean, ref sums
        "dpo_cached": (2, 0),  # sums + mean
        "rrpo_live": (4, 0),  # sums + mean, ref sums + mean
        "rrpo_cached": (2, 0),
    },
    "recompute": {
        "dpo_live": (2, 2),  # sums, ref sums; logits again, dX
        "dpo_cached": (1, 2),
        "rrpo_live": (2, 3),  # both logits again, dX
        "rrpo_cached": (1, 2),
        "sft_trained": (1, 3),  # logits again, dX, dW
    },
    "eager": {
        "dpo_live": (2, 1),  # logits, ref logits; dX
        "dpo_cached": (1, 1),
        "rrpo_live": (2, 1),
        "rrpo_cached": (1, 1),
        "sft_trained": (1, 2),  # logits; dX, dW
    },
}


class Ours(Impl):
    """``linear_logp(impl=path)``. What it refuses, it refuses by a ValueError when called."""

    ours = True

    def __init__(self, name: str, path: str) -> None:
        super().__init__(name)
        self.path = path

    def gemms(self, case: Case) -> tuple[float, float]:
        return GEMMS[self.path][case.name]

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        reference = None if case.objective == "sft" else inputs.ref if case.live else inputs.cached
        out = linear_logp(hidden, weight, inputs.labels, reference=reference, impl=self.path, kl=case.kl)
        return out.logp, out.ref_logp, out.kl


def implementations() -> list[Impl]:
    return [Ours(path, path) for path in GEMMS]
