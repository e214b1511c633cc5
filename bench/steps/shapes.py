"""Models with random weights, and records for them, without a file.

Shapes: P patches of a video, G visual tokens, T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempo_fast.config import LoraConfig
from tempo_fast.models import get_family
from tempo_fast.models.family import Grid, Prompt, Timing
from tempo_fast.models.liger import apply_liger
from tempo_fast.models.load import TINYWORLD_BASE, Bundle
from tempo_fast.training.adapters import attach_lora
from tempo_fast.training.data import Item
from tempo_fast.trees.layout import Branch, ResponseTree, prompt_of

_TEMPORAL = 2
_PATCH = 14


@dataclass(frozen=True)
class Shape:
    """A model and what a record holds: one video of ``grid`` at two frames a second, ``prefix`` prompt tokens of which
    most are its visual tokens, and answers of ``answer`` tokens."""

    name: str
    config: Callable[[dict[str, Any]], Any]
    """From the ids of the special tokens to the transformers config."""
    grid: Grid
    prefix: int
    answer: int
    lora: LoraConfig
    cuda_only: bool = False


def _small(ids: dict[str, Any], text: dict[str, Any], vision: dict[str, Any]) -> Any:
    from transformers import Qwen2VLConfig

    head_dim = text["hidden_size"] // text["num_attention_heads"]
    sections = [head_dim // 2 - 2 * (3 * head_dim // 16), 3 * head_dim // 16, 3 * head_dim // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    no_ends = {"bos_token_id": None, "eos_token_id": None}
    vision = {"mlp_ratio": 4, "patch_size": _PATCH, "spatial_merge_size": 2, "temporal_patch_size": _TEMPORAL, **vision}
    return Qwen2VLConfig(
        text_config={"max_position_embeddings": 32768, "rope_parameters": rope, **no_ends, **text},
        vision_config={"hidden_size": text["hidden_size"], **vision},
        tie_word_embeddings=False,
        **ids,
    )


def _tiny(ids: dict[str, Any]) -> Any:
    text = {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    }  # fmt: skip
    return _small(ids, text, {"depth": 4, "embed_dim": 256, "num_heads": 4})


def _micro(ids: dict[str, Any]) -> Any:
    text = {
        "vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
    }  # fmt: skip
    return _small(ids, text, {"depth": 1, "embed_dim": 32, "num_heads": 2})


def _qwen2_5_vl_7b(ids: dict[str, Any]) -> Any:
    """config.json of Qwen/Qwen2.5-VL-7B-Instruct, but for the ids of special tokens."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": _PATCH,
            "spatial_merge_size": 2, "temporal_patch_size": _TEMPORAL, "tokens_per_second": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "out_hidden_size": 3584,
        },
        tie_word_embeddings=False,
        **ids,
    )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", _tiny, Grid(15, 16, 16), 1000, 40, LoraConfig(r=32, alpha=64, dropout=0.0)),
        Shape("7b", _qwen2_5_vl_7b, Grid(36, 32, 40), 12000, 300, LoraConfig(r=32, alpha=64, dropout=0.0), True),
        Shape("micro", _micro, Grid(2, 4, 4), 48, 7, LoraConfig(r=4, alpha=8, dropout=0.0)),
    )
}


@dataclass(frozen=True)
class Video:
    """A video without a file."""

    key: str
    grid: Grid

    @property
    def timing(self) -> Timing:
        frames = _TEMPORAL * self.grid.t
        return Timing(tuple(i / 2 for i in range(frames)), 2.0)


class Reader:
    """Normal pixels for each video, made once, on the device: nothing is decoded in a bench of steps."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._made: dict[str, Tensor] = {}

    def pixels(self, plan: Video) -> Tensor:
        """[P, C*t*p*p]"""
        if plan.key not in self._made:
            seed = int(hashlib.sha256(plan.key.encode()).hexdigest()[:12], 16)
            g = torch.Generator(self._device).manual_seed(seed)
            t, h, w = plan.grid
            shape = (t * h * w, 3 * _TEMPORAL * _PATCH**2)
            self._made[plan.key] = torch.randn(shape, generator=g, device=self._device).to(self._dtype)
        return self._made[plan.key]


def make_config(shape: Shape, tokenizer: Any) -> Any:
    """The shape's transformers config, its special tokens those of the tokenizer."""
    token = tokenizer.convert_tokens_to_ids
    ids = {
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"),
    }  # fmt: skip
    return shape.config(ids)


def make_tokenizer() -> Any:
    """The one in the package: it has Qwen's special tokens and chat."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINYWORLD_BASE), local_files_only=True)


def make_bundle(shape: Shape, device: str, dtype: torch.dtype, liger: bool = False) -> Bundle:
    """A model of random weights on the device, with a LoRA whose two halves are random; with Liger's kernels where they
    are asked for (CUDA)."""
    from transformers import AutoModelForImageTextToText

    tokenizer = make_tokenizer()
    config = make_config(shape, tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    family, where = get_family(config.model_type), torch.device(device)
    model.requires_grad_(False)
    apply_liger(model, liger, where)
    bundle = Bundle(model, tokenizer, family, config, family.geometry(config), where, dtype, f"random {shape.name}")
    attach_lora(bundle, shape.lora, seed=0)
    for name, parameter in bundle.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return bundle


def make_items(shape: Shape, bundle: Bundle, records: int, rejected: int) -> list[Item]:
    """Trees of one chosen and ``rejected`` other answers, each about a video of its own."""
    g = torch.Generator().manual_seed(1)
    prompt, vocabulary = _prompt(shape, bundle), bundle.config.get_text_config().vocab_size
    items = []
    for i in range(records):
        answers = torch.randint(0, vocabulary, (1 + rejected, shape.answer), generator=g).tolist()
        branches = [Branch.of(ids) for ids in answers]
        items.append(Item(ResponseTree(str(i), prompt, branches, [Video(f"v{i}", shape.grid)]), ["drop"] * rejected))
    return items


def _prompt(shape: Shape, bundle: Bundle) -> Prompt:
    """The family's own prompt about one video, with as many words as make up the prefix."""
    video, words = Video("", shape.grid), 0
    while True:
        prompt = prompt_of(bundle.family, bundle.tokenizer, bundle.config, " a" * words, [video])
        missing = shape.prefix - len(prompt.input_ids)
        if missing == 0:
            return prompt
        if missing < 0:
            raise ValueError(f"shape {shape.name}: the shortest prompt is {-missing} tokens over {shape.prefix}")
        words += missing
