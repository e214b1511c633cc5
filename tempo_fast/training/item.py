"""A record as it waits to be trained on: its response tree, packed.

A prompt of 16,000 tokens takes half a megabyte as tensors, and an answer's token 36 bytes as a Python integer. A stage
of a hundred thousand records would not fit into memory so, packed it does; a tree is unpacked when it is needed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch

from tempo_fast.files import canonical_json
from tempo_fast.models.family import Grid, Prompt
from tempo_fast.trees.layout import Branch, ResponseTree


class Item:
    """One tree with what planning and the metrics want to know of it.

    Args:
        tree: branch 0 is the chosen answer, the others are the rejected ones.
        kinds: perturbation kind of each pair.
        r: difficulty of its pairs.

    Attributes:
        id, plans, n_tokens: the tree's.
        digest: of everything that decides what the record does to training (hex).
        group: the same for records about the same video (or, where there is none, with the same prompt).
        unaligned: key phrases that cover no token.
    """

    __slots__ = ("_alive", "_packed", "digest", "group", "id", "kinds", "n_tokens", "plans", "r", "unaligned")

    def __init__(self, tree: ResponseTree, kinds: list[str], r: int = 0) -> None:
        self.kinds, self.r = kinds, r
        self.id, self.plans, self.n_tokens = tree.id, tree.plans, tree.n_tokens
        self.unaligned = len(tree.unaligned)
        packed = _pack(tree)
        sizes, visual, grids, unaligned = packed[-1]
        keys = [p.key for p in tree.plans]
        prompt = hashlib.sha256(b"".join(packed[:2]))
        self.group = "|".join(keys) or prompt.hexdigest()
        rest = [tree.id, kinds, keys, sizes, len(packed[0]), grids, unaligned]
        whole = hashlib.sha256(b"".join([canonical_json(rest).encode(), visual.tobytes(), *packed[:-1]]))
        self.digest = whole.hexdigest()[:32]
        self._packed = zlib.compress(pickle.dumps(packed), 1)
        self._alive: Callable[[], ResponseTree | None] = weakref.ref(tree)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "_alive"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self._alive = _nothing

    @property
    def n_pairs(self) -> int:
        return len(self.kinds)

    @property
    def tree(self) -> ResponseTree:
        """The tree; the same object as long as somebody holds it."""
        tree = self._alive()
        if tree is None:
            tree = _unpack(pickle.loads(zlib.decompress(self._packed)), self.id, self.plans)  # noqa: S301 - our own
            self._alive = weakref.ref(tree)
        return tree


def _nothing() -> None:
    """Stands for the tree that nobody has unpacked yet."""


class Trees(Sequence[ResponseTree]):
    """The trees of items, each unpacked when it is asked for."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, at: int) -> ResponseTree: ...

    @overload
    def __getitem__(self, at: slice) -> Trees: ...

    def __getitem__(self, at: int | slice) -> ResponseTree | Trees:
        return Trees(self.items[at]) if isinstance(at, slice) else self.items[at].tree


def _pack(tree: ResponseTree) -> tuple[Any, ...]:
    """(prompt ids, prompt positions, answers, spans, the rest); bytes but for the last. Neighbouring numbers of prompts
    and positions mostly differ by a constant, so that differences pack well."""
    prompt = tree.prompt
    ids = _differences(prompt.input_ids.numpy())
    positions = _differences(prompt.position_ids.numpy())
    answers = np.concatenate([np.asarray(b.input_ids, np.int32) for b in tree.branches]).tobytes()
    marks = [[row if any(row) else 0 for row in rows] for rows in ([b.spans for b in tree.branches], tree.pair_spans)]
    spans = json.dumps(marks).encode()
    sizes = [len(b.input_ids) for b in tree.branches]
    rest = (sizes, np.packbits(prompt.visual.numpy()), [tuple(g) for g in prompt.grids], tree.unaligned)
    return ids, positions, answers, spans, rest


def _unpack(packed: tuple[Any, ...], id_: str, plans: list[Any]) -> ResponseTree:
    ids, positions, answers, spans, (sizes, visual, grids, unaligned) = packed
    input_ids = _sums(ids, 1)[0]
    shown = torch.from_numpy(np.unpackbits(visual, count=len(input_ids)).astype(bool))
    prompt = Prompt(input_ids, _sums(positions, 3), shown, [Grid(*g) for g in grids])
    tokens = np.frombuffer(answers, np.int32).tolist()
    marks, pair_spans = json.loads(spans)
    pair_spans = [row or [0] * sizes[0] for row in pair_spans]
    branches, start = [], 0
    for size, marked in zip(sizes, marks, strict=True):
        branches.append(Branch.of(tokens[start : start + size], marked or None))
        start += size
    return ResponseTree(id_, prompt, branches, plans, list(unaligned), pair_spans)


def _differences(values: Any) -> bytes:
    """Along the last axis, the first against 0, in 32 bits."""
    return np.diff(values.astype(np.int32), axis=-1, prepend=np.int32(0)).tobytes()


def _sums(data: bytes, rows: int) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.int32).reshape(rows, -1).cumsum(axis=-1, dtype=np.int64))
