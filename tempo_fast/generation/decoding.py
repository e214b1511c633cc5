"""Continuous batching: answers that are finished leave the batch, waiting ones enter.

Shapes: B answers, L tokens of the longest prompt of a call (left-padded), V vocabulary, G visual tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo_fast.generation.sampling import PrivateSampling, choose, penalise
from tempo_fast.generation.slots import Slots
from tempo_fast.models.family import Prompt
from tempo_fast.models.load import Bundle

MAX_BATCH_TOKENS = 65536
"""Tokens that answers in progress may hold, each counted as long as the longest: bounds the key-value cache."""
MAX_PREFILL_TOKENS = 16384
"""Padded prompt tokens of one call: bounds its activations and masks."""
SHARE = 4
"""Waiting answers enter once one in so many slots is free: a prompt alone in a call costs about as much as eight."""


@dataclass
class Answer:
    """One answer in progress. ``key`` is equal for equal prompts about equal videos, which are read once."""

    index: int
    prompt: Prompt
    key: Hashable
    limit: int
    sampling: PrivateSampling | None
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """Runs a model over answers.

    Explicit M-RoPE positions go in: an answer's tokens follow the largest position of its prompt on any axis, and run
    on by one on all (the pretraining rule).

    Args:
        features: of the visual tokens of some answers in order, [G, E], or None when there are none.
        stops: tokens that end an answer; they are not part of it.
        penalty: of tokens that a prompt or its answer holds already; 1 is none.
        slots: most answers in progress.
        static: no answer enters before all others are finished; for comparison.
    """

    def __init__(
        self,
        bundle: Bundle,
        features: Callable[[Sequence[Answer]], Tensor | None],
        stops: Sequence[int],
        penalty: float,
        slots: int,
        *,
        static: bool = False,
    ) -> None:
        self.bundle, self.features, self.stops, self.penalty = bundle, features, frozenset(stops), penalty
        self.slots, self.static = slots, static
        self.steps = 0
        tokenizer = bundle.tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @torch.no_grad()
    def run(self, answers: Sequence[Answer]) -> Iterator[Answer]:
        """Finished answers, as they come; they enter in the order given. The model must be in eval mode."""
        waiting = deque(answers)
        running: list[Answer] = []
        held = Slots()
        seen = torch.zeros(0)
        while waiting or running:
            free = self.slots - len(running)
            if waiting and (not running or (not self.static and free * SHARE >= self.slots)):
                entering = self._entering(waiting, running, held)
                for group in _groups(entering):
                    scores, groups_seen, places, cache = self._prefill(group)
                    going = [i for i, done in enumerate(self._add(group, scores, groups_seen)) if not done]
                    yield from (a for i, a in enumerate(group) if i not in going)
                    if going:
                        held.admit(cache, [places[i] for i in going])
                        running += [group[i] for i in going]
                        if self.penalty != 1:
                            seen = torch.cat([seen, groups_seen[going]]) if len(seen) else groups_seen[going]
                    del cache
            if not running:
                continue
            done = self._add(running, self._step(running, held), seen)
            for slot in sorted((i for i, over in enumerate(done) if over), reverse=True):
                yield running[slot]
                held.drop(slot)
                last = running.pop()
                if slot < len(running):
                    running[slot] = last
                if self.penalty != 1:
                    seen[slot] = seen[len(running)]
                    seen = seen[: len(running)]

    def _entering(self, waiting: deque[Answer], running: Sequence[Answer], held: Slots) -> list[Answer]:
        """As many as find a slot and room; one at least where nothing runs."""
        out: list[Answer] = []
        longest = max(held.lengths, default=0)
        while waiting and len(running) + len(out) < self.slots:
            longest = max(longest, len(waiting[0].prompt.input_ids))
            if (running or out) and (len(running) + len(out) + 1) * longest > MAX_BATCH_TOKENS:
                break
            out.append(waiting.popleft())
        return out

    def _prefill(self, group: Sequence[Answer]) -> tuple[Tensor, Tensor, list[tuple[int, int]], object]:
        """Scores [B, V] of the first tokens, which tokens each prompt holds [B, V] (empty without a penalty), and where
        in the cache each prompt lies: its row and its first token."""
        b, device = self.bundle, self.bundle.device
        distinct = {a.key: a for a in group}
        rows = {key: row for row, key in enumerate(distinct)}
        prompts = [a.prompt for a in distinct.values()]
        ids, positions, mask, visual = (x.to(device) for x in left_pad(prompts, self._pad))
        cache = b.family.new_cache(b.model)
        features = self.features(list(distinct.values()))
        padded = None if bool(mask.all()) else mask
        hidden = b.family.hidden_states(b.model, ids, positions, padded, visual, features, cache)
        scores = b.family.head(b.model)(hidden[:, -1]).float()
        seen = scores.new_zeros(0, dtype=torch.bool)
        order = [rows[a.key] for a in group]
        if self.penalty != 1:
            # padding says nothing of the pad token
            seen = torch.zeros_like(scores, dtype=torch.int64).scatter_add(1, ids, mask)[order] > 0
        places = [(rows[a.key], ids.shape[1] - len(a.prompt.input_ids)) for a in group]
        return scores[order], seen, places, cache

    def _step(self, running: Sequence[Answer], held: Slots) -> Tensor:
        """Scores [B, V] of the next tokens."""
        b, device = self.bundle, self.bundle.device
        self.steps += 1
        last = torch.tensor([[a.tokens[-1], a.prompt.next_position + len(a.tokens) - 1] for a in running]).to(device)
        ids, positions = last[:, :1], last[:, 1:].expand(3, -1, -1)
        mask = held.open(device)
        hidden = b.family.hidden_states(b.model, ids, positions, mask, torch.zeros_like(ids).bool(), None, held.cache)
        return b.family.head(b.model)(hidden[:, -1]).float()

    def _add(self, answers: Sequence[Answer], scores: Tensor, seen: Tensor) -> list[bool]:
        """Choose a token for each answer; whether it is finished."""
        if self.penalty != 1:
            scores = penalise(scores, seen, self.penalty)
        done = []
        for a, token in zip(answers, choose(scores, [a.sampling for a in answers]), strict=True):
            if token not in self.stops:
                a.tokens.append(token)
            done.append(token in self.stops or len(a.tokens) >= a.limit)
        if self.penalty != 1:
            tokens = torch.tensor([a.tokens[-1] if a.tokens else 0 for a in answers], device=scores.device)
            seen.scatter_(1, tokens[:, None], True)  # of one that is finished it does not matter
        return done


def _groups(answers: Sequence[Answer]) -> Iterator[list[Answer]]:
    """Answers whose prompts are read in one call."""
    group: list[Answer] = []
    keys: set[Hashable] = set()
    longest = 0
    for a in answers:
        wide = max(longest, len(a.prompt.input_ids))
        if group and len(keys | {a.key}) * wide > MAX_PREFILL_TOKENS:
            yield group
            group, keys, wide = [], set(), len(a.prompt.input_ids)
        group.append(a)
        keys.add(a.key)
        longest = wide
    if group:
        yield group


def left_pad(prompts: Sequence[Prompt], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input_ids [B, L], position_ids [3, B, L], attention mask [B, L] int64, visual [B, L] bool; padded on the left."""
    n, longest = len(prompts), max(len(p.input_ids) for p in prompts)
    ids = torch.full((n, longest), pad)
    positions = torch.zeros((3, n, longest), dtype=torch.long)
    mask = torch.zeros((n, longest), dtype=torch.long)
    visual = torch.zeros((n, longest), dtype=torch.bool)
    for i, p in enumerate(prompts):
        start = longest - len(p.input_ids)
        ids[i, start:], positions[:, i, start:] = p.input_ids, p.position_ids
        mask[i, start:], visual[i, start:] = 1, p.visual
    return ids, positions, mask, visual
