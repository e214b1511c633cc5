"""Plain torch as trainers write it, the same compiled, and torch's own fused function."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, Inputs
from bench.impls.base import Impl, LogProbs, Outputs


def _log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax((hidden @ weight.T).float(), -1)


def _pick(log_p: Tensor, labels: Tensor) -> Tensor:
    return log_p.gather(-1, labels[:, None]).squeeze(-1)


def _plain(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor | None, want_kl: bool) -> Outputs:
    log_p = _log_softmax(hidden, weight)
    if ref is None:
        return _pick(log_p, labels), None, None
    with torch.no_grad():
        log_q = _log_softmax(ref, weight)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1) if want_kl else None
    return _pick(log_p, labels), _pick(log_q, labels), kl


class Plain(Impl):
    """Logits in the dtype of the inputs, then float32: what a model's output and a trainer's loss do."""

    function = staticmethod(_plain)

    def refuses(self, case: Case) -> str | None:
        return "needs the reference's logits for the KL, not statistics" if case.kl and not case.live else None

    def gemms(self, case: Case) -> tuple[float, float]:
        return 1 + case.live, 1 + case.trained

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        ref = inputs.ref if case.live else None
        logp, ref_logp, kl = self.function(hidden, weight, inputs.labels, ref, case.kl)
        return logp, inputs.cached.logp if ref is None else ref_logp, kl


class Compiled(Plain):
    """torch.compile of the same function."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.function: Any = torch.compile(_plain, dynamic=False)

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        return no_compiler()


def no_compiler() -> str | None:
    """torch.compile's default backend builds C++ (also for its CUDA launchers)."""
    candidates = (os.environ.get("CXX"), os.environ.get("CC"), "g++", "clang++", "gcc")
    found = any(shutil.which(name) for name in candidates if name)
    return None if found else "torch.compile needs a C++ compiler, none is on the PATH"


class TorchLinearCrossEntropy(LogProbs):
    """torch.nn.functional.linear_cross_entropy (since 2.13) in chunks of tokens, by its own rule or of ``chunk`` each.
    Per token it recomputes in backward; a mean has its gradients made in forward."""

    trained_gemms = (3.0, 0.0)

    def __init__(self, name: str, chunk: int | None) -> None:
        super().__init__(name)
        self.chunk = chunk

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            return f"torch {torch.__version__} has no chunked linear_cross_entropy"
        return None

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -self._call(hidden, weight, labels, "none")

    def mean_nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return self._call(hidden, weight, labels, "mean")

    def _call(self, hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=self.chunk)
        return F.linear_cross_entropy(hidden, weight, labels, reduction=reduction, options=options)


def implementations() -> list[Impl]:
    fused = [TorchLinearCrossEntropy("torch_lce", None), TorchLinearCrossEntropy("torch_lce_1024", 1024)]
    return [Plain("plain"), Compiled("compile"), *fused]
