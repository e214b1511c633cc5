"""Filling the store with the model itself, adapters off, and checking at every start that both still agree."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tempo_fast.config import LoaderConfig
from tempo_fast.errors import InputError
from tempo_fast.models.load import Bundle
from tempo_fast.reference.holders import holders
from tempo_fast.reference.shard import MEAN, SCALARS
from tempo_fast.reference.sizes import bytes_per_token, check_room, free_bytes, room_for
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.head import gathered_head
from tempo_fast.runtime.progress import progress as progress_bar
from tempo_fast.runtime.ranks import Ranks, current_ranks
from tempo_fast.trees.batch import PackedBatch, collate
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import Branch, ResponseTree
from tempo_fast.trees.packing import pack
from tempo_fast.trees.vision import FeatureCache, PixelSource, evaluating
from tempo_fast.video.loader import prefetching
from tempo_kernels.head import HeadStatistics, head_statistics

log = logging.getLogger("tempo_fast")

_LOOK_S = 10.0  # between looks for what other runs have stored

# Where the start check stops a run, in nats per token on average: at several times the noise it measures, but never
# below a floor. bfloat16's is a little more than a whole forward in bfloat16 differs from one in float32 (0.005 to
# 0.02 on small models), because a store may have been filled in the other dtype, on another device or with another
# attention, of which noise measured on the spot knows nothing.
_FLOOR = {torch.float64: 1.25e-7, torch.float32: 1.25e-4, torch.bfloat16: 0.03}
_NOISE_FACTOR = 8.0
_CEILING = 10.0  # in floors: noise above it is no rounding
_PEAK = 8.0  # a single token may differ this much more than the average: the tail over some hundred tokens
_SHIFT = 0.5  # rounding has no direction: the signed average must be this much smaller


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


def hidden_states(
    bundle: Bundle, packed: PackedBatch, reader: PixelSource, features: FeatureCache, attention: str = "auto"
) -> Tensor:
    """[N, D] hidden states of a packed row's N response tokens under the reference. Call inside ``reference_mode``."""
    visual = features.features(bundle.family, bundle.model, reader, packed.plans)
    return tree_hidden(bundle.family, bundle.model, packed, visual, attention)


def statistics(
    bundle: Bundle,
    trees: Sequence[ResponseTree],
    reader: PixelSource,
    features: FeatureCache,
    *,
    kl: bool,
    attention: str = "auto",
) -> HeadStatistics:
    """Statistics of ``trees`` in one packed row under the reference. Call inside ``reference_mode``."""
    packed = collate(trees, bundle.device)
    return _of_head(bundle, packed, hidden_states(bundle, packed, reader, features, attention), kl)


def _of_head(bundle: Bundle, packed: PackedBatch, hidden: Tensor, kl: bool) -> HeadStatistics:
    with gathered_head(bundle.family.head(bundle.model)) as weight:
        return head_statistics(hidden, weight, packed.labels, kl=kl)


def verify_together(store: ReferenceStore, keys: Sequence[str], ranks: Ranks, *, kl: bool | None = None) -> None:
    """Verify the shards of these answers, each on one rank, and drop the damaged ones on all. All ranks call it."""
    if ranks.world == 1:
        store.verify(store.shards_of(keys, kl=kl))
        return
    # listings may differ for a moment between machines
    shards = sorted({name for part in ranks.all_gather_object(store.shards_of(keys, kl=kl)) for name in part})
    sound, _ = store.verify(shards[ranks.rank :: ranks.world])
    # what a rank does not see, or found damaged and dropped, is in nobody's list: the others look for themselves
    store.trust(name for part in ranks.all_gather_object(sound) for name in part)


def fill(
    bundle: Bundle,
    store: ReferenceStore,
    trees: Sequence[ResponseTree],
    reader: PixelSource,
    features: FeatureCache,
    *,
    kl: bool,
    max_tokens: int,
    attention: str = "auto",
    progress: str = "reference",
    ranks: Ranks | None = None,
    loader: LoaderConfig | None = None,
    check: Callable[[], None] | None = None,
    on_stored: Callable[[list[str]], None] | None = None,
) -> FillReport:
    """Compute and store what is missing of ``trees``: each answer once, whatever the number of trees that hold it.

    ``trees`` may make a tree anew each time it is asked for one; few are held at a time. They are cut down to their
    missing branches, packed to ``max_tokens`` as in training and run with adapters off. Each pack is one shard, so that
    an interrupted fill loses one pack; packs that are missing are packed the same way again, so that it makes no
    difference to a bit. With several ranks each computes its share. Decoding, the model and writing overlap. Where
    another run fills the same store, this one begins elsewhere and leaves out what it finds.

    Args:
        kl: also store what the exact KL needs, in the store's form; entries without it are computed again.
        attention: as ``train.attention``.
        progress: name of the progress bar.
        ranks: None takes the process group as it is.
        loader: how videos are decoded ahead; None decodes them when they are needed.
        check: called before every pack, equally often on every rank; may raise (``Stopper.check``), what was stored
            stays.
        on_stored: called after every pack with the keys that this rank has stored.

    Raises:
        InputError: before anything is decoded for a tree longer than ``max_tokens`` or a disk that will not hold it
            all; a disk that is full all the same.
    """
    ranks = ranks or current_ranks()
    parts = [_Part.of(number, tree, store.keys(tree)) for number, tree in enumerate(trees)]
    every = dict.fromkeys(key for part in parts for key in part.keys)
    verify_together(store, list(every), ranks, kl=kl)
    crowd = holders(store.root, sweep=False)
    # what any rank lacks; gathering is also the point before which no rank writes
    told = ranks.all_gather_object((store.missing(list(every), kl=kl), free_bytes(store.root)[0], crowd))
    absent = {key for part, _, _ in told for key in part}
    report = FillReport(computed=len(absent), present=len(every) - len(absent))
    left = set(absent)
    todo = [wanted for part in parts if (wanted := part.missing(left)).keys]
    report.tokens = sum(part.n_responses for part in todo)
    lengths = [part.n_tokens for part in todo]
    order = sorted(range(len(todo)), key=lambda i: -lengths[i])
    packs = pack(lengths, max_tokens, order=order, ids=[part.id for part in todo])
    form = store.form if kl else SCALARS
    if absent:
        room = room_for(store.root, len(absent), report.tokens, len(packs), bytes_per_token(bundle, form))
        room = room._replace(free=min(free for _, free, _ in told))
        if ranks.is_main:
            log.info("%s: to compute in %s: %s", progress, store.root, room)
        check_room(store.root, room, form)
    if told[0][2] > ranks.world and packs:  # others are here: where each begins is its own affair
        start = ranks.all_gather_object(random.SystemRandom().randrange(len(packs)))[0]
        packs = packs[start:] + packs[:start]
    mine = packs[ranks.rank :: ranks.world]
    # a partitioned model runs on all ranks or on none
    together = any(hasattr(p, "ds_id") for p in bundle.model.parameters())
    cached = features.finder(bundle.family, bundle.model)
    reading = prefetching(
        reader,
        (plan for members in mine for i in members for plan in todo[i].plans),
        loader,
        skip=lambda plan: cached(plan.key),
        once=True,
    )
    looked = time.monotonic()
    bar = progress_bar(sum(len(p) for p in mine), desc=progress, unit="tree")
    with reading as source, bar, _Writer(store, on_stored) as writer:
        for turn in range(-(-len(packs) // ranks.world)):
            if check is not None:
                check()
            members = mine[turn] if turn < len(mine) else packs[0] if together else []
            if not members:
                continue
            names = [key for i in members for key in todo[i].keys]
            if not together and time.monotonic() - looked > _LOOK_S:
                store.refresh()
                looked = time.monotonic()
            if not together and not store.missing(names, kl=kl):  # another run was faster
                bar.update(len(members))
                continue
            with reference_mode(bundle.model):
                packed = collate([only(trees[todo[i].number], todo[i].branches) for i in members], bundle.device)
                hidden = hidden_states(bundle, packed, source, features, attention)
                found = _of_head(bundle, packed, hidden, form == MEAN)
            if turn >= len(mine):
                continue
            sizes = [n for i in members for n in todo[i].sizes]
            # to the host here, where it waits for the device; the rest in the writer's thread
            pieces = zip(*(x.cpu().split(sizes) if x is not None else [None] * len(sizes) for x in found), strict=True)
            entries = {key: HeadStatistics(*piece) for key, piece in zip(names, pieces, strict=True)}
            kept = None
            if form not in (SCALARS, MEAN):
                kept = dict(zip(names, hidden.detach().cpu().split(sizes), strict=True))
            writer.put(entries, kept)
            bar.update(len(members))
    if ranks.world > 1:
        # also the barrier; by name, because a listing may be older than what another machine has written
        written = [name for part in ranks.all_gather_object(writer.shards) for name in part]
        store.adopt(written)
        store.trust(written)
    return report


@dataclass
class _Part:
    """Some branches of a tree, without the tree: a hundred thousand of those would not fit into memory."""

    number: int
    id: str
    plans: list[Any]
    n_prompt: int
    branches: list[int]
    keys: list[str]
    sizes: list[int]
    """Response tokens of each branch."""

    @staticmethod
    def of(number: int, tree: ResponseTree, keys: list[str]) -> _Part:
        sizes = [len(b.input_ids) for b in tree.branches]
        return _Part(number, tree.id, tree.plans, tree.n_tokens - sum(sizes), list(range(len(sizes))), keys, sizes)

    def missing(self, left: set[str]) -> _Part:
        """With the branches whose keys are in ``left`` alone, each key once; they are taken out of ``left``."""
        first = {key: b for b, key in reversed(list(enumerate(self.keys))) if key in left}
        left.difference_update(first)
        some = sorted(first.values())
        return replace(self, branches=some, keys=[self.keys[b] for b in some], sizes=[self.sizes[b] for b in some])

    @property
    def n_responses(self) -> int:
        return sum(self.sizes)

    @property
    def n_tokens(self) -> int:
        return self.n_prompt + self.n_responses


class _Writer:
    """Writes shards in a thread, one at a time: the model runs on while a shard is hashed and synced.

    At the end of the block all is written, also when it ends with an exception.
    """

    def __init__(self, store: ReferenceStore, on_stored: Callable[[list[str]], None] | None) -> None:
        self.store, self.on_stored = store, on_stored
        self.shards: list[str] = []
        self._pool = ThreadPoolExecutor(1, "tempo-fast-statistics")
        self._pending: tuple[Future[str], list[str]] | None = None

    def __enter__(self) -> _Writer:
        return self

    def put(self, entries: dict[str, HeadStatistics], hidden: dict[str, Tensor] | None) -> None:
        """Raises what the write before raised."""
        self._wait()
        self._pending = self._pool.submit(self.store.put, entries, hidden), list(entries)

    def _wait(self) -> None:
        if self._pending is None:
            return
        (written, names), self._pending = self._pending, None
        self.shards.append(written.result())
        if self.on_stored is not None:
            self.on_stored(names)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._wait()
        except InputError:
            if kind is None:
                raise
        finally:
            self._pool.shutdown()


def only(tree: ResponseTree, branches: Sequence[int]) -> ResponseTree:
    """The tree with these of its branches, without their spans: statistics need none."""
    return ResponseTree(tree.id, tree.prompt, [Branch.of(tree.branches[b].input_ids) for b in branches], tree.plans)


def start_check(
    bundle: Bundle,
    store: ReferenceStore,
    trees: Sequence[ResponseTree],
    reader: PixelSource,
    features: FeatureCache,
    *,
    max_tokens: int | None = None,
    attention: str = "auto",
) -> float:
    """Compare a few trees under the model with adapters off with the store.

    The noise that other shapes make is measured on the spot: the trees packed, each alone, and each in two parts.
    Compared are the largest difference of a token, the mean absolute difference, which finds another model or other
    pixels far below it, and the mean, which finds a systematic shift.

    Args:
        max_tokens: budget of a packed row; trees that exceed it together are not packed. None: no limit.
        attention: as ``train.attention``.

    Returns:
        The largest absolute difference of a log-prob, in nats.

    Raises:
        InputError: the difference is beyond the noise: the model, the pixels or the answers are not those of the
            store; or the noise is beyond rounding: answers depend on what stands beside them.
    """
    keys = [key for tree in trees for key in store.keys(tree)]
    hits, misses = store.hits, store.misses
    stored = store.get(keys, kl=False).logp
    store.hits, store.misses = hits, misses  # not reads of the training
    # another shape for every token: the first branch without the others, the others without the first
    parts = [only(t, b) for t in trees for b in ([0], list(range(1, len(t.branches)))) if b]

    def rows(groups: Sequence[Sequence[ResponseTree]]) -> Tensor:
        found = [statistics(bundle, group, reader, features, kl=False, attention=attention) for group in groups]
        return torch.cat([f.logp for f in found]).double().cpu()

    with reference_mode(bundle.model):
        alone = rows([[tree] for tree in trees])
        fits = max_tokens is None or sum(tree.n_tokens for tree in trees) <= max_tokens
        now = rows([trees]) if fits and len(trees) > 1 else alone
        noise = torch.stack([(other - now).abs() for other in (alone, rows([[part] for part in parts]))])
    floor = _FLOOR.get(bundle.dtype, _FLOOR[torch.bfloat16])
    difference = now - stored.double()
    largest, mean, shift = float(difference.abs().max()), float(difference.abs().mean()), float(difference.mean())
    if not float(noise.mean(1).max()) <= _CEILING * floor:
        raise InputError(
            f"{store.root}: log-probs differ by {float(noise.max()):.3g} nats per token between packed trees and trees"
            " alone, more than rounding explains; the attention does not keep the trees apart"
        )
    most = max(_NOISE_FACTOR * float(noise.mean(1).max()), floor)
    peak = max(_NOISE_FACTOR * float(noise.max()), _PEAK * floor)
    most, peak = min(most, _CEILING * floor), min(peak, _CEILING * _PEAK * floor)
    level = most * max(_SHIFT, 2 / len(difference) ** 0.5)
    if not (largest <= peak and mean <= most and abs(shift) <= level):
        raise InputError(
            f"{store.root}: with adapters off the model differs from the stored reference by {mean:.3g} nats per token,"
            f" {largest:.3g} at most and {shift:+.3g} on average (rounding explains {most:.3g}, {peak:.3g} and"
            f" {level:.3g}); the videos' pixels, the weights or the software differ from what filled it: use another"
            " reference.store, or delete this one"
        )
    return largest
