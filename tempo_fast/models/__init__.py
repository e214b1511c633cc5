"""Model families: what is particular to each, no pixel moved. A new one is a file and an entry in ``_FAMILIES``."""

from __future__ import annotations

import importlib

from tempo_fast.errors import InputError
from tempo_fast.models.family import Family, Grid, Prompt, VideoGeometry

# transformers' ``model_type`` -> module under tempo_fast.models with a ``FAMILY``
_FAMILIES = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl",
    "llava_onevision": "llava_onevision",
    "llava_next_video": "llava_next_video",
}

__all__ = ["Family", "Grid", "Prompt", "VideoGeometry", "get_family", "known_families"]


def known_families() -> list[str]:
    """The ``model_type`` names that can be trained."""
    return sorted(_FAMILIES)


def get_family(model_type: str) -> Family:
    """The family of a transformers ``model_type``. Raises InputError with the list when it is unknown."""
    if model_type not in _FAMILIES:
        raise InputError(
            f"model.path: architecture '{model_type}' is not supported; known: {', '.join(known_families())}"
        )
    return importlib.import_module(f"tempo_fast.models.{_FAMILIES[model_type]}").FAMILY
