"""TRL's chunked log-probs, and its chunked divergence for the KL: both walk vocabulary tiles and recompute."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.impls.base import Impl, LogProbs, Outputs, not_installed, version


class ChunkedLogProbs(LogProbs):
    """ChunkedLogProbFunction with the tile width TRL's trainers use; ChunkedDivergenceFunction at beta 0 is
    KL(teacher || student), 2F in forward and 3F in backward."""

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if reason := not_installed("trl", "trl"):
            return reason
        try:
            import trl.kernels.chunked_divergence
            import trl.trainer.utils
        except ImportError as problem:
            return f"trl {version('trl')} has no usable trl.kernels ({problem})"
        if not hasattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"):
            return f"trl {version('trl')} names the width of its tiles otherwise"
        return None

    def refuses(self, case: Case) -> str | None:
        return "its divergence needs the reference's hidden states" if case.kl and not case.live else None

    def gemms(self, case: Case) -> tuple[float, float]:
        forward, backward = super().gemms(case)
        return forward + 2 * case.kl, backward + 3 * case.kl

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

        width = min(_CHUNKED_LOGPROB_CHUNK_SIZE, weight.shape[0])
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, width, None, 1.0, ())[0]

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        logp, ref_logp, _ = super().outputs(case, hidden, weight, inputs)
        if not case.kl:
            return logp, ref_logp, None
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        kl = ChunkedDivergenceFunction.apply(hidden, weight, None, inputs.ref, inputs.weight, None, 0.0)[0]
        return logp, ref_logp, kl


def implementations() -> list[Impl]:
    return [ChunkedLogProbs("trl_chunked")]
