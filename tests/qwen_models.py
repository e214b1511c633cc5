"""Random small models of Qwen2-VL's successors; the tokenizer is tiny_qwen's.

Widths differ wherever a mistake could take one for another; windows are smaller than frames, DeepStack reaches fewer
layers than there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PATCH = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.15,
}


def make_config(name: str, tokenizer: Any) -> Any:
    import transformers

    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": rope,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        # large, so that attention is far from uniform and a wrong mask shows
        "initializer_range": 0.15,
    }
    if name == "qwen2_5_vl":
        kind = transformers.Qwen2_5_VLConfig
        vision = {**_VISION, "depth": 3, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
        vision["tokens_per_second"] = 3
    else:
        kind = transformers.Qwen3VLConfig
        text |= {"head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
        vision = {**_VISION, "depth": 4, "patch_size": 16, "num_position_embeddings": 36}
        vision["deepstack_visual_indexes"] = [0, 2]
    return kind(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def write_checkpoint(name: str, tokenizer: Any, path: Path, seed: int = 0) -> None:
    """A checkpoint directory as transformers writes it."""
    import transformers

    from tempo_fast.models import get_family

    kind: Any = getattr(transformers, get_family(name).model_class)  # type: ignore[attr-defined]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(make_config(name, tokenizer))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
