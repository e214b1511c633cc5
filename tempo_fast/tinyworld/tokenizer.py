"""A small byte-level BPE whose frequent words are single tokens, with Qwen2-VL's special tokens and chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tempo_fast.tinyworld.questions import NUMBERS, TYPES, draw_question
from tempo_fast.tinyworld.world import ACTIONS, COLOURS, SHAPES, Event, draw_film, stream

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VOCABULARY = 512

# Qwen2-VL's template without its default system message: short prompts, and a system message still works
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus(prompts: list[str]) -> list[str]:
    """The text the vocabulary is made from; prompts count many times so that their words are single tokens."""
    lines = [prompt for prompt in prompts for _ in range(50)]
    for colour in COLOURS:
        for shape in SHAPES:
            for action in ACTIONS:
                event = Event(colour, shape, action)
                lines += [event.text, f" {event.text}", f"In clip 1, a{event.text[1:]}\n{event.text}"]
    rng = stream(5, 0)
    for _ in range(300):
        film = draw_film(rng, int(rng.integers(3, 8)))
        for kind in TYPES:
            question = draw_question(rng, film, kind)
            if question:
                lines += [question.question, *question.options]
    lines += ["user\n", "assistant\n", "system\n"] * 200 + list(NUMBERS) * 20
    return lines


def build_tokenizer(prompts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same prompts always give the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(prompts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[s for s in SPECIALS if s not in ("<|im_end|>", "<|endoftext|>")],
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
