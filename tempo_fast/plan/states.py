"""What an engine keeps of weights, gradients and optimizer on one rank.

Bytes, with P frozen and Q trained elements, s bytes of an element, N ranks; what trains has float32 masters:

              weights               gradients        optimizer (AdamW)     in backward          in the update
    torch     s·P + 4·Q             4·Q              8·Q                   -                    AdamW's own
    ZeRO-0    s·P + 4·Q             4·Q              8·Q                   -                    4·Q, a bucket
    ZeRO-2    s·P + 4·Q             4·Q/N            12·Q/N                bucket               4·Q/N + AdamW's own
    ZeRO-3    (s·P + 4·Q)/N         4·Q/N            12·Q/N                bucket, gathered     4·Q/N + AdamW's own

Stages 2 and 3 keep a master beside the weight even where both are float32, and make gradients flat before the update.
AdamW's own is a square root and a quotient of what it updates at once: 8 bytes of an element of the largest tensor, and
of the whole partition under stages 2 and 3; CUDA's grouped operators take all tensors of plain torch together, and make
4. Where the model itself trains in bfloat16, its weights are s·Q and masters 4·Q more.

Under ZeRO-3 a frozen vision tower is whole on every rank, and so is what has fewer elements than
``stage3_param_persistence_threshold``. Gathered is, at the turn from forward to backward, what is used again within
``stage3_max_reuse_distance`` elements, which is the last half of that distance, and what is prefetched
(``stage3_prefetch_bucket_size``); the prefetched also as the one buffer in which it came, until the last of it is used;
and the head. While a bucket is reduced, stage 3 has it a second time in the order of the ranks (gloo a third time), and
stage 2 has one of bfloat16 made flat and cast to float32. Offloading moves gradients and optimizer to the host;
``offload_param`` the partitions of the weights.

Sources: Rajbhandari et al., arXiv 1910.02054 (the division); DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py
(masters, buckets, flat gradients, in float32 mode), partitioned_param_coordinator.py (reuse and prefetch),
partition_parameters.py (AllGatherCoalescedHandle); ``runtime/zero.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tempo_fast.plan.setting import Setting
from tempo_fast.plan.shapes import Shape


@dataclass
class States:
    """Bytes by part. ``device`` and ``host`` stay; the others come on top of ``device`` at their time."""

    device: dict[str, float]
    host: dict[str, float] = field(default_factory=dict)
    turn: dict[str, float] = field(default_factory=dict)
    """At the turn from forward to backward."""
    end: dict[str, float] = field(default_factory=dict)
    """At the end of a backward."""
    update: float = 0.0


def trained_elements(shape: Shape, s: Setting) -> int:
    """Q."""
    if s.lora:
        return shape.text.lora(s.rank) + (shape.tower.lora(s.rank) if s.train_vision else 0)
    head = shape.head if s.train_head and not shape.shared_head else 0
    # a frozen head that shares the embedding holds it still
    embedding = shape.embedding if s.train_head or not shape.shared_head else 0
    return shape.language + head + embedding + shape.other + (shape.vision if s.train_vision else 0)


def states(shape: Shape, s: Setting, zero: Mapping[str, Any]) -> States:
    """Of one rank. ``zero``: DeepSpeed's ``zero_optimization`` section (``setting.buckets``)."""
    q, part, z = trained_elements(shape, s), trained_elements(shape, s) / s.world, s.size
    weight = 4 if s.lora else z  # bytes of a trained element in the model
    frozen = shape.total - (0 if s.lora else q)
    masters = 4.0 * q if weight < 4 else 0.0
    device = {"weights": float(z * frozen + weight * q), "gradients": 4.0 * q, "optimizer": 8.0 * q + masters}
    own = 4.0 * q if s.cuda else 8.0 * largest_trained(shape, s)
    if not s.deepspeed:
        return States(device, update=own)
    if s.stage == 0:
        return States(device, update=max(own, 4.0 * q))
    bucket = float(zero.get("reduce_bucket_size", 0))
    device |= {"gradients": 4.0 * part, "optimizer": 12.0 * part}
    reduced = {"buckets": bucket * _reducing(s, weight)}
    found = States(device, turn={"buckets": 4.0 * bucket}, end=reduced, update=12.0 * part)
    if s.stage == 3:
        _partition(found, shape, s, zero, weight)
    if s.offload_optimizer:
        found.host |= {name: device.pop(name) for name in ("gradients", "optimizer")}
        found.host["update"] = found.update
        found.update = 0.0
    return found


def _reducing(s: Setting, weight: int) -> int:
    """Bytes of an element of a bucket while it is reduced."""
    if s.stage == 2:
        return 4 if weight == 4 else 2 * weight + 4
    return 8 if s.cuda else 12


def _partition(found: States, shape: Shape, s: Setting, zero: Mapping[str, Any], weight: int) -> None:
    """Weights in parts, and what is gathered of them."""
    q, z = trained_elements(shape, s), s.size
    whole = shape.small + (0 if s.train_vision else shape.vision)
    elements = shape.total - whole + (q if s.lora else 0)
    size = (z * (elements - q) + weight * q) / max(1, elements)
    found.device["weights"] = float(z * whole)
    (found.host if s.offload_parameters else found.device)["weights partition"] = elements * size / s.world
    ahead = min(float(elements), float(zero.get("stage3_prefetch_bucket_size", 5e7)))
    reused = float(zero.get("stage3_max_reuse_distance", 1e9)) / 2
    live = min(float(elements), reused + ahead, float(zero.get("stage3_max_live_parameters", 1e9)))
    found.turn = {**found.turn, "gathered": (live + ahead) * size + z * shape.head}
    found.end = {**found.end, "gathered": float(z * max(shape.head, shape.embedding))}


def largest_trained(shape: Shape, s: Setting) -> int:
    """Elements of the largest tensor that trains."""
    linears = [x for t in (shape.text, *([shape.tower] if s.train_vision else [])) for x in t.linears]
    if s.lora:
        return max(s.rank * max(x.inputs, x.outputs) for x in linears if x.adapted)
    return max([x.inputs * x.outputs for x in linears] + ([shape.embedding] if not shape.shared_head else []))
