"""Trees as tensors: one packed row (the fast way), or one padded row per answer (the slow way, for comparison).

Shapes: B rows, T tokens of a row, N response tokens, D hidden size. In flat indices B and T run together as B*T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tempo_fast.trees.layout import ResponseTree

PROMPT = -1
PADDING = -1


class Extent(NamedTuple):
    """Where a tree stands in its row: from token ``start`` its prompt, then its branches, of so many tokens each."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def answers(self) -> int:
        """The first token of the first branch."""
        return self.start + self.prompt

    @property
    def end(self) -> int:
        """One behind the last token."""
        return self.answers + sum(self.branches)


@dataclass
class PackedBatch:
    """A micro-batch. Its N response tokens stand branch after branch, in the order of the trees.

    A branch number counts over the whole batch. ``branch_ids`` is -1 on prompts, ``tree_ids`` -1 on padding.
    """

    input_ids: Tensor
    """[B, T] int64; B is 1 for a packed row."""
    position_ids: Tensor
    """[3, B, T] int64, M-RoPE axes t, h, w."""
    branch_ids: Tensor
    """[B*T] int64."""
    tree_ids: Tensor
    """[B*T] int64."""
    visual: Tensor
    """[B, T] bool: placeholders, filled with visual features in reading order."""
    gather: Tensor
    """[N] int64 into B*T: the position whose hidden state predicts the token; for the first token of a branch the
    last of its prompt, taken once per branch."""
    labels: Tensor
    """[N] int64."""
    branch: Tensor
    """[N] int64."""
    spans: Tensor
    """[N] int64: 0 outside, k inside the k-th span of the branch."""
    tree_branches: list[list[int]]
    """Branch numbers of each tree."""
    extents: list[Extent]
    """The layout as numbers, for attention. A packed row is its trees without a gap, in order. Several rows are of one
    tree with one branch each (every answer with its own copy of the prompt), padding behind."""
    plans: list[Any]
    """Videos in reading order of their slots; a video stands once per row that shows it."""
    n_tokens: int
    """Tokens that are not padding."""

    @property
    def n_branches(self) -> int:
        return sum(len(b) for b in self.tree_branches)

    def allowed(self) -> Tensor:
        """[B, T, T] bool: query sees key. Same tree, not later, and the key is prompt or of the query's branch.

        Padding sees itself alone, so that no row of the softmax is empty.
        """
        b, t = self.input_ids.shape
        tree, branch = self.tree_ids.view(b, t), self.branch_ids.view(b, t)
        order = torch.arange(t, device=tree.device)
        seen = (tree[:, :, None] == tree[:, None, :]) & (tree[:, :, None] != PADDING)
        seen &= (branch[:, None, :] == PROMPT) | (branch[:, :, None] == branch[:, None, :])
        seen &= order[:, None] >= order
        return seen | torch.eye(t, dtype=torch.bool, device=tree.device)

    def mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[B, 1, T, T] additive mask: 0 where the query sees the key, the dtype's lowest value elsewhere.

        Always explicit: transformers may read positions that start again as the packing of separate sequences.
        Additive, because its eager attention adds whatever mask it is given (a bool one would raise scores by 1).
        """
        allowed = self.allowed().unsqueeze(1)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return mask.masked_fill_(~allowed, torch.finfo(dtype).min)


class _Row:
    """A row under construction."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.visual: list[Tensor] = []
        self.branch: list[Tensor] = []
        self.tree: list[Tensor] = []
        self.length = 0
        self.trees: list[tuple[int, int, list[int]]] = []  # start, prompt tokens, tokens of each branch

    def add(self, ids: Tensor, positions: Tensor, visual: Tensor, branch: int, tree: int) -> int:
        """Append and return the row index of the first token."""
        start, n = self.length, len(ids)
        self.ids.append(ids)
        self.positions.append(positions)
        self.visual.append(visual)
        self.branch.append(torch.full((n,), branch))
        self.tree.append(torch.full((n,), tree))
        self.length += n
        if branch == PROMPT:
            self.trees.append((start, n, []))
        else:
            self.trees[-1][2].append(n)
        return start


def _add_branch(row: _Row, tree: ResponseTree, k: int, prompt_end: int, branch: int, tree_id: int) -> Tensor:
    """Append branch ``k`` and return the row indices [n] that predict its tokens."""
    ids = torch.tensor(tree.branches[k].input_ids, dtype=torch.int64)
    n = len(ids)
    positions = (tree.prompt.next_position + torch.arange(n)).expand(3, -1)
    start = row.add(ids, positions, torch.zeros(n, dtype=torch.bool), branch, tree_id)
    return torch.cat([torch.tensor([prompt_end]), torch.arange(start, start + n - 1)])


def _finish(
    rows: Sequence[_Row], gather: list[Tensor], trees: Sequence[ResponseTree], plans: list[Any], device: Any
) -> PackedBatch:
    """``gather`` holds per branch the flat indices over the unpadded width ``T = max row length``."""
    width = max(r.length for r in rows)

    def stack(pieces: Sequence[list[Tensor]], fill: int | bool) -> Tensor:
        out = []
        for piece in pieces:
            joined = torch.cat(piece, dim=-1)
            pad = width - joined.shape[-1]
            out.append(torch.nn.functional.pad(joined, (0, pad), value=fill) if pad else joined)
        return torch.stack(out, dim=-2)

    tree_branches: list[list[int]] = []
    n = 0
    for tree in trees:
        tree_branches.append(list(range(n, n + len(tree.branches))))
        n += len(tree.branches)
    branches = [b for tree in trees for b in tree.branches]
    lengths = torch.tensor([len(b.input_ids) for b in branches])
    batch = PackedBatch(
        input_ids=stack([r.ids for r in rows], 0),
        position_ids=stack([r.positions for r in rows], 0),
        branch_ids=stack([r.branch for r in rows], PROMPT).flatten(),
        tree_ids=stack([r.tree for r in rows], PADDING).flatten(),
        visual=stack([r.visual for r in rows], False),
        gather=torch.cat(gather),
        labels=torch.tensor([t for b in branches for t in b.input_ids], dtype=torch.int64),
        branch=torch.repeat_interleave(torch.arange(len(branches)), lengths),
        spans=torch.tensor([s for b in branches for s in b.spans], dtype=torch.int64),
        tree_branches=tree_branches,
        extents=[Extent(start, n, tuple(ks)) for r in rows for start, n, ks in r.trees],
        plans=plans,
        n_tokens=sum(r.length for r in rows),
    )
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(device))
    return batch


def collate(trees: Sequence[ResponseTree], device: torch.device | str = "cpu") -> PackedBatch:
    """Trees one after the other in one row: prompt, then its branches."""
    if not trees:
        raise ValueError("collate needs at least one tree")
    row, gather, branch = _Row(), [], 0
    for t, tree in enumerate(trees):
        prompt = tree.prompt
        end = row.add(prompt.input_ids, prompt.position_ids, prompt.visual, PROMPT, t) + len(prompt.input_ids) - 1
        for k in range(len(tree.branches)):
            gather.append(_add_branch(row, tree, k, end, branch, t))
            branch += 1
    return _finish([row], gather, trees, [p for tree in trees for p in tree.plans], device)


def collate_rows(trees: Sequence[ResponseTree], device: torch.device | str = "cpu") -> PackedBatch:
    """Every answer as a row of its own behind its own copy of the prompt, padded on the right: what other trainers do.

    The N response tokens stand in the same order as in ``collate``. Videos repeat with their prompts.
    """
    if not trees:
        raise ValueError("collate_rows needs at least one tree")
    rows: list[_Row] = []
    pieces: list[Tensor] = []
    plans: list[Any] = []
    for t, tree in enumerate(trees):
        prompt = tree.prompt
        for k in range(len(tree.branches)):
            row = _Row()
            row.add(prompt.input_ids, prompt.position_ids, prompt.visual, PROMPT, t)
            pieces.append(_add_branch(row, tree, k, len(prompt.input_ids) - 1, len(rows), t))
            rows.append(row)
            plans += tree.plans
    width = max(r.length for r in rows)
    gather = [piece + i * width for i, piece in enumerate(pieces)]
    return _finish(rows, gather, trees, plans, device)
