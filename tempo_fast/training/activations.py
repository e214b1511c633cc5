"""Which activations are kept for the backward and which are computed again.

Per layer and token, D hidden size, K of keys and values, F of the MLP, T tokens: computing all of it again costs a
forward, so that LoRA's necessary 4 FLOP per parameter and token become 6. ``selective`` keeps what is expensive for its
size: the output of a matmul costs 2 FLOP per element and input feature, that of attention about 2·T. So attention's
outputs (with their log-sum-exp) and those of projections that do not widen are kept, 4·D + 2·K elements; what is
computed again is the MLP's two wide projections, 2·F, and everything elementwise.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tempo_fast.errors import InputError

POLICIES = ("none", "full", "selective")

# position of the two factors among the arguments
_MATMULS = {"aten::mm": 0, "aten::addmm": 1}


def set_recompute(model: Any, how: str | bool) -> None:
    """Set what the decoder layers of a transformers model, bare or inside peft, compute again in the backward.

    Args:
        model: has transformers' ``gradient_checkpointing_enable``; layers in eval mode are left alone.
        how: one of POLICIES, as ``train.gradient_checkpointing``; true is ``full``, false ``none``.

    Raises:
        InputError: no such policy.
    """
    if isinstance(how, bool):
        how = "full" if how else "none"
    if how not in POLICIES:
        raise InputError(f"train.gradient_checkpointing: must be one of {', '.join(POLICIES)}, got {how!r}")
    if how == "none":
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's policy of selective activation checkpointing: which outputs of an operator are kept.

    Attention by torch's kernels and by the flash-attn package; FlexAttention is compiled, and no operator to see.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    name = op.name() if hasattr(op, "name") and callable(op.name) else ""
    kept = name.startswith(("aten::_scaled_dot_product_", "flash_attn::"))
    if name in _MATMULS:
        factor = args[_MATMULS[name] + 1]  # [inputs, outputs]
        kept = factor.shape[1] <= factor.shape[0]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
