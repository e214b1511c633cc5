"""cut-cross-entropy: tiles of logits never leave the chip; small gradients may be skipped (``cce``) or not.

The package index ends at 25.1.1, which has no preset ``cce_exact``; later versions come from apple/ml-cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.impls.base import Impl, LogProbs, no_cuda, not_installed, version
from bench.impls.torch_heads import no_compiler


class CutCrossEntropy(LogProbs):
    """Its F of backward (logits again, dX, and dW where the head trains) counts tiles that filtering may skip."""

    def __init__(self, name: str, preset: str, **options: Any) -> None:
        super().__init__(name)
        self.preset = preset
        self.options = options

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("cut_cross_entropy", "cut-cross-entropy"):
            return reason
        if self.preset == "torch_compile":
            return no_compiler()
        if reason := no_cuda(device):
            return reason
        from cut_cross_entropy import LinearCrossEntropyImpl

        if self.preset.upper() not in LinearCrossEntropyImpl.__members__:
            return f"cut-cross-entropy {version('cut-cross-entropy')} has no preset {self.preset}"
        if dtype == torch.float32:
            return "its backward takes bfloat16 and float16 only"
        return None

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=self.preset, **self.options)

    def mean_nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, labels, reduction="mean", impl=self.preset, **self.options)


class CompiledCrossEntropy(CutCrossEntropy):
    """Its torch.compile twin, which keeps the logits."""

    backward_gemms = 1.0
    trained_gemms = (1.0, 2.0)


def implementations() -> list[Impl]:
    return [
        CutCrossEntropy("cce", "cce"),
        CutCrossEntropy("cce_unfiltered", "cce", filter_eps=None),
        CutCrossEntropy("cce_exact", "cce_exact"),
        CompiledCrossEntropy("cce_torch", "torch_compile"),
    ]
