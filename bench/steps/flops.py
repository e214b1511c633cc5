"""FLOP of a step by formula. A multiply-add is two.

P weights of the language model's linear layers (no embedding, no head, no adapters), T its tokens, L its layers, w
heads times head size, A pairs of a query and a key it sees, N answer tokens, D hidden size, V vocabulary.

    necessary = 4·P·T + 12·L·w·A + vision + 4·N·V·D

LoRA needs 2·P·T forward and 2·P·T for the gradients of activations; attention two matmuls of 2·w per pair forward and
four backward; a frozen head its logits and their way back. The adapters' own are left out. ``run`` adds what a policy
computes again (``full`` 2·P·T + 4·L·w·A, ``selective`` 2·P·T of the layers that widen), and a live reference, a forward
and 2·N·V·D; all logits count B·T tokens for N.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bench.steps.sides import Rig, Side
from tempo_fast.models.family import Grid, unwrap


@dataclass
class Work:
    """FLOP of one step."""

    necessary: float = 0.0
    run: float = 0.0


def pairs_seen(prompt: int, answers: Iterable[int], *, trees: bool, width: int = 0) -> int:
    """A of one record's answers: sharing their prompt, or each in a causal row of ``width`` tokens."""
    if trees:
        return prompt * (prompt + 1) // 2 + sum(prompt * n + n * (n + 1) // 2 for n in answers)
    return sum(width * (width + 1) // 2 for _ in answers)


def linear_weights(module: nn.Module) -> int:
    """Elements of the weights of all layers that multiply every token, without adapters."""
    return sum(
        m.weight.numel()  # type: ignore[operator]
        for name, m in module.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv3d)) and "lora_" not in name
    )


def widening_weights(module: nn.Module) -> int:
    """Those of ``linear_weights`` that have more outputs than inputs: what ``selective`` multiplies by again."""
    return sum(
        m.weight.numel()
        for name, m in module.named_modules()
        if isinstance(m, nn.Linear) and "lora_" not in name and m.out_features > m.in_features
    )


def vision_forward(model: nn.Module, grid: Grid) -> float:
    """Of Qwen's towers: patches through the blocks, merged ones through the merger, attention in frames or windows."""
    inner: Any = unwrap(model).model.visual
    config, patches = inner.config, grid.t * grid.h * grid.w
    merged = patches // config.spatial_merge_size**2
    merger = linear_weights(inner.merger)
    flop = 2.0 * patches * (linear_weights(inner) - merger) + 2.0 * merged * merger
    width = config.embed_dim if hasattr(config, "embed_dim") else config.hidden_size
    frame = (grid.h * grid.w) ** 2
    seen = [frame] * config.depth
    if hasattr(config, "fullatt_block_indexes"):
        side = config.window_size // config.patch_size
        windows = _squares(grid.h, side) * _squares(grid.w, side)
        seen = [frame if i in config.fullatt_block_indexes else windows for i in range(config.depth)]
    return flop + 4.0 * width * grid.t * sum(seen)


def _squares(length: int, side: int) -> int:
    """Σ of squares of the parts of ``length`` cut every ``side``; Σ (a·b)² over windows a·b is that of both axes."""
    full, rest = divmod(length, side)
    return full * side**2 + rest**2


def work_of(rig: Rig, side: Side) -> Work:
    """FLOP of one step of a side, from the micro-batches it runs."""
    model = rig.bundle.model
    text: Any = unwrap(model).config.get_text_config()
    p, wide = (count(unwrap(model).model.language_model) for count in (linear_weights, widening_weights))
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = text.num_hidden_layers * text.num_attention_heads * head_dim
    head = 2.0 * text.vocab_size * text.hidden_size
    work = Work()
    for items in rig.batches(side):
        packed = rig.pack(side, items)
        tokens, width = packed.input_ids.numel(), packed.input_ids.shape[1]
        seen = sum(
            pairs_seen(
                len(item.tree.prompt.input_ids), [len(b.input_ids) for b in item.tree.branches],
                trees=side.trees, width=width,
            )
            for item in items
        )  # fmt: skip
        logits = head * (tokens if side.all_logits else len(packed.labels))
        forward = 2.0 * p * tokens + 4.0 * attention * seen
        vision = 0.0 if rig.cached_vision else sum(vision_forward(model, plan.grid) for plan in packed.plans)
        work.necessary += 2 * forward + 4.0 * attention * seen + vision + 2 * head * len(packed.labels)
        work.run += 2 * forward + 4.0 * attention * seen + vision + 2 * logits
        work.run += {"none": 0.0, "selective": 2.0 * wide * tokens, "full": forward}[rig.policy]
        work.run += forward + logits if side.live else 0.0
    return work
