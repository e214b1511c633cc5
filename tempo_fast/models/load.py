"""Loading a model with everything that goes with it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempo_fast.errors import InputError
from tempo_fast.files import digest, file_digest, read_json
from tempo_fast.models import get_family
from tempo_fast.models.family import Family, VideoGeometry

# What transformers reads beside the weights, and what we leave there ourselves
_READ = (".json", ".jinja", ".txt", ".model")
_OURS = ("card.json", "merge.json")
# Entries of config.json that change no result: who wrote it, and a dtype that ``load_bundle`` overrides
BOOKKEEPING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")

TINYWORLD_BASE = Path(__file__).resolve().parent.parent / "tinyworld" / "base"


@dataclass
class Bundle:
    """A model, its tokenizer, and what its family says of it."""

    model: nn.Module
    tokenizer: Any
    family: Family
    config: Any
    geometry: VideoGeometry
    device: torch.device
    dtype: torch.dtype
    path: str

    @cached_property
    def weights_digest(self) -> str:
        """SHA-256 over the checkpoint's weight files."""
        return weights_digest(self.path)

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 over the architecture in config.json (rope, norms, sizes)."""
        return config_digest(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything in the checkpoint that decides its answers: see ``checkpoint_digest``."""
        return checkpoint_digest(self.path)


def resolve_path(path: str) -> Path:
    """The directory of a checkpoint; ``tinyworld`` is the embedded one. Raises InputError when it is not one."""
    folder = TINYWORLD_BASE if path == "tinyworld" else Path(path)
    if not (folder / "config.json").is_file():
        raise InputError(f"model.path: {folder} is not a checkpoint directory (no config.json)")
    return folder


def weights_digest(path: str) -> str:
    """SHA-256 (hex) over names and bytes of all safetensors files of a checkpoint directory."""
    folder = resolve_path(path)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"model.path: {folder} holds no .safetensors weights")
    return digest([[f.name, _file_digest(f)] for f in files])


def config_digest(path: str) -> str:
    """SHA-256 (hex) over config.json without its bookkeeping: with the weights, what decides hidden states."""
    config = read_json(resolve_path(path) / "config.json")
    return digest({key: value for key, value in config.items() if key not in BOOKKEEPING})


def checkpoint_digest(path: str) -> str:
    """SHA-256 (hex) over the weights and all that transformers reads beside them: config, tokenizer, chat templates,
    generation and preprocessor settings. Not our own card.json and merge.json, nor notes for people."""
    folder = resolve_path(path)
    beside = [f for f in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")] if f.suffix in _READ]
    names = {f.relative_to(folder).as_posix(): f for f in beside if f.is_file() and f.name not in _OURS}
    read = [[name, _file_digest(f)] for name, f in sorted(names.items()) if not name.upper().startswith("README")]
    return digest([weights_digest(path), read])


def _file_digest(path: Path) -> str:
    """``file_digest``, taken once while the file stays as it is: weights are large and asked for often."""
    stat = path.stat()
    return _known_digest(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=512)
def _known_digest(path: str, size: int, mtime_ns: int) -> str:
    return file_digest(path)


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA when there is one. Raises InputError for CUDA without a device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("model.device: cuda was asked for and torch finds no CUDA device")
    return torch.device(name)


def load_family(folder: str | Path) -> tuple[Family, Any]:
    """The family of a checkpoint directory and its transformers config. Raises InputError when it is not known."""
    from transformers import AutoConfig

    # before transformers reads it: for an architecture that it does not know either it has no list
    family = get_family(str(read_json(Path(folder) / "config.json").get("model_type", "")))
    return family, AutoConfig.from_pretrained(str(folder), local_files_only=True)


def load_bundle(path: str, dtype: str = "float32", device: str = "auto", *, weights: bool = True) -> Bundle:
    """Load a checkpoint directory, frozen and in eval mode.

    Args:
        path: directory, or ``tinyworld``.
        dtype: ``float32`` or ``bfloat16``.
        device: ``auto``, ``cpu`` or ``cuda``.
        weights: False leaves the model out (an empty module): what tokenising and planning need, without its memory.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as hf_logging

    if not sys.stderr.isatty():
        hf_logging.disable_progress_bar()
    folder = str(resolve_path(path))
    family, config = load_family(folder)
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    where = pick_device(device)
    model = nn.Module()
    if weights:
        model = family.load(folder, torch_dtype).to(where).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Bundle(model, tokenizer, family, config, family.geometry(config), where, torch_dtype, folder)
