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
    refuse_adapters(bundle)
    base = bundle.model
    model = _attached(base, folder, bundle.path)
    try:
        bundle.model = model.eval()
        yield
    finally:
        bundle.model = _without(model)


def _attached(base: torch.nn.Module, folder: str, path: str) -> Any:
    """``base`` with the adapter, or as it was and an InputError."""
    from peft import PeftConfig, PeftModel

    def misfit(why: object) -> InputError:
        return InputError(f"generation.adapter: {folder} does not fit {path} ({str(why).splitlines()[0]})")

    try:
        model: Any = PeftModel(base, PeftConfig.from_pretrained(folder))  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError) as e:  # no layer is named so, no such method
        if hasattr(base, "peft_config"):
            del base.peft_config
        raise misfit(e) from e
    try:
        keys = model.load_adapter(folder, "default", is_trainable=False)
    except Exception as e:
        _without(model)
        raise misfit(e) from e
    strange = [*(k for k in keys.missing_keys if "lora_" in k), *keys.unexpected_keys]
    if strange:
        _without(model)
        raise misfit(f"{len(strange)} of its weights have no counterpart, such as {strange[0]}")
    return model


def _without(model: Any) -> torch.nn.Module:
    base = model.unload()
    if hasattr(base, "peft_config"):  # peft leaves it there
        del base.peft_config
    return base


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
