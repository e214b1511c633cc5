"""Training engines: gradients, clipping, AdamW, state. One process in plain torch, several through DeepSpeed (zero.py).

An engine wraps the module whose forward gives the loss. Gradients are averaged over ranks, so a caller who wants a sum
over all ranks multiplies its loss by ``ranks.world``. ``backward`` may be called any number of times before ``step``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.runtime.optimizer import check_names, check_trainable, make_adamw
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
        """Clip, update, clear the gradients; returns their norm before clipping, inf when it is not finite.

        After inf the torch engine has left weights and moments as they were; DeepSpeed's ZeRO may have spoilt them,
        so that the caller goes back to a checkpoint.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """This rank's weights and optimizer state: plain containers and CPU tensors, for ``torch.save``."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict`` of the same rank. Raises InputError when it belongs to another set-up."""
        ...

    def sync_adapter(self) -> None:
        """Leave training: the module holds the trained values as plain full parameters again, on every rank."""
        ...


class TorchEngine:
    """One process, plain torch."""

    def __init__(self, module: nn.Module, params: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        check_trainable(params)
        self.module = module
        self.params = dict(params)
        self.max_grad_norm = config.max_grad_norm
        self.optimizer = make_adamw(params, config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:
            loss.backward()

    def step(self, lr: float) -> float:
        for p in self.params.values():
            if p.grad is None:  # decayed and averaged like under ZeRO, where every parameter has a gradient
                p.grad = torch.zeros_like(p)
        norm = float(nn.utils.clip_grad_norm_(self.params.values(), self.max_grad_norm or math.inf))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else math.inf

    def state_dict(self) -> dict[str, Any]:
        return {
            "engine": "torch",
            "weights": {name: _saved(p) for name, p in self.params.items()},
            "moments": {
                name: {k: _saved(v) for k, v in self.optimizer.state[p].items()}
                for name, p in self.params.items()
                if p in self.optimizer.state
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("engine") != "torch":
            raise InputError(f"train.engine: the checkpoint was written by engine {state.get('engine')}, not torch")
        check_names(state["weights"], self.params)
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(state["weights"][name])
                if name in state["moments"]:
                    # the step counter stays on the CPU, where AdamW keeps it
                    self.optimizer.state[p] = {
                        k: v.clone().to(p.device if v.ndim else "cpu") for k, v in state["moments"][name].items()
                    }

    def sync_adapter(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def _saved(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def make_train_engine(
    module: nn.Module, params: Mapping[str, nn.Parameter], config: TrainConfig, ranks: Ranks
) -> TrainEngine:
    """The engine that ``config.engine`` asks for.

    Args:
        module: its forward gives the loss.
        params: name to trainable parameter, the same order on every rank; float32.
        config: engine, zero_stage, weight_decay, adam_beta2, max_grad_norm.

    Raises:
        InputError: DeepSpeed is not installed, the torch engine with several processes, nothing to train.
    """
    if config.engine == "torch":
        if ranks.world > 1:
            raise InputError(f"train.engine: torch runs one process and {ranks.world} were started; use deepspeed")
        return TorchEngine(module, params, config)
    from tempo_fast.runtime.zero import DeepSpeedEngine

    return DeepSpeedEngine(module, params, config, ranks)
