"""Liger Kernel: the chunked DPO loss, the fused cross-entropy in Triton, and its path for Hopper."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import ALPHA, BETA, PAIRS, Case, Inputs
from bench.impls.base import Impl, LogProbs, Outputs, Refused, Step, no_cuda, not_installed, not_sm90, version
from bench.impls.torch_heads import no_compiler

IGNORED = -100


def padded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """index [2·PAIRS, T] into the tokens, chosen answers first, and mask [2·PAIRS, T] of what is no padding."""
    batch = inputs.batch
    assert batch.rejected is not None
    order = torch.cat([batch.chosen, batch.rejected]).tolist()
    rows = [torch.nonzero(batch.branch == branch)[:, 0] for branch in order]
    longest = max(len(row) for row in rows)
    index = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=index.device)
    return index, torch.arange(longest, device=index.device)[None] < lengths[:, None]


class ChunkedDPO(Impl):
    """LigerFusedLinearDPOLoss on answers padded to one length; all work, dX included, happens in forward.

    RRPO's ranking term is that loss with the labels outside its spans ignored; its KL is LigerFusedLinearJSDLoss at
    beta 0 over the chosen half: two logits, dX, and a dW nobody asked for, 2F of N tokens.
    """

    def __init__(self, name: str, chunk: int, compiled: bool) -> None:
        super().__init__(name)
        self.chunk = chunk
        self.compiled = compiled

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("liger_kernel", "liger-kernel"):
            return reason
        return no_compiler() if self.compiled else None

    def refuses(self, case: Case) -> str | None:
        if case.trained:
            return "a preference loss, not a mean of log-probs"
        return None if case.live else "takes no precomputed reference log-probs"

    def gemms(self, case: Case) -> tuple[float, float]:
        return 3 + 2 * case.kl, 0

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        return None, None, None

    def step(self, case: Case, inputs: Inputs) -> Step:
        if reason := self.refuses(case):
            raise Refused(reason)
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss

        index, mask = padded(inputs)
        hidden = inputs.hidden[index].detach().requires_grad_()
        ref, weight = inputs.ref[index], inputs.weight
        assert inputs.batch.spans is not None
        counted = mask & (inputs.batch.spans[index] > 0) if case.kl else mask
        labels = inputs.labels[index].masked_fill(~counted, IGNORED)
        dpo = LigerFusedLinearDPOLoss(beta=BETA, chunk_size=self.chunk, compiled=self.compiled)
        jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=self.compiled)
        chosen = inputs.labels[index].masked_fill(~mask, IGNORED)[:PAIRS].flatten()
        n_chosen = int(mask[:PAIRS].sum())

        def forward() -> Tensor:
            loss = dpo(weight, hidden, labels, ref_input=ref, ref_weight=weight)[0]
            if not case.kl:
                return loss
            student, teacher = hidden[:PAIRS].flatten(0, 1), ref[:PAIRS].flatten(0, 1)
            return loss + (ALPHA * n_chosen / PAIRS) * jsd(student, weight, teacher, weight, chosen)

        def unpack(grad: Tensor) -> Tensor:
            found = torch.zeros_like(inputs.hidden)
            found[index[mask]] = grad[mask]
            return found

        return Step(forward, (hidden,), unpack)


class FusedCrossEntropy(LogProbs):
    """LigerFusedLinearCrossEntropy per token (recomputed in backward); ``budget`` times [N, D] bounds the logits of a
    chunk. Its default of 1 re-reads the head for every few tokens where V/D is large. A mean has its gradients made
    in forward."""

    trained_gemms = (3.0, 0.0)

    def __init__(self, name: str, budget: int) -> None:
        super().__init__(name)
        self.budget = budget

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("liger_kernel", "liger-kernel") or no_cuda(device):
            return reason
        import liger_kernel.ops.fused_linear_cross_entropy as module

        if not hasattr(module, "_CHUNK_MEM_CONST"):
            return f"liger-kernel {version('liger-kernel')} cannot set its chunk, or has no gradient per token"
        return None

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -self._call(hidden, weight, labels, "none")

    def mean_nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return self._call(hidden, weight, labels, "mean")

    def _call(self, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

        features = (False, None, False, False, False, None, None)  # z-loss, sums' dtype, scaling, accuracy, backend
        inputs = (hidden, weight, labels, None, None, IGNORED, 0.0, 0.0, reduction, None, *features, self.budget)
        return Function.apply(*inputs)[0]


class ScaledCrossEntropy(LogProbs):
    """Its CuTe kernels for compute capability 9.0; backward recomputes and always makes dW."""

    backward_gemms = 3.0

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("liger_kernel", "liger-kernel") or not_sm90(device):
            return reason
        try:
            import liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90  # noqa: F401
        except ImportError as problem:
            return f"liger-kernel {version('liger-kernel')} cannot load its SM90 path ({problem})"
        return "takes bfloat16 only" if dtype != torch.bfloat16 else None

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
            LigerFusedScaledCrossEntropySM90Function as Function,
        )

        return -Function.apply(hidden, weight, labels)


def implementations() -> list[Impl]:
    return [
        ChunkedDPO("liger_chunked_1", 1, False),
        ChunkedDPO("liger_chunked_4", 4, False),
        ChunkedDPO("liger_chunked_1_compiled", 1, True),
        ChunkedDPO("liger_chunked_4_compiled", 4, True),
        FusedCrossEntropy("liger_flce", 1),
        FusedCrossEntropy("liger_flce_16", 16),
        ScaledCrossEntropy("liger_sm90"),
    ]
