"""The one forward that training, the reference and the probes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.models.family import Family
from tempo_fast.trees.attention import attention_mask
from tempo_fast.trees.batch import PackedBatch


def tree_hidden(
    family: Family | Any,
    model: nn.Module,
    packed: PackedBatch,
    features: Tensor | None,
    attention: str = "auto",
) -> Tensor:
    """Hidden states that predict the response tokens.

    Args:
        family: the family, or anything with a ``family`` (a bundle).
        model: its model, bare or inside peft or an engine.
        packed: from ``collate`` or ``collate_rows``.
        features: visual features [G, D] of ``packed.plans`` in reading order, or None without videos.
        attention: as ``train.attention``; see ``attention_mask``.

    Returns:
        hidden [N, D], before the head; only answer positions leave the model.

    Raises:
        InputError: that attention cannot run on this model or device.
    """
    family = getattr(family, "family", family)
    slots, given = int(packed.visual.sum()), 0 if features is None else len(features)
    if slots != given:
        raise ValueError(f"the batch has {slots} visual slots and {given} visual features")
    mask: Any = attention_mask(attention, model, packed, compute_dtype(family, model))
    hidden = family.hidden_states(model, packed.input_ids, packed.position_ids, mask, packed.visual, features)
    return hidden.flatten(0, 1)[packed.gather]


def compute_dtype(family: Family, model: nn.Module) -> torch.dtype:
    """The dtype of the activations: the head's weight has it whatever dtype adapters are kept in."""
    head: Any = family.head(model)
    return getattr(head, "base_layer", head).weight.dtype
