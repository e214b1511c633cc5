"""Memory of one rank: what stays, and the highest of the phases of a step.

The phases are: loading and filling the reference (the model whole on every rank, whatever the stage: DeepSpeed takes it
over when the training starts), encoding videos (frozen tower), the turn from forward to backward (all that is kept, and
the head or the last layer's backward, whichever is more), the end of the backward (the first layer's, with all
gradients), and the update. Each has what stays beneath it (``states.py``). A forward without gradients holds, in the
MLP, s·(3·F + 5·D) a token.

Sources: ``plan/states.py``, ``plan/activations.py``, ``trees/vision.py``, ``video/loader.py``, ``reference/fill.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tempo_fast.config import FeaturesConfig, LoaderConfig
from tempo_fast.plan.activations import again, in_backward, kept, kept_by_layer
from tempo_fast.plan.setting import Setting
from tempo_fast.plan.shapes import Shape, Tower
from tempo_fast.plan.states import states, trained_elements

CONTEXT_GIB = 0.6
"""Assumed: CUDA's context, cuBLAS workspaces and loaded kernels of one process."""
NCCL_GIB = 0.8
"""Assumed: NCCL's channels and buffers with several ranks."""
FRAGMENTATION = 0.06
"""Assumed: share of the allocated that the caching allocator holds and cannot use."""


@dataclass(frozen=True)
class Load:
    """What one rank's largest micro-batch holds, and how many there are in a step."""

    tokens: int
    """Of the packed row (of all rows, without trees)."""
    responses: int
    """Of these, answer tokens: the head's rows."""
    visual: int
    """Of these, visual tokens."""
    patches: int
    """Of the videos of the micro-batch."""
    largest_video: int
    """Patches of the largest video: encoded in a call of its own."""
    micros: int = 1
    videos: int = 0
    """Distinct videos whose features may be kept in memory; 0: as many as fit."""
    feature_bytes: int = 0
    """Of one video's features."""
    fill_tokens: int = 0
    """Of the packed row with which the reference is filled; 0: no reference."""
    fill_responses: int = 0


@dataclass
class Memory:
    """Of one rank, in bytes, at its highest moment. ``parts`` add up to ``device``."""

    phase: str
    parts: dict[str, float]
    phases: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def device(self) -> float:
        return sum(self.parts.values())

    @property
    def on_host(self) -> float:
        """Bytes in CPU memory at its highest: loading and merging come before and after what training keeps there."""
        alone = ("load", "merge")
        rest = sum(value for name, value in self.host.items() if name not in alone)
        return max([rest, *(self.host.get(name, 0.0) for name in alone)])


def memory(
    shape: Shape,
    s: Setting,
    load: Load,
    zero: Mapping[str, Any],
    features: FeaturesConfig,
    loader: LoaderConfig,
) -> Memory:
    """The highest moment of a step of one rank, by part.

    Args:
        zero: DeepSpeed's ``zero_optimization`` section.
        features, loader: how much of features and decoded videos is kept.
    """
    kept_here = states(shape, s, zero)
    resting, host = dict(kept_here.device), dict(kept_here.host)
    # gradients come as activations go: with one micro-batch they are not there yet when these are at their highest
    before = dict(resting)
    if load.micros == 1 and not (s.deepspeed and s.stage == 3):
        before.pop("gradients", None)
    cached = feature_cache(shape, s, load, features)
    pixels = pixel_bytes(shape, s) * load.largest_video
    waiting = {"features": cached, "loader": loader.ahead * pixels if loader.workers else 0.0}
    if not s.cuda:
        waiting = {"features": cached, "loader": 0.0}
        host["loader"] = loader.ahead * pixels if loader.workers else 0.0
    turn, head = turn_parts(shape, s, load)
    whole = {"weights": s.size * shape.total + (4.0 * trained_elements(shape, s) if s.lora else 0.0)}
    host |= {"load": float(s.size * shape.total), "merge": 4.0 * shape.total}
    phases: dict[str, dict[str, float]] = {
        "load": {**whole},
        "encode": {**before, **waiting, "activations": encoding(shape.tower, s) * load.largest_video + 2 * pixels},
        "turn": {**before, **waiting, **turn, **kept_here.turn},
        "head": {**before, **waiting, **head, **kept_here.turn},
        "end": {**resting, **waiting, **end_parts(shape, s, load), **kept_here.end},
        "update": {**resting, **waiting, "activations": kept_here.update},
    }
    if load.fill_tokens:
        phases["fill"] = {**whole, **waiting, **filling(shape, s, load)}
    if s.train_vision:
        del phases["encode"]
    overhead = 0.0
    if s.cuda:
        overhead = (CONTEXT_GIB + (NCCL_GIB if s.world > 1 else 0.0)) * 2**30
    for parts in phases.values():
        if s.cuda:
            parts["overhead"] = overhead + FRAGMENTATION * sum(parts.values())
    sums = {name: sum(parts.values()) for name, parts in phases.items()}
    phase = max(sums, key=lambda name: sums[name])
    return Memory(phase, _named(phases[phase]), sums, host)


def turn_parts(shape: Shape, s: Setting, load: Load) -> tuple[dict[str, float], dict[str, float]]:
    """At the turn from forward to backward: with the last layer's backward, and with the head's walk."""
    t, n, d = load.tokens, load.responses, shape.text.width
    share = n / max(1, t)
    held = kept(shape.text, s, crossing=share) * t
    # of the first layer nothing before its adapters needs a gradient; the final norm keeps its input
    if s.policy == "none":
        first = next((x for x in shape.text.linears if x.adapted), None)
        held -= 3 * s.mask * (first.inputs if first else 0) * t
    else:
        held += 4 * d * t
    # the row of embeddings, its features, positions and rotary tables
    row = t * (s.size * d + 2 * s.size * shape.text.head_dim + 8 * 8)
    visual = float(load.visual * s.size * shape.feature_width)
    if s.train_vision:
        # the projector keeps its norm's input and that of its activation
        held += (kept(shape.tower, s) + 2 * s.size * shape.tower.width) * load.patches
        visual = 0.0
    backward = (again(shape.text, s) + in_backward(shape.text, s)) * t
    if s.train_vision and s.policy != "none":
        backward = max(backward, (again(shape.tower, s) + in_backward(shape.tower, s)) * load.patches)
    walk = head_bytes(shape, s, n)
    saved = 4.0 * n * d * (2 if s.kl else 1)
    parts = {"activations": held + row + backward, "features of the row": visual, "loss head": saved}
    return parts, {"activations": held + row + 2 * s.size * d * t, "features of the row": visual, "loss head": walk}


def end_parts(shape: Shape, s: Setting, load: Load) -> dict[str, float]:
    """At the end of a backward: the first layer's, or the tower's first block's where that trains."""

    def one(tower: Tower) -> float:
        layer = again(tower, s) if s.policy != "none" else sum(kept_by_layer(tower, s).values())
        return layer + s.size * tower.width + in_backward(tower, s)

    row = load.tokens * (s.size * shape.text.width + 2 * s.size * shape.text.head_dim + 8 * 8)
    found = one(shape.text) * load.tokens
    if s.train_vision:
        found = max(found, one(shape.tower) * load.patches)
    return {"activations": row + found, "features of the row": float(load.visual * s.size * shape.feature_width)}


def filling(shape: Shape, s: Setting, load: Load) -> dict[str, float]:
    """A forward of the reference over one packed row, at its highest in an MLP; its head comes when that is over."""
    t = load.fill_tokens
    row = t * (s.size * shape.text.width + 2 * s.size * shape.text.head_dim + 8 * 8)
    inside = t * s.size * (3 * shape.text.mlp + 4 * shape.text.width)
    walk = head_bytes(shape, s, load.fill_responses) + 2 * s.size * shape.text.width * t
    return {"activations": row + max(inside, walk)}


def head_bytes(shape: Shape, s: Setting, n: int) -> float:
    """The walk over the vocabulary: hidden states, mean (and the reference's), and one slab of logits.

    N·D·(s + 4), 4·N·D more with the KL, 4·min(N, 2048)·512 of logits, and the casts of a bfloat16 head.
    Source: ``tempo_kernels/sweep.py``. A head that trains has its gradient beside it.
    """
    from tempo_kernels.sweep import ROWS, SLICE

    d = shape.text.width
    walk = n * d * (s.size + 4.0 + (8.0 if s.kl else 0.0)) + 4.0 * min(n, ROWS) * SLICE
    if s.size == 2:
        walk += 4.0 * d * (min(n, ROWS) + SLICE)
    return walk + (s.size * shape.head if s.train_head else 0.0)


def encoding(tower: Tower, s: Setting) -> float:
    """Bytes per patch of a frozen tower's forward at its highest, in an MLP: the block's input, residual and norm, and
    of the width inside the way up, a product and its activation (a gate has both branches); rotary tables."""
    return s.size * (3 * tower.width + 3 * tower.mlp) + 8 * tower.head_dim


def feature_cache(shape: Shape, s: Setting, load: Load, features: FeaturesConfig) -> float:
    """Features in memory: ``features.memory_gib``, or of all videos where they are fewer."""
    limit = features.memory_gib * 2**30
    if s.train_vision:
        return 0.0
    return min(limit, float(load.videos * load.feature_bytes)) if load.videos else limit


def pixel_bytes(shape: Shape, s: Setting) -> float:
    """Of one patch: channels · frames of a temporal patch · side², in the tower's dtype."""
    g = shape.geometry
    return float(s.size * 3 * g.temporal * g.patch**2)


def generation(shape: Shape, s: Setting, prompts: int, tokens: int) -> dict[str, float]:
    """Memory of making pairs by the transformers engine: weights, and keys and values of so many prompts at once, each
    of ``tokens`` tokens with its answer: 2·L·K·d·s bytes a token."""
    t = shape.text
    keys = 2.0 * t.depth * t.key_heads * t.head_dim * s.size * tokens * prompts
    return {"weights": float(s.size * shape.total), "keys and values": keys}


def _named(parts: Mapping[str, float]) -> dict[str, float]:
    """The parts as a plan shows them."""
    out: dict[str, float] = {}
    names = {
        "weights partition": "weights", "gathered": "weights", "buckets": "gradients",
        "features of the row": "features", "loader": "features",
    }  # fmt: skip
    for name, value in parts.items():
        key = names.get(name, name)
        out[key] = out.get(key, 0.0) + value
    return out


def with_tokens(load: Load, factor: float) -> Load:
    """The same micro-batch with so many times the video."""
    visual = round(load.visual * factor)
    return replace(
        load,
        tokens=load.tokens + visual - load.visual,
        visual=visual,
        patches=round(load.patches * factor),
        largest_video=round(load.largest_video * factor),
        feature_bytes=round(load.feature_bytes * factor),
        fill_tokens=load.fill_tokens + visual - load.visual if load.fill_tokens else 0,
    )
