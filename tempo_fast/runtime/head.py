"""The vocabulary head's weight, wherever an engine keeps it.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError

Outputs = TypeVar("Outputs", bound=tuple)


def check_head(head: nn.Module) -> None:
    """Raises InputError when the head is more than its weight: an adapter or a bias would be ignored."""
    if hasattr(head, "base_layer") or any("lora_" in name for name, _ in head.named_parameters()):
        raise InputError(
            "train.lora: an adapter on the vocabulary head is not supported (the loss uses the head's weight directly);"
            " take the head out of the adapter's target modules, or merge that adapter into it first"
        )
    if getattr(head, "bias", None) is not None:
        raise InputError("model.path: a vocabulary head with a bias is not supported; the loss uses its weight alone")


def apply_head(head: nn.Module, hidden: Tensor, function: Callable[[Tensor, Tensor], Outputs]) -> Outputs:
    """``function(hidden [N, D], weight [V, D])``, a tuple of tensors, with the full weight of a vocabulary head.

    A head that trains gets its gradient, under ZeRO-3 too: the weight is then gathered for the function and once more
    for its backward, and its gradient is reduced with the others, once, also where the input embedding shares it. A
    frozen head is gathered for the function, and in the backward only if the function saved it, so that no rank holds
    it in between. Use it inside the wrapped module's forward, on all ranks, which then all run the backward.

    Raises:
        InputError: a head with an adapter or a bias.
    """
    check_head(head)
    weight = _weight(head)
    if not (hasattr(weight, "ds_id") and weight.requires_grad and torch.is_grad_enabled()):
        with gathered_head(head) as full, _gathered_again(head, full):
            return function(hidden, full)
    # DeepSpeed gathers and reduces around a module's call, so the function runs as the head's own forward
    own = head.__dict__.get("forward")
    head.__dict__["forward"] = lambda x: function(x, weight)
    try:
        return head(hidden)
    finally:
        del head.__dict__["forward"]
        if own is not None:
            head.__dict__["forward"] = own


@contextmanager
def _gathered_again(head: nn.Module, full: Tensor) -> Iterator[None]:
    """What autograd saves of ``full`` [V, D], a partitioned head's, inside the block is gathered when it is needed."""
    if not hasattr(_weight(head), "ds_id"):
        yield
        return
    # numbers alone: the hooks live as long as what is saved, and would hold the tensor
    storage, first, dtype = full.untyped_storage().data_ptr(), full.storage_offset(), full.dtype

    def pack(saved: Tensor) -> Tensor | tuple[Any, ...]:
        if saved.dtype != dtype or not saved.numel() or saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset() - first

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        shape, stride, offset = packed
        with gathered_head(head) as again:
            return again.as_strided(shape, stride, again.storage_offset() + offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def gathered_head(head: nn.Module) -> Iterator[Tensor]:
    """The full weight [V, D] of a vocabulary head inside the block.

    A plain head gives its parameter. Under ZeRO-3 the partitions are gathered first; what is given then carries no
    gradient to the head, and stays valid for a backward after the block. Use it on all ranks, and inside the wrapped
    module's forward if the engine is there.

    Raises:
        InputError: a head with an adapter or a bias.
        RuntimeError: under ZeRO-3 a head that trains, with gradients on: that is what :func:`apply_head` is for.
    """
    check_head(head)
    weight = _weight(head)
    zero: Any = weight
    if not hasattr(zero, "ds_id"):
        yield weight
        return
    if weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("gathered_head gives a head that trains no gradient under ZeRO-3: use apply_head")
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    if zero.ds_status == ZeroParamStatus.AVAILABLE:
        yield weight.data
        return
    with GatheredParameters([weight]):
        # the alias keeps the gathered storage when the parameter itself is partitioned again
        yield weight.data


def _weight(head: nn.Module) -> Tensor:
    # not head.weight: DeepSpeed's mapping would gather it there and then, and once more in the backward
    weight = dict.get(head._parameters, "weight")
    assert isinstance(weight, Tensor)
    return weight
