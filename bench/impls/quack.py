"""QuACK's chunked linear cross-entropy for Hopper and newer: scalar sums only, gradients made in forward."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import BETA, Case, Inputs
from bench.impls.base import Impl, Outputs, Refused, Step, leaves_of, no_cuda, not_installed, version


class Quack(Impl):
    """A preference loss needs one sum per answer: one call per answer, and one per answer of a live reference."""

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("quack", "quack-kernels") or no_cuda(device):
            return reason
        if torch.cuda.get_device_capability() < (9, 0):
            return "needs compute capability 9.0 or newer"
        try:
            import quack.linear_cross_entropy  # noqa: F401
        except ImportError as problem:
            return f"quack-kernels {version('quack-kernels')} cannot be loaded ({problem})"
        return "takes bfloat16 and float16 only" if dtype == torch.float32 else None

    def refuses(self, case: Case) -> str | None:
        return "gives sums of log-probs, no KL over the whole vocabulary" if case.kl else None

    def gemms(self, case: Case) -> tuple[float, float]:
        return 2 + case.live + case.trained, 0

    def total(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Sum of log-probs."""
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return -chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum")

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        return self.total(hidden, weight, inputs.labels), None, None

    def step(self, case: Case, inputs: Inputs) -> Step:
        if reason := self.refuses(case):
            raise Refused(reason)
        leaves = leaves_of(case, inputs)
        if case.trained:
            return Step(lambda: -self.total(leaves[0], leaves[1], inputs.labels) / len(inputs.labels), leaves)
        batch = inputs.batch
        assert batch.rejected is not None
        win, lose = batch.chosen, batch.rejected
        sizes = torch.bincount(batch.branch, minlength=batch.n_branches).tolist()  # tokens come sorted by answer
        labels = inputs.labels.split(sizes)

        def sums(hidden: Tensor) -> Tensor:
            parts = zip(hidden.split(sizes), labels, strict=True)
            return torch.stack([self.total(part, inputs.weight, wanted) for part, wanted in parts])

        def forward() -> Tensor:
            if case.live:
                with torch.no_grad():
                    ref = sums(inputs.ref)
            else:
                ref = batch.sum(inputs.cached.logp)
            ratio = sums(leaves[0]) - ref
            return -torch.nn.functional.logsigmoid(BETA * (ratio[win] - ratio[lose])).mean()

        return Step(forward, leaves)


def implementations() -> list[Impl]:
    return [Quack("quack")]
