"""The sides of ``python -m bench step``: one optimizer step over the same records, in several ways.

Shapes: B rows, T tokens of a row, N answer tokens, D hidden size, V vocabulary.

Ours are the training's own pieces: trees, ``TrainModule``, the loss head. The rows are what other trainers do: chosen
and rejected of each pair, every one behind its own copy of prompt and video, padded to one length, through
transformers' own causal attention, and float32 log-softmax of the logits of the answers alone, or of all positions.
All sides train one model through one engine, at a learning rate of 0, so that all always see the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import Marks
from bench.steps.shapes import Reader, Shape, make_bundle, make_items
from tempo_fast.config import TrainConfig
from tempo_fast.models.load import Bundle
from tempo_fast.reference.fill import reference_mode
from tempo_fast.runtime.engine import make_train_engine
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.activations import set_recompute
from tempo_fast.training.adapters import trainable_parameters
from tempo_fast.training.data import Item, branch_batch
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import PackedBatch, collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import ResponseTree
from tempo_fast.trees.vision import FeatureCache, evaluating
from tempo_kernels.head import HeadStatistics, head_statistics
from tempo_kernels.objectives import make_objective

SECTIONS = ("vision", "reference", "llm", "head", "optimizer", "other")


@dataclass(frozen=True)
class Side:
    """``records`` of a micro-batch (0: one pair), trees or rows, a live reference or the cached one, all logits or
    those of the answers."""

    name: str
    records: int
    trees: bool
    live: bool = False
    all_logits: bool = False


SIDES = {
    side.name: side
    for side in (
        Side("tree_4", 4, trees=True),
        Side("tree_1", 1, trees=True),
        Side("tree_1_live", 1, trees=True, live=True),
        Side("rows", 0, trees=False),
        Side("rows_1", 1, trees=False),
        Side("rows_4", 4, trees=False),
        Side("rows_live", 0, trees=False, live=True),
        Side("full_live", 0, trees=False, live=True, all_logits=True),
    )
}


class Sections:
    """Time by section: each mark ends what ran and names what runs next."""

    def __init__(self, device: str) -> None:
        self._marks, self._names = Marks(device), list[str]()

    def enter(self, name: str) -> None:
        self._marks.mark()
        self._names.append(name)

    def milliseconds(self) -> tuple[dict[str, float], float, float]:
        """Wall clock of each section, of all, and the host's CPU time of all. Waits for the device."""
        marks, found = self._marks, dict.fromkeys(SECTIONS, 0.0)
        for i, name in enumerate(self._names[:-1]):
            found[name] += marks.between(i, i + 1)
        last = len(self._names) - 1
        return found, marks.between(0, last), 1e3 * (marks.cpu[last] - marks.cpu[0])


class _WatchedFamily:
    """The family, with marks around its language model in forward and backward."""

    def __init__(self, family: Any) -> None:
        self._family = family
        self.sections: Sections | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def hidden_states(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self._family.hidden_states(*args, **kwargs)
        sections = self.sections
        if sections is not None and hidden.requires_grad:
            sections.enter("head")
            hidden.register_hook(lambda gradient: sections.enter("llm"))
        return hidden


@dataclass
class Counts:
    """Of one step: LLM tokens with gradient and without (the live reference), padding included; videos encoded."""

    tokens: int = 0
    reference_tokens: int = 0
    videos: int = 0


class Rig:
    """One model and its engine, and records of one case.

    Args:
        shape: which model, how long.
        policy: of every side, as ``train.gradient_checkpointing``.
        cached_vision: features are in the cache before the step; else trees encode each video once, and rows each
            video once per row, as a processor that repeats it with its prompt makes a model do.
        attention: of the trees, as ``train.attention``.
        liger: Liger's kernels in the text model, for every side, as ``train.liger_kernels``.
    """

    def __init__(
        self,
        shape: Shape,
        device: str,
        dtype: torch.dtype,
        *,
        policy: str,
        cached_vision: bool,
        attention: str,
        liger: bool = False,
    ) -> None:
        self.shape, self.device, self.policy, self.cached_vision = shape, device, policy, cached_vision
        self.bundle: Bundle = make_bundle(shape, device, dtype, liger)
        self.reader, self.cache = Reader(self.bundle.device, dtype), FeatureCache(max_bytes=1 << 34)
        self.family = _WatchedFamily(self.bundle.family)
        self.attention = attention
        model: Any = self.bundle.model
        model.train()
        self.bundle.family.vision_tower(model).eval()
        set_recompute(model, policy)
        self.objective = make_objective("dpo", beta=0.1, sft_weight=1.0)
        self.module = TrainModule(model, self.family, self.objective, attention)  # type: ignore[arg-type]
        self.engine = make_train_engine(self.module, trainable_parameters(self.module), TrainConfig(), Ranks())
        self.items: list[Item] = []
        self._statistics: dict[tuple[str, int], HeadStatistics] = {}

    def load(self, records: int, rejected: int) -> None:
        """Make the records of a case; what was cached of the last one's goes."""
        self.items = make_items(self.shape, self.bundle, records, rejected)
        self._statistics.clear()
        self.cache.clear()
        for item in self.items:
            self.cache.features(self.family, self.bundle.model, self.reader, item.tree.plans)

    def batches(self, side: Side) -> list[list[Item]]:
        """The micro-batches of a step: trees, or for rows one tree of two branches per pair."""
        if side.trees:
            return [self.items[i : i + side.records] for i in range(0, len(self.items), side.records)]
        pairs = [[_pair(item, r) for r in range(1, len(item.tree.branches))] for item in self.items]
        if side.records == 0:
            return [[pair] for row in pairs for pair in row]
        groups = [pairs[i : i + side.records] for i in range(0, len(pairs), side.records)]
        return [[pair for row in group for pair in row] for group in groups]

    def pack(self, side: Side, items: Sequence[Item]) -> PackedBatch:
        return (collate if side.trees else collate_rows)([item.tree for item in items], self.bundle.device)

    def step(
        self, side: Side, sections: Sections, gradients: list[Tensor] | None = None, counts: Counts | None = None
    ) -> tuple[float, Counts]:
        """One optimizer step: its loss per pair, and ``counts`` with what it did added. ``gradients`` takes copies of
        the adapters' on the way."""
        losses, pairs = list[Tensor](), sum(item.n_pairs for item in self.items)
        counts = counts or Counts()
        sections.enter("other")
        for number, items in enumerate(self.batches(side)):
            packed = self.pack(side, items)
            sections.enter("vision")
            features = self._features(side, packed, counts)
            sections.enter("reference")
            reference = self._reference(side, number, packed, features, counts)
            sections.enter("llm")
            counts.tokens += packed.input_ids.numel()
            with self._watched(sections):
                loss = self._loss(side, items, packed, features, reference)
                self.engine.backward(loss / pairs)
            losses.append(loss.detach())
            sections.enter("other")
        if gradients is not None:
            gradients.extend(p.grad.detach().clone() for p in trainable_parameters(self.module).values())  # type: ignore[union-attr]
        sections.enter("optimizer")
        self.engine.step(0.0)
        sections.enter("other")
        return float(torch.stack(losses).sum()) / pairs, counts

    @contextmanager
    def _watched(self, sections: Sections) -> Iterator[None]:
        self.family.sections = sections
        try:
            yield
        finally:
            self.family.sections = None

    def _features(self, side: Side, packed: PackedBatch, counts: Counts) -> Tensor | None:
        model = self.bundle.model
        if self.cached_vision:
            return self.cache.features(self.family, model, self.reader, packed.plans)
        counts.videos += len(packed.plans)
        if side.trees:
            self.cache.clear()
            return self.cache.features(self.family, model, self.reader, packed.plans)
        pixels = torch.cat([self.reader.pixels(plan) for plan in packed.plans])
        with torch.no_grad(), evaluating(self.bundle.family.vision_tower(model)):
            return self.family.encode_vision(model, pixels, [plan.grid for plan in packed.plans])

    def _reference(
        self, side: Side, number: int, packed: PackedBatch, features: Tensor | None, counts: Counts
    ) -> HeadStatistics:
        """Log-probs under the model with its adapters off: kept from the first time, or computed now."""
        key = (side.name, number)
        if not side.live and key in self._statistics:
            return self._statistics[key]
        counts.reference_tokens += packed.input_ids.numel()
        with reference_mode(self.bundle.model):
            if side.trees:
                hidden = tree_hidden(self.family, self.bundle.model, packed, features, self.attention)
                head: Any = self.family.head(self.bundle.model)
                found = head_statistics(hidden, head.weight, packed.labels, kl=False)
            else:
                logp = self._rows_logp(side, packed, features)
                found = HeadStatistics(logp, torch.zeros_like(logp))
        if not side.live:
            self._statistics[key] = found
        return found

    def _loss(
        self, side: Side, items: Sequence[Item], packed: PackedBatch, features: Tensor | None, reference: HeadStatistics
    ) -> Tensor:
        batch, kinds = branch_batch(items, packed)
        if side.trees:
            return self.engine(packed, batch, kinds, features=features, reference=reference)[0]
        logp = self._rows_logp(side, packed, features)
        return self.objective(logp, reference.logp, None, batch).losses.sum()

    def _rows_logp(self, side: Side, packed: PackedBatch, features: Tensor | None) -> Tensor:
        """[N] log-probs: right padding needs no mask, since nothing comes after it."""
        model = self.bundle.model
        hidden = self.family.hidden_states(
            model, packed.input_ids, packed.position_ids, None, packed.visual, features
        ).flatten(0, 1)
        head: Any = self.family.head(model)
        logits = head(hidden if side.all_logits else hidden[packed.gather]).float()
        log_p = torch.log_softmax(logits, -1)
        rows = packed.gather if side.all_logits else slice(None)
        return log_p[rows].gather(1, packed.labels[:, None])[:, 0]


def _pair(item: Item, rejected: int) -> Item:
    tree = item.tree
    branches = [tree.branches[0], tree.branches[rejected]]
    return Item(ResponseTree(f"{tree.id}/{rejected}", tree.prompt, branches, tree.plans), [item.kinds[rejected - 1]])
