"""What a benched loss head is: it takes a step of a case, or says in a sentence why it cannot.

F is one matmul over the head, 2·N·V·D FLOP. Every implementation states how many it spends in forward and backward,
so that TFLOP/s says how well it uses the machine; the methods themselves are compared by their times.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Case, Inputs, loss_of

Outputs = tuple[Tensor | None, Tensor | None, Tensor | None]
"""logp, ref_logp, kl; each [N], or a scalar sum from one that gives no more, or None."""


class Refused(Exception):
    """This implementation cannot do this case here; the message says why."""


@dataclass(frozen=True)
class Step:
    """``forward`` builds the loss, ``backward`` differentiates it by ``leaves``: the hidden states first, then, where
    it trains, the head."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    unpack: Callable[[Tensor], Tensor] = lambda grad: grad
    """From the layout of ``leaves[0]`` to [N, D]; not part of the step."""

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.leaves)

    def __call__(self) -> tuple[Tensor, ...]:
        return self.backward(self.forward())


def leaves_of(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Leaves that share their memory with the inputs."""
    hidden = inputs.hidden.detach().requires_grad_()
    return (hidden, inputs.weight.detach().requires_grad_()) if case.trained else (hidden,)


class Impl:
    """One way to compute the head. Subclasses give ``outputs`` and ``gemms``; ``step`` follows from ``outputs``."""

    ours = False

    def __init__(self, name: str) -> None:
        self.name = name

    def absent(self, device: str, dtype: torch.dtype) -> str | None:
        """Why this machine, these packages or this dtype rule it out, or None."""
        return None

    def refuses(self, case: Case) -> str | None:
        """Why it cannot do ``case`` anywhere, or None."""
        return None

    def gemms(self, case: Case) -> tuple[float, float]:
        """F spent in forward and in backward."""
        raise NotImplementedError

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        """Differentiable in hidden [N, D] and weight [V, D]."""
        raise NotImplementedError

    def step(self, case: Case, inputs: Inputs) -> Step:
        """Raises Refused. May prepare copies of the inputs in its own layout."""
        if reason := self.refuses(case):
            raise Refused(reason)
        leaves = leaves_of(case, inputs)
        weight = leaves[1] if case.trained else inputs.weight

        def forward() -> Tensor:
            logp, ref_logp, kl = self.outputs(case, leaves[0], weight, inputs)
            assert logp is not None
            return loss_of(case, logp, ref_logp, kl, inputs.batch)

        return Step(forward, leaves)


class LogProbs(Impl):
    """A function (hidden, weight, labels) -> logp [N], composed: the reference is a second call without gradient."""

    backward_gemms = 2.0
    """Of log_probs with a frozen head: logits again, dX."""
    trained_gemms = (1.0, 3.0)
    """Of mean_nll, dW included."""

    def log_probs(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def mean_nll(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """For the trained head: a scalar, by the call that a user of this package would take for it."""
        return -self.log_probs(hidden, weight, labels).mean()

    def refuses(self, case: Case) -> str | None:
        return "gives log-probs of labels, no KL over the whole vocabulary" if case.kl else None

    def gemms(self, case: Case) -> tuple[float, float]:
        return self.trained_gemms if case.trained else (1 + case.live, self.backward_gemms)

    def outputs(self, case: Case, hidden: Tensor, weight: Tensor, inputs: Inputs) -> Outputs:
        return self.log_probs(hidden, weight, inputs.labels), self.ref_logp(case, inputs), None

    def step(self, case: Case, inputs: Inputs) -> Step:
        if not case.trained:
            return super().step(case, inputs)
        hidden, weight = leaves = leaves_of(case, inputs)
        return Step(lambda: self.mean_nll(hidden, weight, inputs.labels), leaves)

    def ref_logp(self, case: Case, inputs: Inputs) -> Tensor | None:
        if not case.live:
            return inputs.cached.logp
        with torch.no_grad():
            return self.log_probs(inputs.ref, inputs.weight, inputs.labels)


def not_installed(module: str, package: str) -> str | None:
    """A sentence when ``module`` cannot be found; it is not imported."""
    return None if importlib.util.find_spec(module) else f"{package} is not installed"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def no_cuda(device: str) -> str | None:
    return None if device == "cuda" else "its kernels run on CUDA devices only"


def not_sm90(device: str) -> str | None:
    """These kernels are compiled for compute capability 9.0 exactly."""
    if reason := no_cuda(device):
        return reason
    capability = torch.cuda.get_device_capability()
    return None if capability == (9, 0) else f"needs compute capability 9.0, this is {capability[0]}.{capability[1]}"
