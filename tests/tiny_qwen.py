"""A random two-layer Qwen2-VL with a small tokenizer, its LoRA, and videos that need no file."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip

# Qwen2-VL's chat: a system turn, videos before the text of their message
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SENTENCES = [
    "A red circle moves left.", "Then a blue square grows.", "A green triangle moves right.", "It appears at last.",
    "Describe what happens in this video in order.", "What happened before the blue square?", "system user assistant",
    "You are a helpful assistant.",
]  # fmt: skip


def make_tokenizer() -> Any:
    """A byte-level BPE of about 350 tokens with Qwen's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[s for s in SPECIALS if s not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: Any, *, tie: bool = True) -> Any:
    from transformers import Qwen2VLConfig

    token = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 5,  # rows that no token uses, as real checkpoints have
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": tie,
            # larger than transformers' .02, so that attention is far from uniform and a wrong mask shows
            "initializer_range": 0.15,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 0.15,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=tie,
        initializer_range=0.15,
    )
    return config


def make_bundle(path: Any, *, seed: int = 0, tie: bool = True) -> Any:
    """Write a random checkpoint to ``path`` and load it as a user would (float32, CPU)."""
    from transformers import Qwen2VLForConditionalGeneration

    from tempo_fast.models.load import load_bundle

    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(make_config(tokenizer, tie=tie))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return load_bundle(str(path), "float32", "cpu")


def add_lora(bundle: Any, *, r: int = 4, vision: bool = False, seed: int = 1, random_b: bool = True) -> Any:
    """A copy of ``bundle`` whose model has a LoRA; its B matrices are random unless asked otherwise, so that adapters
    matter from the start."""
    from peft import LoraConfig, get_peft_model

    family = bundle.family
    targets = f"({family.lora_targets})|({family.vision_lora_targets})" if vision else family.lora_targets
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(bundle.model), LoraConfig(r=r, lora_alpha=2 * r, target_modules=targets))
        if random_b:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
    out = copy.copy(bundle)
    out.model = model.eval()
    return out


@dataclass(frozen=True)
class FakePlan:
    """A video without a file: ``key`` decides its pixels, ``n_frames`` may be odd. Two frames are shown a second."""

    name: str
    n_frames: int
    height: int = 28
    width: int = 28
    patch: int = 14

    @property
    def path(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.n_frames // 2), self.height // self.patch, self.width // self.patch)

    @property
    def timing(self) -> Any:
        from tempo_fast.models.family import Timing

        return Timing(tuple(i / 2 for i in range(self.n_frames)), 2.0)


class FakeReader:
    """Random pixels per plan; ``calls`` lists the keys decoded."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pixels(self, plan: FakePlan) -> Tensor:
        self.calls.append(plan.key)
        t, h, w = plan.grid
        generator = torch.Generator().manual_seed(int(plan.key[:12], 16))
        return torch.randn(t * h * w, 3 * 2 * plan.patch**2, generator=generator)
