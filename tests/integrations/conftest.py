"""A text model of a few thousand weights, and a LoRA adapter that does something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

VOCABULARY = 61


def _make_model(seed: int = 0) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


def _with_adapter(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **settings}))


@pytest.fixture
def make_model() -> Callable[..., Any]:
    return _make_model


@pytest.fixture
def with_adapter() -> Callable[..., Any]:
    return _with_adapter
