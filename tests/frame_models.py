"""Random two-layer models of the families that see whole frames, and videos for them that need no file.

Sides are chosen for what the real ones do: OneVision's is no multiple of its patches, and its pooling halves an odd
number of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = ["internvl", "llava_onevision", "llava_next_video"]

# videos come first whatever their place in the message; the words of the checkpoints' own templates
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}<video>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }} {% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
SENTENCES = [
    "A red circle moves left.", "Then a blue square grows.", "A green triangle moves right.", "It appears at last.",
    "Describe what happens in this video in order. Frame1: Frame2:", "USER: ASSISTANT: user assistant",
]  # fmt: skip


def qwen_tokenizer(**named: str) -> Any:
    """Byte-level BPE with Qwen2's turns; ``named`` are further special tokens under attributes of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=named,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def llama_tokenizer(end: str = "</s>", template: str = VICUNA) -> Any:
    """Llama's kind: a space before every text, ``<s>`` before every prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", end, "<pad>", "<image>", "<video>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(SENTENCES * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token=end,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(name: str) -> Any:
    if name == "internvl":
        return qwen_tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        )
    if name == "llava_onevision":
        return qwen_tokenizer(image_token="<image>", video_token="<video>")
    return llama_tokenizer()


def make_config(name: str, tokenizer: Any) -> Any:
    import transformers

    token = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "llama" if name == "llava_next_video" else "qwen2",
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # large, so that attention is far from uniform and a wrong mask shows
        "initializer_range": 0.15,
    }
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.15,
    }
    if name == "internvl":
        vision = {**tower, "image_size": [28, 28], "patch_size": [7, 7]}
        return transformers.InternVLConfig(
            text_config=text, vision_config=vision, image_token_id=token("<IMG_CONTEXT>"), image_seq_length=4
        )
    tokens = {"image_token_index": token("<image>"), "video_token_index": token("<video>")}
    if name == "llava_onevision":
        vision = {**tower, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 6}
        vision["vision_use_head"] = False
        return transformers.LlavaOnevisionConfig(text_config=text, vision_config=vision, **tokens)
    vision = {**tower, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 7}
    return transformers.LlavaNextVideoConfig(text_config=text, vision_config=vision, **tokens)


def write_checkpoint(name: str, path: Path, seed: int = 0) -> None:
    """A checkpoint directory as transformers writes it."""
    import transformers

    from tempo_fast.models import get_family

    tokenizer = make_tokenizer(name)
    kind = getattr(transformers, get_family(name).model_class)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(make_config(name, tokenizer))
        for parameter in model.model.vision_tower.parameters():
            if not parameter.any():  # positions and class tokens start at zero and would hide their use
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


@dataclass(frozen=True)
class FramesPlan:
    """A video without a file: ``key`` decides its pixels."""

    name: str
    n_frames: int
    geometry: Any

    @property
    def path(self) -> str:
        return self.name

    @property
    def key(self) -> str:
        return hashlib.sha256(repr((self.name, self.n_frames)).encode()).hexdigest()

    @property
    def grid(self) -> Any:
        return self.geometry.grid(self.n_frames, self.geometry.side, self.geometry.side)

    @property
    def timing(self) -> Any:
        from tempo_fast.models.family import Timing

        return Timing(tuple(float(i) for i in range(self.n_frames)), 1.0)


class FramesReader:
    """Random pixels per plan, a frame a row."""

    def pixels(self, plan: FramesPlan) -> Tensor:
        generator = torch.Generator().manual_seed(int(plan.key[:12], 16))
        return torch.randn(plan.n_frames, 3 * plan.geometry.side**2, generator=generator)
