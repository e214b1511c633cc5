"""Recompute in the backward: the same losses and gradients, and selective stands between full and none in work and in
memory."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tree_checks import loss_and_gradients, make_trees

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.training.activations import POLICIES, set_recompute
from tempo_fast.training.loop import _set_mode
from tempo_fast.trees.attention import attention_mask
from tempo_fast.trees.batch import collate, collate_rows
from tempo_kernels.objectives import make_objective

DPO = make_objective("dpo", beta=0.3, sft_weight=1.0)


class Operators(TorchDispatchMode):
    """Counts the operators that run, matmuls by whether they widen; those of the recompute among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::mm", "aten::addmm"):
            inputs, outputs = args[-1].shape
            name = "widening" if outputs > inputs else "narrowing"
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def run(bundle: Any, reader: Any, packed: Any, how: str, **more: Any) -> Any:
    """(loss and gradients, operators)."""
    model = bundle.model
    model.train()
    if not more.get("train_vision"):
        bundle.family.vision_tower(model).eval()
    model.enable_input_require_grads()
    set_recompute(model, how)
    with Operators() as operators:
        found = loss_and_gradients(bundle, reader, packed, DPO, **more)
    return found, operators.counts


@pytest.mark.parametrize("attention", ["split", "dense"])
@pytest.mark.parametrize("layout", [collate, collate_rows])
def test_equal_to_off(tiny_lora: Any, reader: Any, make_plan: Any, layout: Any, attention: str) -> None:
    packed = layout(make_trees(tiny_lora, make_plan))
    plain, _ = run(tiny_lora, reader, packed, "none", attention=attention)
    for how in ("full", "selective"):
        (loss, gradients), _ = run(tiny_lora, reader, packed, how, attention=attention)
        assert loss == plain[0] and gradients.keys() == plain[1].keys() and len(gradients) >= 28
        for name, gradient in plain[1].items():
            assert gradient.abs().max() > 0
            assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_equal_to_off_where_the_tower_trains(tiny: Any, lora: Any, reader: Any, make_plan: Any) -> None:
    bundle = lora(tiny, vision=True)
    packed = collate(make_trees(bundle, make_plan))
    plain, _ = run(bundle, reader, packed, "none", train_vision=True)
    for how in ("full", "selective"):
        (loss, gradients), _ = run(bundle, reader, packed, how, train_vision=True)
        assert loss == pytest.approx(plain[0], rel=1e-6)
        assert any("visual" in name for name in gradients)
        for name, gradient in plain[1].items():
            assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_equal_to_off_in_the_other_families(frames: Any, lora: Any) -> None:
    """As far as the policy goes a family is its text model's class."""
    bundle = lora(frames)
    family, model = bundle.family, bundle.model
    model.train()
    model.enable_input_require_grads()
    ids = torch.arange(12)[None] % 50 + 20
    positions = torch.arange(12).expand(3, 1, 12)
    found = []
    for how in POLICIES:
        set_recompute(model, how)
        model.zero_grad()
        hidden = family.hidden_states(model, ids, positions, None, torch.zeros_like(ids, dtype=torch.bool), None)
        hidden.square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for gradients in found[1:]:
        assert len(gradients) == len(found[0]) >= 28
        for ours, theirs in zip(gradients, found[0], strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_selective_computes_less_again_than_full(tiny_lora: Any, reader: Any, make_plan: Any) -> None:
    packed = collate(make_trees(tiny_lora, make_plan))
    counts = {how: run(tiny_lora, reader, packed, how)[1] for how in POLICIES}
    none, full, selective = (counts[how] for how in POLICIES)
    for name in (ATTENTION, "narrowing", "widening"):
        assert full[name] > none[name] > 0, name
    assert selective[ATTENTION] == none[ATTENTION]  # no attention runs twice
    assert selective["narrowing"] == none["narrowing"]
    assert none["widening"] < selective["widening"] <= full["widening"]


def test_selective_keeps_less_than_none(tiny_lora: Any, reader: Any, make_plan: Any) -> None:
    """Bytes of the storages that a layer's forward leaves behind: what autograd saved and what the policy kept."""
    packed = collate(make_trees(tiny_lora, make_plan))
    model = tiny_lora.model
    run(tiny_lora, reader, packed, "none")  # sets the modes
    layers = model.get_base_model().model.language_model.layers
    alive: dict[str, int] = {}

    def tensors() -> dict[int, int]:
        gc.collect()
        found: dict[int, int] = {}
        for obj in gc.get_objects():
            if type(obj) is torch.Tensor and not obj.requires_grad:
                found[obj.untyped_storage().data_ptr()] = obj.untyped_storage().nbytes()
        return found

    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for how in POLICIES:
        set_recompute(model, how)
        saved.clear()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        before = set(tensors())
        x = torch.randn(1, packed.input_ids.shape[1], 64, requires_grad=True)
        rotary = model.get_base_model().model.language_model.rotary_emb(x, packed.position_ids)
        before |= {r.untyped_storage().data_ptr() for r in rotary}
        mask = attention_mask("split", model, packed, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = layers[0](x, attention_mask=mask, position_embeddings=rotary)
        kept = saved | {k: n for k, n in tensors().items() if k not in before}
        alive[how] = sum(n for key, n in kept.items() if key not in weights)
        del out, kept
    assert alive["full"] < alive["selective"] < alive["none"]


def test_the_setting_reaches_the_layers(tiny_lora: Any) -> None:
    layers = tiny_lora.model.get_base_model().model.language_model.layers
    for given, on in ((True, True), ("selective", True), ("none", False), ("full", True), (False, False)):
        _set_mode(tiny_lora, TrainConfig(gradient_checkpointing=given), vision_trains=False)
        assert all(layer.gradient_checkpointing == on and layer.training for layer in layers)
        if on:
            assert ("context_fn" in layers[0]._gradient_checkpointing_func.keywords) == (given == "selective")


def test_what_cannot_be_is_refused(tiny_lora: Any) -> None:
    with pytest.raises(InputError, match=r"train\.gradient_checkpointing: must be .* selective, got 'x'"):
        set_recompute(tiny_lora.model, "x")
