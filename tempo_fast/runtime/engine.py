"""Training engines: gradients, clipping, AdamW, state. One process in plain torch, several through DeepSpeed (zero.py).

An engine wraps the module whose forward gives the loss. Gradients are averaged over ranks, so a caller who wants a sum
over all ranks multiplies its loss by ``ranks.world``. ``backward`` may be called any number of times before ``step``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.runtime.optimizer import check_trainable, make_adamw
from tempo_fast.runtime.pieces import load_pieces, save_pieces, shapes_of, whole
from tempo_fast.runtime.ranks import Ranks


class TrainEngine(Protocol):
    """What the training loop needs. All ranks call all methods, in the same order."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's forward."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss."""
        ...

    def step(self, lr: float) -> float:
        """Clip, update, clear the gradients; returns their norm before clipping, the same on all ranks.

        It is inf when the norm is not finite: weights, moments and step count are then as they were.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of weights and optimizer state: plain containers and CPU tensors, for ``torch.save``.

        The parts of all ranks hold everything that trains once; see ``runtime/pieces.py``.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        """Continue from the parts of all ranks, of any number of them and of any engine, this rank's own first.

        Raises InputError when they belong to another model or are not complete.
        """
        ...

    def sync_adapter(self) -> None:
        """Leave training: the module holds the trained values as plain full parameters again, on every rank."""
        ...


class TorchEngine:
    """One process, plain torch. Weights that train in bfloat16 have float32 masters; so are gradients summed."""

    def __init__(self, module: nn.Module, params: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        check_trainable(params, config)
        self.module = module
        self.params = dict(params)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for name, p in params.items()
        }
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = make_adamw(self.masters, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            return
        loss.backward()
        for p, master in self._rounded():
            if p.grad is not None:
                grad = p.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

    def step(self, lr: float) -> float:
        for p in self.masters.values():
            if p.grad is None:  # decayed and averaged like under ZeRO, where every parameter has a gradient
                p.grad = torch.zeros_like(p)
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._masters_to_weights()
        self.optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else math.inf

    def state_dict(self) -> dict[str, Any]:
        return save_pieces(whole(self.masters), self.optimizer, shapes_of(self.params), "torch", 1)

    def load_state_dict(self, state: Mapping[str, Any] | Iterable[Mapping[str, Any]]) -> None:
        load_pieces(whole(self.masters), self.optimizer, shapes_of(self.params), state)
        self._masters_to_weights()

    def sync_adapter(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _rounded(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(p, m) for p, m in zip(self.params.values(), self.masters.values(), strict=True) if m is not p]

    def _masters_to_weights(self) -> None:
        with torch.no_grad():
            for p, master in self._rounded():
                p.copy_(master)


def make_train_engine(
    module: nn.Module, params: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks
) -> TrainEngine:
    """The engine that ``config.engine`` asks for.

    Args:
        module: its forward gives the loss.
        params: name to trainable parameter, the same order on every rank; float32, or the model's dtype where
            ``config.tune`` is full.
        config: engine, zero_stage, deepspeed, offloading, weight_decay, adam_beta2, max_grad_norm.

    Raises:
        InputError: DeepSpeed is not installed, the torch engine with several processes, nothing to train.
    """
    if config.engine == "torch":
        if ranks.world > 1:
            raise InputError(f"train.engine: torch runs one process and {ranks.world} were started; use deepspeed")
        return TorchEngine(module, params, config)
    from tempo_fast.runtime.zero import DeepSpeedEngine

    return DeepSpeedEngine(module, params, config, ranks)
