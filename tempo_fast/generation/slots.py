"""The keys and values of answers in progress, each in a slot of its own.

A slot is filled from the left, so that answers of any length stand side by side without padding, a finished one leaves
at once and the next takes its place; ``DynamicCache`` would pad all to one length and copy everything at every token.
Rotary positions are in the keys already: where a key lies decides nothing.

Shapes: B answers, H key-value heads, W the longest answer with its prompt, in tokens, E channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from tempo_fast.errors import InputError

ROOM = 64
"""Fewest tokens by which slots grow."""


class Slots:
    """Starts empty. ``cache`` is what the language model is given, for one token of every answer at a time.

    Attributes:
        lengths: tokens held, per answer.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.cache: Any = None
        self._layers: list[_SlotLayer] = []
        self._rows = self._width = 0

    def admit(self, prefilled: Any, places: list[tuple[int, int]]) -> None:
        """Append answers: of each, the row of the prefilled ``DynamicCache`` and where in it its tokens start, behind
        the padding. Raises InputError for a model whose layers keep a window of the past or a state."""
        if any(type(layer) is not DynamicLayer for layer in prefilled.layers):
            kind = next(type(layer).__name__ for layer in prefilled.layers if type(layer) is not DynamicLayer)
            raise InputError(f"model.path: generation keeps whole keys and values, this model has a {kind}")
        if not self._layers:
            self._layers = [_SlotLayer(self) for _ in prefilled.layers]
            self.cache = Cache(layers=list(self._layers))
        length, first = prefilled.get_seq_length(), len(self.lengths)
        lengths = self.lengths + [length - start for _, start in places]
        self._reserve(len(lengths), max(lengths) + 1, prefilled)
        for mine, layer in zip(self._layers, prefilled.layers, strict=True):
            assert mine.keys is not None and mine.values is not None
            for slot, (row, start) in enumerate(places, first):
                mine.keys[slot, :, : length - start] = layer.keys[row, :, start:]
                mine.values[slot, :, : length - start] = layer.values[row, :, start:]
        self.lengths = lengths

    def open(self, device: torch.device) -> Tensor:
        """Make room for a token of every answer; the attention mask [B, W] int64 of the forward that adds it."""
        self.width = max(self.lengths) + 1
        self._reserve(len(self.lengths), self.width)
        self.places = torch.tensor(self.lengths, device=device)
        self.rows = torch.arange(len(self.lengths), device=device)
        self.lengths = [n + 1 for n in self.lengths]
        return (torch.arange(self.width, device=device) <= self.places[:, None]).long()

    def drop(self, slot: int) -> None:
        """Forget an answer; the last one takes its slot."""
        last = self.lengths.pop()
        if slot == len(self.lengths):
            return
        self.lengths[slot] = last
        for layer in self._layers:
            for held in (layer.keys, layer.values):
                assert held is not None
                held[slot, :, :last] = held[len(self.lengths), :, :last]

    def _reserve(self, rows: int, width: int, like: Any = None) -> None:
        if rows <= self._rows and width <= self._width:
            return
        rows, width = max(rows, self._rows), width + max(ROOM, width // 8)
        filled, longest = len(self.lengths), max(self.lengths, default=0)
        for i, layer in enumerate(self._layers):
            for name in ("keys", "values"):
                old = getattr(layer, name)
                shape = old if old is not None else getattr(like.layers[i], name)
                # zeros: what the mask hides is multiplied by zero, and must be a number
                new = shape.new_zeros(rows, shape.shape[1], width, shape.shape[3])
                if old is not None:
                    new[:filled, :, :longest] = old[:filled, :, :longest]
                setattr(layer, name, new)
            layer.is_initialized = True
        self._rows, self._width = rows, width


class _SlotLayer(DynamicLayer):
    """keys and values [rows, H, width, E], of which the first B rows and W tokens are in use."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states and value_states [B, H, 1, E], each to its answer's own place."""
        s = self.slots
        assert self.keys is not None and self.values is not None and key_states.shape[2] == 1
        self.keys[s.rows, :, s.places] = key_states[:, :, 0]
        self.values[s.rows, :, s.places] = value_states[:, :, 0]
        n = len(s.lengths)
        return self.keys[:n, :, : s.width], self.values[:n, :, : s.width]

    def get_seq_length(self) -> int:
        """As if every answer were the longest: the mask says what is there."""
        return self.slots.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.width, 0
