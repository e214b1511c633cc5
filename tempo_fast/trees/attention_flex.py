"""FlexAttention over packed trees: one compiled kernel, a mask of 128 x 128 blocks made from where the trees stand.

Shapes: T tokens, H query heads, K key heads, d head size, N = ceil(T / BLOCK) blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tempo_fast.trees.batch import Extent

BLOCK = 128


class FlexAttention:
    """The attention of one packed row: query [1, H, T, d], key and value [1, K, T, d] -> [1, T, H, d]."""

    def __init__(self, extents: Sequence[Extent], device: torch.device) -> None:
        self.mask = block_mask(extents, device)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        out: Tensor = _compiled()(query, key, value, block_mask=self.mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous()


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def block_mask(extents: Sequence[Extent], device: torch.device | str = "cpu", block: int = BLOCK) -> Any:
    """torch's BlockMask of the trees of one row, equal to ``create_block_mask`` of the rule written out, which compares
    all T² pairs of tokens; this compares pairs of blocks, on the CPU, whatever the device.

    Every token sees an unbroken range of its prompt and an unbroken range of its own segment, up to itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    total = extents[-1].end
    starts, firsts, prompts = [], [], []  # of each segment: its first token, its tree's, the end of its prompt
    for e in extents:
        for at in (e.start, *accumulate(e.branches[:-1], initial=e.answers)):
            starts.append(at)
            firsts.append(e.start)
            prompts.append(e.answers)
    n = -(-total // block)
    edges = torch.unique(torch.tensor([*starts, *range(0, total, block)]))  # pieces lie in one segment and one block
    of = torch.searchsorted(torch.tensor(starts), edges, right=True) - 1
    start, first, prompt = (torch.tensor(x)[of].unsqueeze(1) for x in (starts, firsts, prompts))
    begin, end = edges.unsqueeze(1), torch.cat([edges[1:], torch.tensor([total])]).unsqueeze(1)
    left = torch.arange(n) * block
    right = left + block
    # of all queries of a piece the last sees most, the first least
    sees = (left < end) & (right > first) & ((left < prompt) | (right > start))
    covers = (left >= first) & (right <= begin + 1) & ((right <= prompt) | (left >= start) | (prompt >= start))
    home = edges // block
    some = torch.zeros(n, n, dtype=torch.int32).index_add_(0, home, sees.int()) > 0
    full = torch.zeros(n, n, dtype=torch.int32).index_add_(0, home, (~covers).int()) == 0
    full[total // block :] = False  # a block that the row does not fill
    rules = [x.squeeze(1).repeat_interleave((end - begin).squeeze(1)).int().to(device) for x in (start, first, prompt)]
    segment, tree, answers = rules

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= tree[query]) & ((key < answers[query]) | (key >= segment[query]))

    made = BlockMask.from_kv_blocks(
        *_ordered(some & ~full), *_ordered(full), BLOCK_SIZE=block, mask_mod=allowed, seq_lengths=(total, total)
    )
    return made.to(device)


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[N, N] bool -> how many a row has [1, 1, N], and which, those first and in order [1, 1, N, N], int32."""
    which = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], which.int()[None, None].contiguous()
