"""Liger's kernels for the norms, the MLP and the rotary positions of a loaded text model, through its public functions.

They change rounding alone. Liger's losses stay off: the vocabulary head is ours. The vision tower stays as it is.
A replaced rotary function holds for every text model of that architecture in the process.

Liger 0.8.5's functions for Qwen-VL do not import beside transformers 5.23. The layers of these text models are those of
Qwen2 and Qwen3, whose functions replace norms and MLP in a given model whatever its class; rotary positions stay.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn

from tempo_fast.errors import InputError
from tempo_fast.models.family import unwrap

log = logging.getLogger("tempo_fast")

# model_type of the text config -> what ``apply_liger_kernel_to_`` goes on with, and whether rotary positions are meant
_FUNCTIONS = {
    "qwen2_vl_text": ("qwen2", False),
    "qwen2_5_vl_text": ("qwen2", False),
    "qwen3_vl_text": ("qwen3", False),
    "qwen2": ("qwen2", True),
    "qwen3": ("qwen3", True),
    "llama": ("llama", True),
    "mistral": ("mistral", True),
}


def apply_liger(model: nn.Module, asked: bool | Literal["auto"], device: torch.device) -> bool:
    """Replace the forwards of a loaded model's text layers by Liger's, as ``train.liger_kernels`` asks.

    Args:
        model: before adapters are attached.
        asked: true; false leaves the model alone; ``auto`` is true where it can be.
        device: where the model is.

    Returns:
        Whether they were replaced.

    Raises:
        InputError: asked for with true and there is no CUDA, no liger-kernel package, or no kernels for this text
            model.
    """
    if asked is False:
        return False
    base: Any = unwrap(model)
    kind = base.config.get_text_config().model_type
    missing = _missing(kind, device)
    if missing and asked is True:
        raise InputError(f"train.liger_kernels: true cannot be because {missing}")
    if missing:
        log.info("Liger's kernels: off (%s)", missing)
        return False
    text = base.model.language_model
    name, rope = _FUNCTIONS[kind]
    home = import_module(f"transformers.models.{name}.modeling_{name}")
    classes = [(key, value) for key, value in vars(home).items() if isinstance(value, type)]
    apply = getattr(import_module("liger_kernel.transformers"), f"apply_liger_kernel_to_{name}")
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply(rope=rope, rms_norm=True, swiglu=True, **off, model=text)
    for key, value in classes:  # of models that are built later
        setattr(home, key, value)
    log.info("Liger's kernels: RMSNorm, SwiGLU%s of %s", " and RoPE" if rope else "", kind)
    return True


def _missing(kind: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    return "" if kind in _FUNCTIONS else f"Liger has no kernels for the text model {kind}"
