"""What both engines share: AdamW, and the check of what trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError

ADAM_EPS = 1e-8


def make_adamw(
    params: Mapping[str, nn.Parameter], config: TrainConfig, kind: type[torch.optim.AdamW] = torch.optim.AdamW
) -> Any:
    """AdamW with beta1 .9; vectors (biases, norms) are not decayed. The learning rate comes with each step."""
    decayed = [p for p in params.values() if p.ndim >= 2]
    plain = [p for p in params.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}]
    groups.append({"params": plain, "weight_decay": 0.0})
    return kind([g for g in groups if g["params"]], lr=0.0, betas=(0.9, config.adam_beta2), eps=ADAM_EPS)


def check_trainable(params: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
    """Raises InputError when nothing trains, or adapters in less than float32 (small steps would round to none).

    The model itself may train in bfloat16: engines keep float32 masters of it.
    """
    if not params:
        raise InputError("train: no parameter of the model is trainable")
    for name, p in params.items():
        if p.dtype != torch.float32 and config.tune != "full":
            raise InputError(
                f"train: {name} is trained in {str(p.dtype).removeprefix('torch.')};"
                " adapters are kept in float32, or set train.tune to full to train the model itself"
            )
