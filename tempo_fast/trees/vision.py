"""Visual features: one vision call per micro-batch, and none for videos that are in the cache.

Shapes: G visual tokens of all videos together, P patches, D hidden size.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tempo_fast.models.family import Family, Grid
from tempo_fast.trees.feature_store import FeatureStore, tower_digest


class PixelSource(Protocol):
    def pixels(self, plan: Any) -> Tensor:
        """The model's input of one video, [P, C*t*p*p]."""
        ...


@dataclass
class Pixels:
    """Decoded videos ready for one vision call, each distinct one once.

    ``pixels`` [P, C*t*p*p] and ``grids`` are of the distinct videos; ``order`` names them for each video asked for.
    """

    pixels: Tensor
    grids: list[Grid]
    order: list[int]


def prepare_pixels(
    reader: PixelSource, plans: Sequence[Any], device: torch.device | str, dtype: torch.dtype
) -> Pixels | None:
    """Decode ``plans``, each distinct video (by ``plan.key``) once; None when there are none.

    A reader that has ``pixels_many`` gets them in one call, to decode each file once. Raises what the reader raises.
    """
    if not plans:
        return None
    distinct = list({plan.key: plan for plan in plans}.values())
    place = {plan.key: i for i, plan in enumerate(distinct)}
    videos = [video.to(device, dtype) for video in _read(reader, distinct, dtype)]
    return Pixels(torch.cat(videos), [Grid(*plan.grid) for plan in distinct], [place[plan.key] for plan in plans])


def _read(reader: PixelSource, plans: Sequence[Any], dtype: torch.dtype) -> Iterator[Tensor]:
    many = getattr(reader, "pixels_many", None)
    if many is None or len(plans) == 1:
        yield from (reader.pixels(plan) for plan in plans)
        return
    for video in many(plans, dtype):
        if isinstance(video, Exception):
            raise video
        yield video


def encode_pixels(family: Family, model: nn.Module, prepared: Pixels) -> Tensor:
    """Features [G, D] of the videos asked for, in order, by one vision call: in the tower's own mode and with its graph
    (for the forward where the tower trains), unless the caller says otherwise."""
    features = family.encode_vision(model, prepared.pixels, prepared.grids)
    if prepared.order == list(range(len(prepared.grids))):
        return features
    pieces = _split(features, prepared.grids)
    return torch.cat([pieces[i] for i in prepared.order])


def _split(features: Tensor, grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    # features per video are proportional to its patches, whatever the family merges
    patches = [int(g.t * g.h * g.w) for g in grids]
    total, n = sum(patches), len(features)
    sizes = [p * n // total for p in patches]
    if sum(sizes) != n:
        raise ValueError(f"{n} visual features do not divide over {total} patches")
    return features.split(sizes)


@contextmanager
def evaluating(module: nn.Module) -> Any:
    """Eval mode inside, every submodule's own mode restored after."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


class FeatureCache:
    """Features of a frozen vision tower in memory, least recently used first out, and behind it on disk.

    An entry belongs to the pixels (``plan.key``) and to the state of the tower: any in-place change of its weights, a
    merged, disabled or added adapter makes new entries, so a stale one is never served.

    Args:
        max_bytes: in memory.
        store: features on disk, for towers that are frozen and have no adapters. Only a video that was encoded in a
            call of its own goes there.
        batched: encode what is missing in one call unless a caller says otherwise.

    Attributes:
        hits, misses: videos found, in memory or on disk, and videos encoded.
        disk_hits: those of the hits that were found on disk.
        decode_seconds: time spent in ``reader.pixels``, decoding and preprocessing.
        encode_seconds: time spent in the vision tower.
    """

    def __init__(
        self, max_bytes: int = 1 << 30, store: FeatureStore | None = None, *, batched: bool = False
    ) -> None:
        self.max_bytes = max_bytes
        self.store = store
        self.batched = batched
        self.hits = self.misses = self.disk_hits = 0
        self.decode_seconds = self.encode_seconds = 0.0
        self.n_bytes = 0
        self._entries: OrderedDict[tuple[str, Any], Tensor] = OrderedDict()
        self._towers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()
        self._digest: tuple[Any, str] = (None, "")

    def features(
        self,
        family: Family,
        model: nn.Module,
        reader: PixelSource,
        plans: Sequence[Any],
        *,
        together: bool | None = None,
    ) -> Tensor | None:
        """Features [G, D] of ``plans`` in order, without graph, the tower in eval mode; None when there are none.

        Each video that is not cached is encoded by a call of its own, so that its features do not depend, not even in
        rounding, on what else was asked for: a resumed run is bit-equal. ``together`` (None: ``batched``) encodes them
        in one call, for many short clips.
        """
        if not plans:
            return None
        together = self.batched if together is None else together
        tower = family.vision_tower(model)
        tag = self._tag(tower)
        found: dict[str, Tensor] = {}
        todo: dict[str, Any] = {}
        disk = self._on_disk(family, model, tower, tag)
        for plan in plans:
            if plan.key in found or plan.key in todo:
                continue
            entry = self._entries.get((plan.key, tag))
            if entry is not None:
                self._entries.move_to_end((plan.key, tag))
                found[plan.key] = entry
                continue
            stored = self.store.get(disk, plan.key) if self.store and disk else None
            if stored is None:
                todo[plan.key] = plan
                continue
            stored = stored.to(next(tower.parameters()).device)
            found[plan.key] = stored
            self.disk_hits += 1
            self._keep((plan.key, tag), stored)
        self.hits += len(found)
        self.misses += len(todo)
        missing = list(todo.values())
        for call in [missing] if together and missing else [[plan] for plan in missing]:
            start = time.perf_counter()
            weight = next(tower.parameters())
            prepared = prepare_pixels(reader, call, weight.device, weight.dtype)
            decoded = time.perf_counter()
            assert prepared is not None
            with torch.no_grad(), evaluating(tower):
                new = encode_pixels(family, model, prepared)
            self.decode_seconds += decoded - start
            if self.store and disk:
                new = self.store.rounded(new)
                if len(call) == 1:
                    self.store.put(disk, call[0].key, new)
            self.encode_seconds += time.perf_counter() - decoded
            for plan, piece in zip(call, _split(new, prepared.grids), strict=True):
                found[plan.key] = piece
                # a slice would keep the whole call's features alive
                self._keep((plan.key, tag), piece if len(call) == 1 else piece.clone())
        return torch.cat([found[plan.key] for plan in plans]) if len(plans) > 1 else found[plans[0].key]

    def counts(self) -> dict[str, int]:
        """``hits``, ``disk_hits`` and ``misses`` so far."""
        return {"hits": self.hits, "disk_hits": self.disk_hits, "misses": self.misses}

    def identity(self) -> dict[str, str]:
        """What of the cache decides results: nothing, unless the disk rounds."""
        return {"features": self.store.dtype} if self.store is not None and self.store.dtype != "same" else {}

    def finder(self, family: Family, model: nn.Module) -> Callable[[str], bool]:
        """Tells of a plan's key whether features of the tower as it now is are in memory or on disk, so that its pixels
        need not be decoded. (Whether the tower has changed costs more to find out than all else.)"""
        tower = family.vision_tower(model)
        tag = self._tag(tower)
        disk, store = self._on_disk(family, model, tower, tag), self.store
        return lambda key: (key, tag) in self._entries or bool(disk and store and store.holds(key, disk))

    def holds(self, plan_key: str) -> bool:
        """Whether features of these pixels are on disk, of whatever tower: they were decoded once."""
        return self.store is not None and self.store.holds(plan_key)

    def clear(self) -> None:
        self._entries.clear()
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def _keep(self, key: tuple[str, Any], value: Tensor) -> None:
        size = value.numel() * value.element_size()
        if size > self.max_bytes:
            return
        self._entries[key] = value
        self.n_bytes += size
        while self.n_bytes > self.max_bytes:
            _, old = self._entries.popitem(last=False)
            self.n_bytes -= old.numel() * old.element_size()

    def _on_disk(self, family: Family, model: nn.Module, tower: nn.Module, tag: Any) -> str:
        """The tower's digest where its features may lie on disk, else empty."""
        if self.store is None or any(p.requires_grad for p in tower.parameters()) or _tuners(tower):
            return ""
        if self._digest[0] != tag:
            self._digest = tag, tower_digest(family, model)
        return self._digest[1]

    def _tag(self, tower: nn.Module) -> Any:
        if tower not in self._towers:
            self._towers[tower] = next(self._count)
        weights = hash(tuple((name, p._version) for name, p in tower.named_parameters()))
        adapters = hash(
            tuple((name, m.disable_adapters, tuple(m.active_adapters), m.merged) for name, m in _tuners(tower))
        )
        return self._towers[tower], weights, adapters


def _tuners(tower: nn.Module) -> list[tuple[str, Any]]:
    """peft's tuner layers by name; transformers models have methods of the same names."""
    modules = tower.named_modules()
    return [(n, m) for n, m in modules if isinstance(getattr(type(m), "disable_adapters", None), property)]
