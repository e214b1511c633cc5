"""What a plan must know of a model: sizes and parameter counts, from its config.json alone.

Counts are those of transformers' own classes, made on torch's meta device, where parameters have shapes and no memory.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.models.family import Family, VideoGeometry


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block: ``inputs`` [in], ``outputs`` [out]; ``adapted``: LoRA's pattern matches it."""

    name: str
    inputs: int
    outputs: int
    adapted: bool


@dataclass(frozen=True)
class Tower:
    """A stack of alike transformer blocks. ``linears`` are those of one block."""

    depth: int
    width: int
    heads: int
    key_heads: int
    head_dim: int
    mlp: int
    gated: bool
    """The MLP has a gate beside its way up (SwiGLU)."""
    linears: tuple[Linear, ...]
    head_norms: bool = False
    """Queries and keys are normalised per head (Qwen3)."""
    rms: bool = True
    """Norms work in float32 and keep that copy (RMSNorm), or keep their input as it is (LayerNorm)."""

    def lora(self, rank: int) -> int:
        """Elements of adapters of that rank on all adapted layers: rank · Σ (in + out)."""
        return self.depth * sum(rank * (x.inputs + x.outputs) for x in self.linears if x.adapted)

    @property
    def weights(self) -> int:
        """Elements of all linear layers, which multiply every token."""
        return self.depth * sum(x.inputs * x.outputs for x in self.linears)

    @property
    def widening(self) -> int:
        """Those of ``weights`` with more outputs than inputs."""
        return self.depth * sum(x.inputs * x.outputs for x in self.linears if x.outputs > x.inputs)


@dataclass
class Shape:
    """A model. Counts are of elements; ``shared_head``: the head is the input embedding."""

    name: str
    family: Family
    config: Any
    geometry: VideoGeometry
    language: int
    """Decoder layers and final norm: neither embedding nor head."""
    embedding: int
    head: int
    """V·D, counted once in ``total`` where it is shared."""
    vision: int
    """The tower with its projector."""
    shared_head: bool
    vocabulary: int
    text: Tower
    tower: Tower
    small: int = 0
    """Elements of language parameters with fewer than 100 000, which ZeRO-3 never partitions by default."""
    other: int = 0
    """Of none of these, such as what separates the lines of an image; frozen."""
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.language + self.embedding + self.vision + (0 if self.shared_head else self.head) + self.other

    @property
    def feature_width(self) -> int:
        """Channels of a visual feature: D, and D more for each layer that DeepStack adds to."""
        deep = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        return self.text.width * (1 + len(deep))


def load_shape(path: str) -> Shape:
    """The shape of ``model.path``: a directory with a config.json, ``tinyworld``, or one of ``BUILT_IN``.

    Raises:
        InputError: neither, or an architecture that no family knows.
    """
    from tempo_fast.models.load import TINYWORLD_BASE, load_family

    name = path.strip().lower()
    folder = TINYWORLD_BASE if path == "tinyworld" else Path(path)
    if (folder / "config.json").is_file():
        family, config = load_family(folder)
        return shape_of(folder.name if path != "tinyworld" else path, family, config)
    known = next((key for key in BUILT_IN if name in (key, f"{key}-instruct")), None)
    # a path that is not there yet: the name of the directory says which model it will hold
    known = known or next((key for key in BUILT_IN if folder.name.lower() in (key, f"{key}-instruct")), None)
    if known is None:
        raise InputError(
            f"model.path: {path} is no directory with a config.json, and none of the built-in shapes"
            f" {', '.join(BUILT_IN)}"
        )
    family, config = built_in(known)
    shape = shape_of(known, family, config)
    if path.lower() != known:
        shape.notes.append(f"model.path {path} is not there: the built-in shape {known} stands for it")
    return shape


def built_in(name: str) -> tuple[Family, Any]:
    """Family and transformers config of one of ``BUILT_IN``."""
    from transformers import AutoConfig

    from tempo_fast.models import get_family

    numbers = copy.deepcopy(BUILT_IN[name])
    kind = str(numbers.pop("model_type"))
    return get_family(kind), AutoConfig.for_model(kind, **numbers)


def shape_of(name: str, family: Family, config: Any) -> Shape:
    """Sizes and counts of a family's model. Raises InputError for a decoder that is none of ours (experts)."""
    import torch
    import transformers

    with torch.device("meta"):
        model: Any = getattr(transformers, family.model_class)(config)  # type: ignore[attr-defined]
    text = config.get_text_config()
    language = model.model.language_model
    head: Any = family.head(model).weight
    embedding: Any = model.get_input_embeddings().weight
    tower = family.vision_tower(model)
    in_language = {id(p) for p in language.parameters()} - {id(embedding), id(head)}
    small = sum(p.numel() for p in language.parameters() if p.numel() < 100_000 and id(p) in in_language)
    made = Shape(
        name=name,
        family=family,
        config=config,
        geometry=family.geometry(config),
        language=sum(p.numel() for p in language.parameters() if id(p) in in_language),
        embedding=embedding.numel(),
        head=head.numel(),
        vision=sum(p.numel() for p in tower.parameters()),
        shared_head=head is embedding,
        vocabulary=head.shape[0],
        text=_text_tower(model, family, text),
        tower=_vision_tower(model, family, tower),
        small=small,
    )
    made.other = sum(p.numel() for p in model.parameters()) - made.total
    return made


def _text_tower(model: Any, family: Family, text: Any) -> Tower:
    layers = model.model.language_model.layers
    linears = _linears(model, layers[0], family.lora_targets)
    names = {x.name.rsplit(".", 1)[-1]: x for x in linears}
    if "gate_proj" not in names or "down_proj" not in names:
        raise InputError(f"model.path: a plan knows dense decoders with gated MLPs, not {text.model_type}")
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Tower(
        depth=len(layers), width=text.hidden_size, heads=heads, key_heads=text.num_key_value_heads, head_dim=head_dim,
        mlp=names["gate_proj"].outputs, gated=True, linears=tuple(linears),
        head_norms=hasattr(layers[0].self_attn, "q_norm"),
    )  # fmt: skip


def _vision_tower(model: Any, family: Family, tower: Any) -> Tower:
    """Of one block of the longest list of alike blocks in the tower."""
    import torch

    lists = [m for m in tower.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    blocks = max(lists, key=lambda m: (len(m), sum(p.numel() for p in m.parameters())))
    linears = _linears(model, blocks[0], family.vision_lora_targets)
    vision = model.config.vision_config
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    widths = [x.outputs for x in linears if x.inputs == width]
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    gated = any("gate" in x.name for x in linears)
    # the way up is the last layer that starts at the tower's width
    return Tower(
        depth=len(blocks), width=width, heads=heads, key_heads=heads, head_dim=width // heads, mlp=widths[-1],
        gated=gated, linears=tuple(linears),
        rms=not any(isinstance(m, torch.nn.LayerNorm) for m in blocks[0].modules()),
    )  # fmt: skip


def _linears(model: Any, block: Any, pattern: str) -> list[Linear]:
    import torch

    names = {id(m): n for n, m in model.named_modules()}
    wanted = re.compile(pattern)
    return [
        Linear(n, m.in_features, m.out_features, wanted.fullmatch(names[id(m)]) is not None)
        for n, m in block.named_modules()
        if isinstance(m, torch.nn.Linear)
    ]


def _qwen2_vl(hidden: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2_vl",
        "text_config": _text(hidden, mlp, layers, heads, keys, vocabulary),
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "hidden_size": hidden, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen2_5_vl(
    hidden: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool, vision_mlp: int
) -> dict[str, Any]:
    return {
        "model_type": "qwen2_5_vl",
        "text_config": _text(hidden, mlp, layers, heads, keys, vocabulary),
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": vision_mlp, "num_heads": 16, "patch_size": 14,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": hidden,
        },
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _text(hidden: int, mlp: int, layers: int, heads: int, keys: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "vocab_size": vocabulary, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip


BUILT_IN: dict[str, dict[str, Any]] = {
    "qwen2-vl-2b": _qwen2_vl(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2-vl-7b": _qwen2_vl(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2-vl-72b": _qwen2_vl(8192, 29568, 80, 64, 8, 152064, False),
    "qwen2.5-vl-3b": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, True, 3420),
    "qwen2.5-vl-7b": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, False, 3420),
    "qwen2.5-vl-32b": _qwen2_5_vl(5120, 27648, 64, 40, 8, 152064, False, 3456),
    "qwen2.5-vl-72b": _qwen2_5_vl(8192, 29568, 80, 64, 8, 152064, False, 3456),
}
"""The numbers of config.json of Qwen/Qwen2-VL-*-Instruct and Qwen/Qwen2.5-VL-*-Instruct. The tests hold them to the
parameter counts that the checkpoints' index files give."""
