"""A PEFT adapter that an engine answers with: on for the time of its answers, told apart by its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tempo_fast.errors import InputError
from tempo_fast.files import digest, file_digest, read_json
from tempo_fast.models.load import Bundle

FILES = ("adapter_config.json", "adapter_model.safetensors")


def saved_digest(folder: str) -> str:
    """SHA-256 (hex) over a saved adapter's settings and weights. Raises InputError where a file is missing."""
    for name in FILES:
        if not (Path(folder) / name).is_file():
            raise InputError(f"generation.adapter: {folder} is no PEFT adapter (no {name})")
    # where its base once lay changes no result
    settings = {k: v for k, v in read_json(Path(folder) / FILES[0]).items() if k != "base_model_name_or_path"}
    return digest([settings, file_digest(Path(folder) / FILES[1])])


def rank_of(folder: str) -> int:
    """The largest rank of a saved adapter's matrices."""
    settings = read_json(Path(folder) / FILES[0])
    return max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])


@contextmanager
def adapter_on(bundle: Bundle, folder: str) -> Iterator[None]:
    """The bundle's model with a saved adapter inside the block, as it was after it; nothing changes when empty.

    Raises InputError where the adapter does not fit, or the model carries adapters already.
    """
    if not folder:
        yield
        return
    from peft import PeftModel

    refuse_adapters(bundle)
    base = bundle.model
    try:
        model: Any = PeftModel.from_pretrained(base, folder, is_trainable=False)
    except (ValueError, RuntimeError, KeyError) as e:
        raise InputError(f"generation.adapter: {folder} does not fit {bundle.path} ({str(e).splitlines()[0]})") from e
    try:
        bundle.model = model.eval()
        yield
    finally:
        bundle.model = model.unload()
        if hasattr(bundle.model, "peft_config"):  # peft leaves it there
            del bundle.model.peft_config


def refuse_adapters(bundle: Bundle) -> None:
    """Raises InputError where the bundle's model carries adapters."""
    if hasattr(bundle.model, "peft_config"):
        raise InputError("generation.adapter: the model carries adapters already; merge them first, or leave it empty")


def active_digest(model: torch.nn.Module) -> str | None:
    """SHA-256 of the weights of the adapters that are on; None when there are none, or none is on."""
    import hashlib

    parts: list[Any] = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or getattr(module, "disable_adapters", False) or module.merged:
            continue
        for adapter in module.active_adapters:
            for kind in ("lora_A", "lora_B"):
                layers = getattr(module, kind)
                if adapter in layers:
                    weight = layers[adapter].weight.detach().float().cpu().contiguous()
                    value = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
                    parts.append([name, adapter, kind, module.scaling[adapter], value])
    return digest(parts) if parts else None
