"""Filling the store with the model itself, adapters off, and checking at every start that both still agree."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tempo_fast.errors import InputError
from tempo_fast.models.load import Bundle
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.head import gathered_head
from tempo_fast.runtime.progress import progress as progress_bar
from tempo_fast.runtime.ranks import Ranks, current_ranks
from tempo_fast.trees.batch import collate
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import ResponseTree
from tempo_fast.trees.packing import pack
from tempo_fast.trees.vision import FeatureCache, PixelSource, evaluating
from tempo_kernels.head import HeadStatistics, head_statistics

# Where the start check stops a run: several times the noise it measures, and never below these (nats per token)
_NOISE_FACTOR = 8.0
_FLOOR = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float64: 1e-6}


@dataclass
class FillReport:
    """Distinct answers computed by this fill (by all ranks), found in the store, and response tokens computed."""

    computed: int = 0
    present: int = 0
    tokens: int = 0


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """The model as reference: adapters off, eval mode, no graph, torch's generators left as they were.

    Restores each module's mode and each parameter's ``requires_grad`` (peft switches them on when it comes back).
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    disable = getattr(model, "disable_adapter", None)
    adapters_off: Any = disable() if callable(disable) else nullcontext()
    devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluating(model):
        try:
            with adapters_off:
                yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)


def statistics(
    bundle: Bundle, trees: Sequence[ResponseTree], reader: PixelSource, features: FeatureCache, *, kl: bool
) -> HeadStatistics:
    """Statistics of ``trees`` in one packed row under the reference. Call inside ``reference_mode``."""
    packed = collate(trees, bundle.device)
    visual = features.features(bundle.family, bundle.model, reader, packed.plans)
    hidden = tree_hidden(bundle.family, bundle.model, packed, visual)
    with gathered_head(bundle.family.head(bundle.model)) as weight:
        return head_statistics(hidden, weight, packed.labels, kl=kl)


def fill(
    bundle: Bundle,
    store: ReferenceStore,
    trees: Sequence[ResponseTree],
    reader: PixelSource,
    features: FeatureCache,
    *,
    kl: bool,
    max_tokens: int,
    progress: str = "reference",
    ranks: Ranks | None = None,
) -> FillReport:
    """Compute and store what is missing of ``trees``: each answer once, whatever the number of trees that hold it.

    Trees are cut down to their missing branches, packed to ``max_tokens`` as in training and run with adapters off.
    Each pack is one shard, so that an interrupted fill loses one pack. With several ranks each computes its share.

    Args:
        kl: also store what the exact KL needs; entries without it are computed again.
        progress: name of the progress bar.
        ranks: None takes the process group as it is.

    Raises:
        InputError: a tree longer than ``max_tokens`` (before anything is decoded), a full disk.
    """
    ranks = ranks or current_ranks()
    keys = [[store.key(tree, b) for b in range(len(tree.branches))] for tree in trees]
    every = dict.fromkeys(key for row in keys for key in row)
    # what any rank lacks; gathering is also the point before which no rank writes
    absent = {key for part in ranks.all_gather_object(store.missing(list(every), kl=kl)) for key in part}
    report = FillReport(computed=len(absent), present=len(every) - len(absent))
    todo: list[tuple[ResponseTree, list[str]]] = []
    left = set(absent)
    for tree, row in zip(trees, keys, strict=True):
        wanted: dict[str, int] = {key: b for b, key in enumerate(row) if key in left}
        if wanted:
            left -= set(wanted)
            part = dataclasses.replace(tree, branches=[tree.branches[b] for b in wanted.values()], unaligned=[])
            todo.append((part, list(wanted)))
    report.tokens = sum(part.n_responses for part, _ in todo)
    lengths = [part.n_tokens for part, _ in todo]
    order = sorted(range(len(todo)), key=lambda i: -lengths[i])
    packs = pack(lengths, max_tokens, order=order, ids=[part.id for part, _ in todo])[ranks.rank :: ranks.world]
    with progress_bar(sum(len(p) for p in packs), desc=progress, unit="tree") as bar:
        for members in packs:
            with reference_mode(bundle.model):
                found = statistics(bundle, [todo[i][0] for i in members], reader, features, kl=kl)
            names = [key for i in members for key in todo[i][1]]
            sizes = [len(b.input_ids) for i in members for b in todo[i][0].branches]
            pieces = zip(*(x.split(sizes) if x is not None else [None] * len(sizes) for x in found), strict=True)
            store.put({key: HeadStatistics(*piece) for key, piece in zip(names, pieces, strict=True)})
            bar.update(len(members))
    ranks.barrier()
    if ranks.world > 1:
        store.refresh()
    return report


def start_check(
    bundle: Bundle,
    store: ReferenceStore,
    trees: Sequence[ResponseTree],
    reader: PixelSource,
    features: FeatureCache,
) -> float:
    """Compare a few trees under the model with adapters off with the store.

    The noise that other shapes make is measured on the spot (the trees packed, and each alone). Returns the largest
    absolute difference of a log-prob, in nats.

    Raises:
        InputError: the difference is beyond the noise: the model, the pixels or the answers are not those of the store.
    """
    keys = [store.key(tree, b) for tree in trees for b in range(len(tree.branches))]
    hits, misses = store.hits, store.misses
    stored = store.get(keys, kl=False).logp
    store.hits, store.misses = hits, misses  # not reads of the training
    with reference_mode(bundle.model):
        packed = statistics(bundle, trees, reader, features, kl=False).logp.cpu()
        alone = torch.cat([statistics(bundle, [tree], reader, features, kl=False).logp.cpu() for tree in trees])
    noise = float((packed - alone).abs().max())
    difference = float((packed - stored).abs().max())
    limit = max(_NOISE_FACTOR * noise, _FLOOR.get(bundle.dtype, 0.25))
    if not difference <= limit:
        raise InputError(
            f"{store.root}: with adapters off the model differs from the stored reference by {difference:.3g} nats per"
            f" token (rounding explains {limit:.3g}); the videos' pixels, the weights or the software differ from what"
            " filled it: use another reference.store, or delete this one"
        )
    return difference
