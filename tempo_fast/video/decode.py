"""How a decoder is chosen: by name for a run, and by what the probe found for each file."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError
from tempo_fast.video.decoder import Decoder
from tempo_fast.video.probe import VideoInfo

__all__ = ["BACKENDS", "DecodeError", "Decoder", "available_backends", "decoder_for", "open_decoder"]

log = logging.getLogger(__name__)

BACKENDS = ("pyav", "torchcodec", "dali-cpu", "dali-gpu")
_NEEDS = {"pyav": "av", "torchcodec": "torchcodec", "dali-cpu": "nvidia.dali", "dali-gpu": "nvidia.dali"}
_INSTALL = {
    "pyav": "pip install av",
    "torchcodec": "pip install 'torchcodec==0.13.*' for torch 2.13",
    "dali-cpu": "pip install nvidia-dali-cuda130",
    "dali-gpu": "pip install nvidia-dali-cuda130",
}


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(_NEEDS[name]) is not None
    except ModuleNotFoundError:
        return False


def available_backends(device: str | torch.device = "cpu") -> dict[str, str]:
    """Backend -> "" when it can be opened here, else what is missing. For ``doctor`` and tests: loads each."""
    out = {}
    for name in BACKENDS:
        missing = "" if _installed(name) else _INSTALL[name]
        if not missing and name == "dali-gpu" and not torch.cuda.is_available():
            missing = "a CUDA device"
        if not missing:
            try:
                open_decoder(name, device)
            except InputError as e:
                missing = str(e).removeprefix("video.backend: ")
        out[name] = missing
    return out


@cache
def _announce(name: str, why: str) -> None:
    log.info("video.backend auto: %s (%s)", name, why)


@cache
def _announce_other(name: str, why: str) -> None:
    log.warning("video.backend %s: %s; such files are decoded by pyav", name, why)


def decoder_for(decoder: Decoder, info: VideoInfo, timeout_s: float | None = None) -> Decoder:
    """``decoder``, or PyAV's for a file that it refuses, said once per reason in the log."""
    why = decoder.refuses(info)
    if not why:
        return decoder
    _announce_other(decoder.name, why)
    return open_decoder("pyav", timeout_s=timeout_s)


def open_decoder(name: str, device: str | torch.device = "cpu", timeout_s: float | None = None) -> Decoder:
    """Open a decoder by name.

    ``auto`` is dali-gpu when ``device`` is CUDA and DALI is installed, else pyav; its choice is logged once.

    Args:
        name: ``auto`` or one of ``BACKENDS``.
        device: where frames are wanted.
        timeout_s: seconds that pyav may take for one file, looked at between packets; a call into the other libraries
            cannot be ended.

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

        return PyAVDecoder(timeout_s)
    if name == "torchcodec":
        from tempo_fast.video.decode_torchcodec import TorchCodecDecoder

        return TorchCodecDecoder()
    if name == "dali-gpu" and not torch.cuda.is_available():
        raise InputError("video.backend: dali-gpu was asked for and torch finds no CUDA device")
    from tempo_fast.video.decode_dali import DaliDecoder

    return DaliDecoder(gpu=name == "dali-gpu", device=torch.device(device))
