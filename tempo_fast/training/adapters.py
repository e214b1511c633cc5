"""What trains: LoRA through peft (attach, load, save, merge), or the language model itself.

Saved keys are those of the ForConditionalGeneration class.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tempo_fast.config import LoraConfig
from tempo_fast.errors import InputError
from tempo_fast.files import file_digest, new_folder, read_json, write_json
from tempo_fast.models.load import Bundle, load_bundle
from tempo_fast.runtime.seeds import generator


def attach_lora(bundle: Bundle, lora: LoraConfig, *, seed: int, vision: bool = False) -> nn.Module:
    """Wrap the bundle's model with a fresh float32 adapter on the language model (and the vision tower).

    The initialisation depends on ``seed`` alone; torch's global generator is left as it was.
    """
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    family = bundle.family
    targets = f"({family.lora_targets})|({family.vision_lora_targets})" if vision else family.lora_targets
    settings = PeftLora(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "lora").initial_seed()))
        model = get_peft_model(bundle.model, settings)
    _check_matched(model, bundle)
    bundle.model = model
    return model


def load_lora(bundle: Bundle, folder: Path, *, trainable: bool) -> nn.Module:
    """Wrap the bundle's model with a saved adapter. Raises InputError when the folder holds none."""
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: no adapter_config.json there")
    bundle.model = PeftModel.from_pretrained(bundle.model, str(folder), is_trainable=trainable)
    _check_matched(bundle.model, bundle)
    return bundle.model


@contextmanager
def adapter_on(bundle: Bundle, folder: str) -> Iterator[None]:
    """The bundle's model with a saved adapter inside the block, as it was after it; no adapter when empty."""
    if not folder:
        yield
        return
    load_lora(bundle, Path(folder), trainable=False).eval()
    try:
        yield
    finally:
        bundle.model = bundle.model.unload()  # type: ignore[operator]


def adapter_digest(folder: str) -> str:
    """SHA-256 of an adapter's weights file."""
    return file_digest(Path(folder) / "adapter_model.safetensors")


def _check_matched(model: nn.Module, bundle: Bundle) -> None:
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    if not names:
        raise InputError(f"model.path: no layer of {bundle.path} matches the LoRA targets of {bundle.family.name}")
    if any("lm_head" in n for n in names):
        raise InputError("an adapter on the vocabulary head cannot be trained on cached statistics; leave it out")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, in a fixed order."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def unfreeze(bundle: Bundle, *, head: bool = False, vision: bool = False) -> nn.Module:
    """Let the language model train; the vocabulary head (and an input embedding that shares its weight) and the vision
    tower with its projector only where asked."""
    family, model = bundle.family, bundle.model
    apart = {id(p) for p in family.vision_tower(model).parameters()} if not vision else set()
    if not head:
        apart |= {id(p) for p in family.head(model).parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) not in apart)
    return model


def save_model(bundle: Bundle, folder: Path) -> None:
    """Write the whole model, in its dtype, as a directory that ``from_pretrained`` loads: complete or absent."""
    model: Any = bundle.model
    model.config.dtype = bundle.dtype
    with new_folder(folder) as tmp:
        model.save_pretrained(str(tmp), safe_serialization=True)
        _copy_beside(Path(bundle.path), tmp)


def link_model(model: Path, folder: Path, note: dict[str, Any]) -> None:
    """``folder`` becomes the same model, its files shared where the file system can; ``merge.json`` holds ``note``.

    Nothing happens where it is there already.
    """
    if (folder / "merge.json").is_file() and read_json(folder / "merge.json") == note:
        return
    with new_folder(folder) as tmp:
        for path in model.iterdir():
            try:
                os.link(path, tmp / path.name)
            except OSError:
                shutil.copy2(path, tmp / path.name)
        write_json(tmp / "merge.json", note)


def _copy_beside(checkpoint: Path, folder: Path) -> None:
    """Tokenizer, templates and settings of a checkpoint: all that is neither weights nor in ``folder`` already."""
    for path in checkpoint.iterdir():
        wanted = path.suffix in (".json", ".txt", ".jinja", ".model") and "safetensors" not in path.name
        ours = path.name in ("card.json", "merge.json")
        if path.is_file() and wanted and not ours and not (folder / path.name).exists():
            shutil.copy2(path, folder / path.name)


def save_lora(model: Any, folder: Path, base: str) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``: complete or absent."""
    model.peft_config["default"].base_model_name_or_path = base
    with new_folder(folder) as tmp:
        model.save_pretrained(str(tmp), safe_serialization=True)


def merge_lora(
    base: str, adapter: Path, out: Path, *, device: str = "auto", note: dict[str, Any] | None = None
) -> dict[str, float]:
    """Fold an adapter into its base in float32 and write a directory that ``from_pretrained`` loads.

    ``merge.json`` beside the weights holds ``note`` (where it came from) and what is returned.

    Returns:
        What rounding to the base's dtype does to the merged weights, all 0 where that is float32:
        ``max_rounding_error``, the largest absolute error of a weight against float32; ``max_relative_error``, the
        largest relative to its weight; ``update_error``, the norm of all errors over the norm of the adapter's
        update, the share of the training that is lost or noise (near 1, little is left of it).
    """
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(base, local_files_only=True).dtype or torch.float32
    bundle = load_bundle(base, "float32", device)
    model = load_lora(bundle, adapter, trainable=False)
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    update = sum(_square(layer.get_delta_weight("default")) for layer in layers)
    merged = model.merge_and_unload()  # type: ignore[operator]
    absolute = relative = lost = 0.0
    for parameter in merged.parameters():
        exact, rounded = parameter.data, parameter.data.to(stored)
        error = (rounded.float() - exact).abs()
        if stored != torch.float32 and error.numel():
            absolute = max(absolute, float(error.max()))
            relative = max(relative, float((error / exact.abs().clamp_min(torch.finfo(stored).tiny)).max()))
            lost += _square(error)
        parameter.data = rounded
    merged.config.dtype = stored
    errors = {
        "max_rounding_error": absolute,
        "max_relative_error": relative,
        "update_error": (lost / update) ** 0.5 if update else 0.0,
    }
    with new_folder(out) as tmp:
        merged.save_pretrained(str(tmp), safe_serialization=True)
        _copy_beside(Path(bundle.path), tmp)
        write_json(tmp / "merge.json", {**(note or {}), **errors})
    return errors


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())
