"""What objectives share: checked options, checked inputs, the SFT term, pair weights, metrics."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields
from dataclasses import field as _field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tempo_kernels.branches import BranchBatch, ObjectiveOutput, Sums


def option(default: float, *, low: float = -math.inf, high: float = math.inf, open_: str = "") -> Any:
    """An option with its range [low, high]; ``open_`` holds 'l' and/or 'h' where the end does not belong to it."""
    return _field(default=default, metadata={"low": low, "high": high, "open": open_})


def _check_option(owner: str, f: Field[Any], value: Any) -> None:
    if isinstance(f.default, bool):
        if value not in (True, False):
            raise ValueError(f"{owner}: option {f.name} must be true or false, got {value!r}")
        return
    low, high, open_ = f.metadata["low"], f.metadata["high"], f.metadata["open"]
    left = "(" if "l" in open_ or low == -math.inf else "["
    right = ")" if "h" in open_ or high == math.inf else "]"
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and (low < value if "l" in open_ else low <= value) and (value < high if "h" in open_ else value <= high)
    if not ok:
        raise ValueError(f"{owner}: option {f.name} must be a number in {left}{low:g}, {high:g}{right}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives. Call: (logp [N], ref_logp [N] | None, kl [N] | None, batch) -> ObjectiveOutput.

    ``ref_logp`` is taken without gradient. Tensors may be float32 or float64; results have the dtype of ``logp``.
    """

    name: ClassVar[str] = ""
    needs_reference: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_spans: ClassVar[bool] = False
    extra_inputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for f in fields(self):
            _check_option(self.name, f, getattr(self, f.name))

    def __call__(
        self, logp: Tensor, ref_logp: Tensor | None, kl: Tensor | None, batch: BranchBatch, **extra: Any
    ) -> ObjectiveOutput:
        """Raises ValueError when an input this objective needs is missing, misshapen or unknown."""
        self._check(logp, ref_logp, kl, batch, extra)
        sums = Sums(logp, ref_logp, kl, batch)
        losses, chosen_rewards, rejected_rewards, metrics = self._losses(sums, logp, batch, extra)
        if sft_weight := getattr(self, "sft_weight", 0.0):
            nll = -sums.mean_logp[batch.chosen]
            losses = losses + sft_weight * nll
            metrics["nll/chosen"] = nll
        for side, branches in (("chosen", batch.chosen), ("rejected", batch.rejected)):
            if branches is not None:
                metrics[f"logps/{side}"] = sums.L[branches]
                if sums.has_kl:
                    metrics[f"kl/{side}"] = sums.K[branches]
        if batch.pair_weight is not None:
            losses = losses * batch.pair_weight.to(losses.dtype)
        detached = {key: value.detach() for key, value in metrics.items()}
        return ObjectiveOutput(losses, chosen_rewards.detach(), rejected_rewards.detach(), detached)

    def _losses(
        self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """losses [Q], chosen rewards [Q], rejected rewards [Q], metrics."""
        raise NotImplementedError

    def _check(
        self, logp: Tensor, ref_logp: Tensor | None, kl: Tensor | None, batch: BranchBatch, extra: dict[str, Any]
    ) -> None:
        for label, value, needed in (
            ("logp", logp, True), ("ref_logp", ref_logp, self.needs_reference), ("kl", kl, self.needs_kl)
        ):
            if value is None:
                if needed:
                    raise ValueError(f"objective {self.name!r} needs {label}")
            elif value.shape != batch.branch.shape:
                expected = list(batch.branch.shape)
                raise ValueError(f"{label} must be {expected} like batch.branch, got {list(value.shape)}")
        if self.needs_spans and batch.spans is None and not (self.name == "ddpo" and batch.weights is not None):
            raise ValueError(f"objective {self.name!r} needs batch.spans")
        if batch.rejected is None and self.name != "sft":
            raise ValueError(f"objective {self.name!r} needs batch.rejected")
        for key in extra:
            if key not in self.extra_inputs:
                raise ValueError(f"objective {self.name!r} takes no input {key!r}; extra inputs: {self.extra_inputs}")
        for key in self.extra_inputs:
            if extra.get(key) is None:
                raise ValueError(f"objective {self.name!r} needs the input {key!r}")


def rejected_of(batch: BranchBatch) -> Tensor:
    """[Q] rejected branches; the caller has checked that they are there."""
    assert batch.rejected is not None
    return batch.rejected


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)
