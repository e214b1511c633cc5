"""FLOP of a recipe, and what they take in time and money at an assumed share of the peak rate.

A multiply-add is two. P elements of the decoder's linear layers, T tokens, L layers, w heads times head size, A pairs
of a query and a key that it sees, N answer tokens, D hidden size, V vocabulary:

    forward    2·P·T + 4·L·w·A
    training   forward, and as much again for the gradients of activations, and 4·L·w·A more for attention's
               (LoRA: frozen weights need none); 2·P·T more where the model itself trains
    head       4·N·V·D: logits and their way back (2·N·V·D in a fill)
    again      ``full`` one more forward; ``selective`` 2·T times the layers that widen
    vision     2·weights of its blocks a patch, of its projector a merged patch, 4·width a pair of patches of a frame
               (of a window); three times where it trains in full, twice with adapters

The adapters' own are left out: R·(in + out) beside in·out. So is communication. A tree's A is P(P+1)/2 of the prompt
and P·n + n(n+1)/2 of each answer. Sources: arXiv 2001.08361 section 2.1 (2·P a token); the same counts as
``python -m bench step`` prints of its steps.

Tokens of an answer are made one after the other: a step of a batch reads the weights and all keys and values once, at
the memory's bandwidth, which is longer than what it computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tempo_fast.plan.gpus import Gpu
from tempo_fast.plan.record import Record
from tempo_fast.plan.setting import Setting
from tempo_fast.plan.shapes import Shape

MFU = 0.4
"""Assumed share of the peak rate, of all FLOP that run."""
DECODE = 0.5
"""Assumed share of the memory's bandwidth while answers are made."""


def seen(prompt: int, answers: int, answer: float, trees: bool) -> float:
    """A of one record."""
    own = answers * answer * (answer + 1) / 2
    if trees:
        return prompt * (prompt + 1) / 2 + answers * prompt * answer + own
    row = prompt + answer
    return answers * row * (row + 1) / 2


def forward(shape: Shape, record: Record, trees: bool = True) -> float:
    """Of the decoder, without the head."""
    t = shape.text
    pairs = seen(record.prompt, record.answers, record.answer, trees)
    return 2.0 * t.weights * record.rows(trees) + 4.0 * t.depth * t.heads * t.head_dim * pairs


def vision(shape: Shape, record: Record) -> float:
    """A forward of the tower over one video."""
    t, g, grid = shape.tower, shape.geometry, record.grid
    merged = record.patches / (g.merge**2 if not g.side else 1)
    flop = 2.0 * record.patches * t.weights + 2.0 * merged * max(0, shape.vision - t.weights)
    frame = float(grid.h * grid.w) ** 2
    pairs = [frame] * t.depth
    config = shape.config.vision_config
    whole = getattr(config, "fullatt_block_indexes", None)
    if whole is not None:
        side = config.window_size // config.patch_size
        windows = float(_squares(grid.h, side) * _squares(grid.w, side))
        pairs = [frame if i in whole else windows for i in range(t.depth)]
    return flop + 4.0 * t.heads * t.head_dim * grid.t * sum(pairs)


def _squares(length: int, side: int) -> int:
    """Σ of squares of the parts of ``length`` cut every ``side``."""
    full, rest = divmod(length, side)
    return full * side**2 + rest**2


@dataclass(frozen=True)
class Flop:
    """Of one record: what training it needs, what runs, and a fill."""

    necessary: float
    run: float
    fill: float


def flop_of(shape: Shape, record: Record, s: Setting, *, encoded: float = 1.0) -> Flop:
    """``encoded``: share of the record's videos that are encoded, not found in the cache."""
    t = shape.text
    once = forward(shape, record, s.trees)
    tokens = record.rows(s.trees)
    attention = once - 2.0 * t.weights * tokens
    head = 2.0 * record.responses * shape.vocabulary * t.width
    weights = 0.0 if s.lora else 2.0 * t.weights * tokens + (head if s.train_head else 0.0)
    tower = vision(shape, record) * (encoded if not s.train_vision else 2 if s.lora else 3)
    necessary = 2 * once + attention + weights + 2 * head + tower
    recompute = {"none": 0.0, "selective": 2.0 * t.widening * tokens, "full": once}[s.policy]
    if s.train_vision and s.policy == "full":
        recompute += vision(shape, record)
    return Flop(necessary, necessary + recompute, forward(shape, record) + head + vision(shape, record) * encoded)


@dataclass(frozen=True)
class Stage:
    """``step_s`` of the slowest rank, ``busy`` the share of the ranks that have a record of their own in a step."""

    name: str
    records: int
    steps: int
    tokens_per_step: float
    step_s: float
    tokens_per_s: float
    busy: float
    hours: float


def rate(gpu: Gpu, s: Setting, mfu: float) -> float:
    """FLOP/s of one rank."""
    return gpu.tflops(s.size) * 1e12 * mfu


def train_stage(
    name: str, records: int, epochs: int, pairs_per_step: int, record: Record, flop: Flop, s: Setting, speed: float,
    max_steps: int = 0,
) -> Stage:  # fmt: skip
    """A step waits for the rank with most records."""
    per_step = max(1, min(records, math.ceil(pairs_per_step / record.pairs)))
    steps = max(1, math.ceil(records / per_step)) * epochs
    steps = min(steps, max_steps) if max_steps else steps
    most = math.ceil(per_step / s.world)
    step_s = most * flop.run / speed
    tokens = per_step * record.rows(s.trees)
    return Stage(
        name, records, steps, tokens, step_s, tokens / step_s, per_step / (most * s.world), steps * step_s / 3600
    )


def fill_stage(name: str, records: int, record: Record, flop: Flop, s: Setting, speed: float) -> Stage:
    """Packs are shared out evenly."""
    seconds = records * flop.fill / speed / s.world
    tokens = float(record.tokens)
    return Stage(name, records, 0, tokens, 0.0, records * tokens / max(seconds, 1e-12), 1.0, seconds / 3600)


def answers_hours(
    shape: Shape, s: Setting, gpu: Gpu, mfu: float, requests: float, prompt: float, answer: float, batch: int
) -> float:
    """Hours on one device for so many answers of ``answer`` tokens after prompts of ``prompt`` tokens."""
    t = shape.text
    prefill = 2.0 * t.weights * prompt + 2.0 * t.depth * t.heads * t.head_dim * prompt**2
    cache = 2.0 * t.depth * t.key_heads * t.head_dim * s.size * (prompt + answer / 2)
    # every step of a batch reads the decoder and the head once, and each prompt's keys and values
    weights = s.size * (t.weights + shape.head)
    per_step = weights / batch + cache
    seconds = requests * (prefill / rate(gpu, s, mfu) + answer * per_step / (gpu.bandwidth * 1e12 * DECODE))
    return seconds / 3600
