"""The decoders behind one interface, and how one is chosen.

Shapes: F frames asked for, H and W pixels as displayed (rotation applied).
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError

__all__ = ["BACKENDS", "DecodeError", "Decoder", "available_backends", "open_decoder"]

log = logging.getLogger(__name__)

BACKENDS = ("pyav", "torchcodec", "dali-cpu", "dali-gpu")
_NEEDS = {"pyav": "av", "torchcodec": "torchcodec", "dali-cpu": "nvidia.dali", "dali-gpu": "nvidia.dali"}
_INSTALL = {
    "pyav": "pip install av",
    "torchcodec": "pip install 'torchcodec==0.13.*' for torch 2.13",
    "dali-cpu": "pip install nvidia-dali-cuda130",
    "dali-gpu": "pip install nvidia-dali-cuda130",
}


class Decoder(Protocol):
    """Stateless towards its caller: every call names its file."""

    name: str
    route: str
    """How YUV becomes RGB; part of what identifies pixels, since decoders differ by several levels."""

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """uint8 [F, H, W, 3] RGB in the order asked for, repeats allowed, each distinct frame decoded once.

        Raises:
            DecodeError: for anything that keeps a single one of the frames from being the right one.
        """
        ...


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_NEEDS[name]) is not None
    except ModuleNotFoundError:
        return False


def available_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """Backend -> "" when it can be opened here, else what is missing. For ``doctor``."""
    out = {}
    for name in BACKENDS:
        missing = "" if _installed(name) else _INSTALL[name]
        if not missing and name == "dali-gpu" and not torch.cuda.is_available():
            missing = "a CUDA device"
        out[name] = missing
    return out


@cache
def _announce(name: str, why: str) -> None:
    log.info("video.backend auto: %s (%s)", name, why)


def open_decoder(name: str, device: str | torch.device = "cpu") -> Decoder:
    """Open a decoder by name.

    ``auto`` is dali-gpu when ``device`` is CUDA and DALI is installed, else pyav; its choice is logged once.

    Raises:
        InputError: an unknown backend, or one that was asked for and is missing: never a silent switch.
    """
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if name == "auto":
        if cuda and _installed("dali-gpu"):
            name, why = "dali-gpu", "CUDA device and DALI found"
        else:
            name, why = "pyav", "DALI not installed" if cuda else "no CUDA device in use"
        _announce(name, why)
    if name not in BACKENDS:
        raise InputError(f"video.backend: unknown decoder {name!r}; known: auto, {', '.join(BACKENDS)}")
    if not _installed(name):
        raise InputError(f"video.backend: {name} was asked for and is not installed ({_INSTALL[name]})")
    if name == "pyav":
        from tempo_fast.video.decode_pyav import PyAVDecoder

        return PyAVDecoder()
    if name == "torchcodec":
        from tempo_fast.video.decode_torchcodec import TorchCodecDecoder

        return TorchCodecDecoder()
    if name == "dali-gpu" and not torch.cuda.is_available():
        raise InputError("video.backend: dali-gpu was asked for and torch finds no CUDA device")
    from tempo_fast.video.decode_dali import DaliDecoder

    return DaliDecoder(gpu=name == "dali-gpu", device=torch.device(device))
