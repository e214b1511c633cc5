"""The vocabulary head's weight, wherever an engine keeps it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tempo_fast.errors import InputError


def check_head(head: nn.Module) -> None:
    """Raises InputError when the head is more than its weight: an adapter or a bias would be ignored."""
    if hasattr(head, "base_layer") or any("lora_" in name for name, _ in head.named_parameters()):
        raise InputError(
            "train.lora: an adapter on the vocabulary head is not supported (the loss uses the head's weight directly);"
            " take the head out of the adapter's target modules, or merge that adapter into it first"
        )
    if getattr(head, "bias", None) is not None:
        raise InputError("model.path: a vocabulary head with a bias is not supported; the loss uses its weight alone")


@contextmanager
def gathered_head(head: nn.Module) -> Iterator[Tensor]:
    """The full weight [V, D] of a vocabulary head inside the block.

    A plain head gives its parameter. Under ZeRO-3 the partitions are gathered first; what is given then is a frozen
    tensor that stays valid for the backward after the block. Use it inside the wrapped module's forward, on all ranks.

    Raises:
        InputError: a head with an adapter or a bias, or a head that trains under ZeRO-3.
    """
    check_head(head)
    # not head.weight: DeepSpeed's mapping would gather it there and then, and once more in the backward
    weight = dict.get(head._parameters, "weight")
    assert isinstance(weight, Tensor)
    zero: Any = weight
    if not hasattr(zero, "ds_id"):
        yield weight
        return
    if weight.requires_grad:
        raise InputError("train.zero_stage: 3 cannot train the vocabulary head; freeze it or use stage 2")
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    if zero.ds_status == ZeroParamStatus.AVAILABLE:
        yield weight.data
        return
    with GatheredParameters([weight]):
        # the alias keeps the gathered storage when the parameter itself is partitioned again
        yield weight.data
