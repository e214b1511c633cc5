"""What all families do alike: load, render a chat, embed, run the language model.

Shapes: B rows, T tokens, G visual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.files import read_json
from tempo_fast.models.family import unwrap


class TransformersFamily:
    """A ``ForConditionalGeneration`` class of transformers whose ``model`` holds a ``language_model``. See
    ``family.Family``, which its subclasses are."""

    model_class: str
    """In transformers."""
    lora_targets = r".*language_model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
    timed = False

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        import transformers

        try:
            return getattr(transformers, self.model_class).from_pretrained(path, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as e:
            raise InputError(f"model.path: {path} cannot be loaded ({str(e).splitlines()[0]})") from e

    def chat(self, tokenizer: Any, text: str, n_videos: int, turns: Sequence[tuple[str, str]] = ()) -> str:
        """The turns and the start of the answer."""
        return tokenizer.apply_chat_template(
            chat_messages(text, n_videos, turns),
            chat_template=_processor_template(tokenizer),
            tokenize=False,
            add_generation_prompt=True,
        )

    def embed(self, model: nn.Module, input_ids: Tensor, visual: Tensor, features: Tensor | None) -> Tensor:
        embeds = unwrap(model).get_input_embeddings()(input_ids)
        if features is None:
            return embeds
        return embeds.masked_scatter(visual.unsqueeze(-1), features.to(embeds))

    def hidden_states(
        self,
        model: nn.Module,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        visual: Tensor,
        features: Tensor | None,
        cache: Any | None = None,
    ) -> Tensor:
        embeds = self.embed(model, input_ids, visual, features)
        out = unwrap(model).model.language_model(
            inputs_embeds=embeds,
            position_ids=self.model_positions(position_ids),
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._deeper(embeds, visual, features),
        )
        return out.last_hidden_state

    def _deeper(self, embeds: Tensor, visual: Tensor, features: Tensor | None) -> dict[str, Any]:
        """What the language model takes of the features beside its input."""
        return {}

    def model_positions(self, position_ids: Tensor) -> Tensor:
        return position_ids

    def new_cache(self, model: nn.Module) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=unwrap(model).config.get_text_config())

    def generate_model(self, model: nn.Module) -> Any:
        return unwrap(model)

    def head(self, model: nn.Module) -> nn.Module:
        return unwrap(model).lm_head


def chat_messages(text: str, n_videos: int, turns: Sequence[tuple[str, str]] = ()) -> list[dict[str, Any]]:
    """What a chat template takes: earlier (user, assistant) turns and ``text`` as the last user turn. The videos stand
    before the words of the first user turn. Every content is a list of parts: some templates read no other."""
    said = [(role, words) for turn in turns for role, words in zip(("user", "assistant"), turn, strict=True)]
    messages: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": words}]} for role, words in [*said, ("user", text)]
    ]
    messages[0]["content"] = [{"type": "video"}] * n_videos + messages[0]["content"]
    return messages


def _processor_template(tokenizer: Any) -> str | None:
    """The chat template of ``chat_template.json``, where older checkpoints keep the one that knows videos; None for the
    tokenizer's own (which transformers reads from ``chat_template.jinja`` itself)."""
    folder = Path(tokenizer.name_or_path or ".")
    if not (folder / "chat_template.json").is_file() or (folder / "chat_template.jinja").is_file():
        return None
    return read_json(folder / "chat_template.json").get("chat_template")
