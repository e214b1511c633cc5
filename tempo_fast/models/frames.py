"""What families without temporal patches share: square frames, each encoded alone, and 1-D positions.

Shapes: T tokens of the text sequence, F frames of all videos, G visual tokens, D hidden size, S side of a frame.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.models.base import TransformersFamily
from tempo_fast.models.family import Grid, Prompt, Timing, VideoGeometry, unwrap

_towers: weakref.WeakKeyDictionary[nn.Module, nn.ModuleList] = weakref.WeakKeyDictionary()


class FrameFamily(TransformersFamily):
    """A family says its names, ``geometry``, ``_slot`` (a video as text) and ``_frames`` (the vision call)."""

    name: str
    vision_lora_targets: str
    vision_modules: Sequence[str]
    """Attributes of the model that make visual features: modules, the encoder first, and lone parameters."""
    placeholder: str
    """The token that stands for a visual token."""
    turn_end: str | None = "<|im_end|>"
    """The token that ends an answer; None for the tokenizer's end of sequence."""

    def geometry(self, config: Any) -> VideoGeometry:
        raise NotImplementedError

    def _slot(self, config: Any, grid: Grid) -> str:
        """What replaces a video's ``<video>`` in the chat, as transformers' processor writes it."""
        raise NotImplementedError

    def _frames(self, model: Any, frames: Tensor) -> Tensor:
        """frames [F, 3, S, S] -> features [F * tokens of a frame, D]."""
        raise NotImplementedError

    def build_prompt(
        self,
        tokenizer: Any,
        config: Any,
        text: str,
        grids: Sequence[Grid],
        times: Sequence[Timing] | None = None,
        turns: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        pieces = self.chat(tokenizer, text, len(grids), turns).split("<video>")
        if len(pieces) != len(grids) + 1:
            raise InputError(
                f"model.path: the chat template and the prompt's words hold {len(pieces) - 1} '<video>' slots for"
                f" {len(grids)} videos"
            )
        slots = [self._slot(config, grid) for grid in grids]
        whole = "".join(a + b for a, b in zip(pieces, [*slots, ""], strict=True))
        # as transformers' processors: a template may write the tokenizer's first token itself
        first = tokenizer.bos_token
        ids = tokenizer(whole, add_special_tokens=not (first and whole.startswith(first)))["input_ids"]
        input_ids = torch.tensor(ids)
        visual = self._visual(input_ids == tokenizer.convert_tokens_to_ids(self.placeholder))
        wanted = sum(self.geometry(config).tokens(grid) for grid in grids)
        if int(visual.sum()) != wanted:
            raise InputError(
                f"model.path: the prompt has {int(visual.sum())} tokens '{self.placeholder}' for {wanted} visual tokens"
                " (the tokenizer lacks that token, or the prompt's words hold it)"
            )
        return Prompt(input_ids, torch.arange(len(ids)).expand(3, -1), visual, list(grids))

    def _visual(self, placeholders: Tensor) -> Tensor:
        """Which of the placeholders [T] bool a visual feature replaces."""
        return placeholders

    def answer_ids(self, tokenizer: Any, answer: str) -> list[int]:
        ids = list(self._continuation(tokenizer, answer))
        if tokenizer.convert_tokens_to_ids(self.placeholder) in ids:
            raise InputError(f"an answer holds the visual placeholder '{self.placeholder}': {answer!r}")
        end = tokenizer.eos_token_id if self.turn_end is None else tokenizer.convert_tokens_to_ids(self.turn_end)
        if end is None or end == tokenizer.unk_token_id:
            raise InputError(f"model.path: the tokenizer has no token '{self.turn_end or 'eos'}' to end an answer")
        return [*ids, end]

    def _continuation(self, tokenizer: Any, answer: str) -> Sequence[int]:
        """The tokens of an answer's text where it follows the prompt."""
        return tokenizer(answer, add_special_tokens=False)["input_ids"]

    def encode_vision(self, model: nn.Module, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        inner = unwrap(model)
        side = self.geometry(inner.config).side
        return self._frames(inner.model, pixel_values.view(-1, 3, side, side))

    def model_positions(self, position_ids: Tensor) -> Tensor:
        return position_ids[0]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        inner = unwrap(model)
        if inner not in _towers:
            tower = nn.ModuleList()
            for name in self.vision_modules:
                part = getattr(inner.model, name)
                if isinstance(part, nn.Module):
                    tower.append(part)
                else:
                    tower.register_parameter(name, part)
            _towers[inner] = tower
        return _towers[inner]


def square(config: Any, size: Any, patch: Any) -> tuple[int, int]:
    """(side, patch) of a tower's ``image_size`` and ``patch_size``, numbers or pairs. Raises InputError for another
    shape than a square."""
    sides = {*(size if isinstance(size, (list, tuple)) else [size])}
    patches = {*(patch if isinstance(patch, (list, tuple)) else [patch])}
    if len(sides) > 1 or len(patches) > 1:
        raise InputError(f"model.path: {config.model_type} with frames of {size} in patches of {patch} is not square")
    return sides.pop(), patches.pop()
