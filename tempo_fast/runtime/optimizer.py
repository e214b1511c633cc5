"""What both engines share: AdamW, and the checks of what trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError

ADAM_EPS = 1e-8


def make_adamw(params: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with beta1 .9; vectors (biases, norms) are not decayed. The learning rate comes with each step."""
    decayed = [p for p in params.values() if p.ndim >= 2]
    plain = [p for p in params.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups.append({"params": plain, "weight_decay": 0.0})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, config.adam_beta2), eps=ADAM_EPS)


def check_trainable(params: Mapping[str, nn.Parameter]) -> None:
    """Raises InputError when nothing trains, or in less than float32 (small steps would round to none)."""
    if not params:
        raise InputError("train: no parameter of the model is trainable")
    for name, p in params.items():
        if p.dtype != torch.float32:
            raise InputError(
                f"train: {name} is trained in {str(p.dtype).removeprefix('torch.')};"
                " adapters are kept in float32, or set model.dtype to float32 to train the model itself"
            )


def check_names(stored: Mapping[str, Tensor], params: Mapping[str, nn.Parameter]) -> None:
    """Raises InputError naming the first parameter that a checkpoint lacks, has too much or in another shape."""
    for name in sorted(set(stored) ^ set(params)):
        raise InputError(f"checkpoint: parameter {name} is {'missing' if name in params else 'not in this model'}")
    for name, p in params.items():
        if tuple(stored[name].shape) != tuple(p.shape):
            raise InputError(f"checkpoint: {name} has shape {tuple(stored[name].shape)}, the model {tuple(p.shape)}")
