"""Log-probs of many answers to many prompts about the same videos, the common prefix computed once.

All prompts about a video begin alike (its visual tokens come before the words), so the prefix runs once, its keys and
values are shared, and the rest of every prompt with each of its answers is a short row. Equal to separate full rows.

Shapes: C tokens of the common prefix, B rows, S tokens of a row after the prefix (right-padded), N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tempo_fast.models.family import Prompt
from tempo_fast.models.load import Bundle
from tempo_fast.runtime.head import gathered_head
from tempo_fast.trees.layout import prompt_of
from tempo_kernels.head import head_statistics

# keys and values of this many tokens are held at once, prefix included
MAX_TOKENS = 65536
# rows of one batch differ in length by at most this factor
LIKE = 0.6


@dataclass(frozen=True)
class Score:
    """Sum of the log-probs of an answer's tokens (the end of the turn included), and how many they are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens


@dataclass
class _Row:
    item: int
    answer: int
    ids: list[int]
    positions: Tensor
    n_answer: int


@torch.no_grad()
def score(
    bundle: Bundle, reader: Any, features: Any, plans: Sequence[Any], items: Sequence[tuple[str, Sequence[str]]]
) -> list[list[Score]]:
    """Score answers.

    Args:
        bundle: model (adapters that are on take part), tokenizer and family.
        reader, features: VideoReader and FeatureCache.
        plans: the videos of every prompt.
        items: (prompt text, answers); answers of zero tokens score their end of turn alone.

    Returns:
        Per item one Score per answer.
    """
    if not items:
        return []
    model, family = bundle.model, bundle.family
    prompts = [prompt_of(family, bundle.tokenizer, bundle.config, text, plans) for text, _ in items]
    cut = common_prefix(prompts)
    if bool(prompts[0].visual[cut:].any()):
        raise ValueError("the prompts differ before their videos; the family must put videos first")
    rows = []
    for i, (prompt, (_, answers)) in enumerate(zip(prompts, items, strict=True)):
        for j, answer in enumerate(answers):
            ids = family.answer_ids(bundle.tokenizer, answer)
            tail = torch.arange(prompt.next_position, prompt.next_position + len(ids)).expand(3, -1)
            positions = torch.cat([prompt.position_ids[:, cut:], tail], dim=1)
            rows.append(_Row(i, j, prompt.input_ids[cut:].tolist() + ids, positions, len(ids)))
    mode = model.training
    model.eval()
    try:
        visual = features.features(family, model, reader, plans)
        shared = _prefix(bundle, prompts[0], cut, visual)
        out: list[list[Score]] = [[Score(0.0, 1)] * len(answers) for _, answers in items]
        for batch in _buckets(rows, cut):
            for row, value in zip(batch, _rows(bundle, batch, cut, shared), strict=True):
                out[row.item][row.answer] = value
    finally:
        model.train(mode)
    return out


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts begin with; at least one token of each prompt is left, to predict from."""
    shortest = min(len(p.input_ids) for p in prompts) - 1
    ids, positions = prompts[0].input_ids[:shortest], prompts[0].position_ids[:, :shortest]
    same = torch.ones(shortest, dtype=torch.bool)
    for p in prompts[1:]:
        same &= (p.input_ids[:shortest] == ids) & (p.position_ids[:, :shortest] == positions).all(0)
    return int(same.long().cumprod(0).sum())


def _prefix(bundle: Bundle, prompt: Prompt, cut: int, visual: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, heads, C, d] of every layer."""
    if cut == 0:
        return []
    cache = bundle.family.new_cache(bundle.model)
    ids, positions = prompt.input_ids[None, :cut], prompt.position_ids[:, None, :cut]
    ids, positions, slots = (x.to(bundle.device) for x in (ids, positions, prompt.visual[None, :cut]))
    bundle.family.hidden_states(bundle.model, ids, positions, None, slots, visual, cache)
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers]


def _buckets(rows: Sequence[_Row], cut: int) -> list[list[_Row]]:
    buckets: list[list[_Row]] = []
    for row in sorted(rows, key=lambda r: (-len(r.ids), r.item, r.answer)):
        last = buckets[-1] if buckets else None
        if last is not None:
            longest = len(last[0].ids)
            if len(row.ids) >= LIKE * longest and (len(last) + 1) * (cut + longest) <= MAX_TOKENS:
                last.append(row)
                continue
        buckets.append([row])
    return buckets


def _rows(bundle: Bundle, rows: Sequence[_Row], cut: int, shared: Sequence[tuple[Tensor, Tensor]]) -> list[Score]:
    family, model, device = bundle.family, bundle.model, bundle.device
    n, longest = len(rows), max(len(r.ids) for r in rows)
    ids = torch.zeros((n, longest), dtype=torch.long)
    positions = torch.zeros((3, n, longest), dtype=torch.long)
    mask = torch.zeros((n, cut + longest), dtype=torch.long)
    where, labels = [], []
    for i, row in enumerate(rows):
        length = len(row.ids)
        ids[i, :length], positions[:, i, :length] = torch.tensor(row.ids), row.positions
        mask[i, : cut + length] = 1
        start = length - row.n_answer
        where += [i * longest + t - 1 for t in range(start, length)]
        labels += row.ids[start:]
    cache = family.new_cache(model)
    for layer, (keys, values) in enumerate(shared):
        cache.update(keys.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1), layer)
    ids, positions, mask = (x.to(device) for x in (ids, positions, mask))
    hidden = family.hidden_states(model, ids, positions, mask, torch.zeros_like(ids, dtype=torch.bool), None, cache)
    picked = hidden.flatten(0, 1)[torch.tensor(where, device=device)]
    with gathered_head(family.head(model)) as weight:
        logp = head_statistics(picked, weight, torch.tensor(labels, device=device), kl=False).logp
    parts = logp.double().cpu().split([r.n_answer for r in rows])
    return [Score(float(p.sum()), len(p)) for p in parts]
