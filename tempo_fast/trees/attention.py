"""Which attention a packed row runs, and how a transformers model comes to run it.

transformers looks its attention up by name (``AttentionInterface``), and makes masks by the function registered under
the same name. Ours are registered beside those of the model: given a ``TreeMask`` in place of a mask tensor they run
the attention it carries, given anything else (generation, a cache, a dense mask) they hand on to what the model had. So
the layout of a micro-batch travels with its call, through threads and through gradient checkpointing, whose recompute
happens in the backward; nothing stays behind but the name in the text model's config. Vision towers have a config of
their own and keep theirs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.family import unwrap
from tempo_fast.trees import attention_flash
from tempo_fast.trees.attention_causal import causal_attention
from tempo_fast.trees.attention_flash import FlashKernel
from tempo_fast.trees.attention_flex import FlexAttention
from tempo_fast.trees.attention_masked import MaskedAttention
from tempo_fast.trees.attention_merged import CpuKernel, MergedAttention
from tempo_fast.trees.batch import PackedBatch

logger = logging.getLogger(__name__)

PATHS = ("auto", "dense", "split", "flash", "flex")
_NAME = "tempo_fast_trees"
_said: set[str] = set()

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""query [B, H, T, d], key and value [B, K, T, d], scale -> [B, T, H, d]."""


class TreeMask:
    """Stands where transformers passes a mask: ``attend`` is the attention of this micro-batch, every layer's the same.

    ``ndim`` and ``shape`` are those of the mask [B, 1, T, T] that is never made; transformers reads them.
    """

    ndim = 4

    def __init__(self, attend: Attend, rows: int, tokens: int) -> None:
        self.attend = attend
        self.shape = (rows, 1, tokens, tokens)


def attention_mask(asked: str, model: nn.Module, packed: PackedBatch, dtype: torch.dtype) -> TreeMask | Tensor:
    """The mask to pass to ``Family.hidden_states``; the text model is made ready to read it.

    Args:
        asked: one of PATHS, as ``train.attention``. ``dense`` is the additive mask [B, 1, T, T] for the model's own
            attention; ``split`` runs prompt and branches apart on torch's own kernels; ``flash`` does so on the
            flash-attn package; ``flex`` is FlexAttention with a block mask. ``auto`` never takes ``dense``. For
            answers in rows of their own all others are torch's causal attention.
        model: the model, bare or inside peft or an engine.
        packed: the batch, on the device where the model is.
        dtype: of the activations.

    Raises:
        InputError: the path cannot run here, or the text model has sliding windows, sinks or soft-capped scores.
    """
    config = unwrap(model).config.get_text_config()
    refuse(config)
    path = choose(asked, config, packed.input_ids.device, dtype)
    if path == "dense":
        return packed.mask(dtype)
    _route(unwrap(model), config)
    rows, tokens = packed.input_ids.shape
    # padding stands behind, where causal attention lets no token see it
    attend: Attend = causal_attention if rows > 1 else _attention(path, packed)
    return TreeMask(attend, rows, tokens)


def _attention(path: str, packed: PackedBatch) -> Attend:
    device = packed.input_ids.device
    if path == "flex":
        return FlexAttention(packed.extents, device)
    if path == "flash":
        return MergedAttention(packed.extents, FlashKernel())
    if device.type == "cpu":
        return MergedAttention(packed.extents, CpuKernel())
    return MaskedAttention(packed.extents, device)


def choose(asked: str, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """The path that ``asked`` means for this text config, device and dtype; of ``auto`` the log says why, once.

    Raises:
        InputError: no such path, or it cannot run here; the sentence says why.
    """
    if asked not in PATHS:
        raise InputError(f"train.attention: must be one of {', '.join(PATHS)}, got {asked!r}")
    no_flex, no_flash = _no_flex(device), _no_flash(config, device, dtype)
    if asked == "flash" and no_flash:
        raise InputError(f"train.attention: flash cannot run because {no_flash}")
    if asked == "flex" and torch.is_grad_enabled() and device.type == "cpu":
        raise InputError("train.attention: flex has no backward on a CPU, use split")
    if asked != "auto":
        return asked
    path = "split" if no_flex and no_flash else "flash" if no_flex else "flex"
    reasons = [f"no flex: {no_flex}"] if no_flex else ["compiled, on CUDA"]
    if no_flex and no_flash:
        reasons.append(f"no flash: {no_flash}")
    line = f"attention of packed trees: {path} ({'; '.join(reasons)})"
    if line not in _said:
        _said.add(line)
        logger.info(line)
    return path


def _no_flex(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the device is {device.type}"
    return "" if find_spec("triton") else "triton is not installed"


def _no_flash(config: Any, device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if not attention_flash.installed():
        return "flash-attn is not installed"
    if dtype not in attention_flash.DTYPES:
        return f"the dtype is {str(dtype).removeprefix('torch.')}"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return "" if attention_flash.takes(size) else f"the head size is {size}"


def refuse(config: Any) -> None:
    """Raises InputError for a text model whose attention is more than the rule of trees, whatever the path."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds or (window is not None and not getattr(config, "layer_types", None)):
        what = ", ".join(sorted(kinds)) or f"a sliding window of {window}"
        raise InputError(f"model.path: the text model has {what}; packed trees need full attention in every layer")


def _route(model: Any, config: Any) -> None:
    """Register ours beside the model's own attention and name it in the text config, once per model.

    It stays named: the recompute of gradient checkpointing looks the name up in the backward, when the forward is over.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    own = config._attn_implementation
    if own.startswith(_NAME):
        return
    name = f"{_NAME}:{own}"
    AttentionInterface.register(name, _attention_function(own))
    AttentionMaskInterface.register(name, _mask_function(own))
    model.set_attn_implementation({"text_config": name})


def _attention_function(own: str) -> Callable[..., Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        if isinstance(attention_mask, TreeMask):
            return _run(attention_mask, query, key, value, *args, **kwargs), None
        # eager is not in the table: each modelling file has its own
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
        return run(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


@torch.compiler.disable  # the layout is another in every batch: traced, each would be compiled anew
def _run(
    mask: TreeMask, query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None, dropout: float = 0.0,
    **kwargs: Any,
) -> Tensor:  # fmt: skip
    if dropout:
        raise InputError("model.path: attention_dropout must be 0 in config.json, or set train.attention to dense")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise InputError(f"model.path: the text model's attention has a {name}, which packed trees do not know")
    return mask.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _mask_function(own: str) -> Callable[..., Any]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def make(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if isinstance(attention_mask, TreeMask):
            return attention_mask
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, attention_mask=attention_mask, **kwargs)

    return make
