"""Cached statistics equal a live reference; the model with adapters off equals the store, exactly in equal shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.reference.fill import fill, reference_mode, start_check
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import PackedBatch, collate
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.head import linear_logp
from tempo_kernels.objectives import BranchBatch, make_objective


def make_trees(bundle: Any, make_plan: Any) -> list[ResponseTree]:
    answers = ["A red circle moves left.", "Then a blue square grows.", "It appears"]
    return [
        build_tree(
            bundle.family,
            bundle.tokenizer,
            bundle.config,
            id=str(i),
            prompt_text="What happened?",
            answers=answers[: 2 + i % 2],
            spans=[[[0, 5]]] * (2 + i % 2),
            plans=[make_plan(f"v{i}", 2 * i + 1)] if i != 1 else [],
        )  # fmt: skip
        for i in range(3)
    ]


def keys_of(store: ReferenceStore, trees: list[ResponseTree]) -> list[str]:
    return [store.key(tree, b) for tree in trees for b in range(len(tree.branches))]


def pairs_of(packed: PackedBatch) -> BranchBatch:
    return BranchBatch(
        branch=packed.branch,
        n_branches=packed.n_branches,
        chosen=torch.tensor([b[0] for b in packed.tree_branches for _ in b[1:]]),
        rejected=torch.tensor([x for b in packed.tree_branches for x in b[1:]]),
        spans=packed.spans,
    )


def live_hidden(bundle: Any, packed: PackedBatch, visual: Any) -> torch.Tensor:
    with reference_mode(bundle.model):
        return tree_hidden(bundle, bundle.model, packed, visual)


def test_cached_equals_live(tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    """Loss and gradients of RRPO (log-ratios and KL) to 1e-6, the live side from the base's hidden states."""
    bundle, cache = tiny_lora, FeatureCache()
    trees = make_trees(bundle, make_plan)
    store = ReferenceStore(tmp_path, {"reference": "tiny"})
    fill(bundle, store, trees, reader, cache, kl=True, max_tokens=4096)
    packed = collate(trees)
    visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
    module = TrainModule(bundle.model, bundle.family, make_objective("rrpo", beta=0.3, alpha=0.5))

    def run(reference: Any) -> tuple[float, dict[str, torch.Tensor]]:
        bundle.model.zero_grad()
        loss, _ = module(packed, pairs_of(packed), [], features=visual, reference=reference)
        loss.backward()
        return float(loss.detach()), {n: p.grad.clone() for n, p in bundle.model.named_parameters() if p.requires_grad}

    cached, cached_gradients = run(store.get(keys_of(store, trees), kl=True))
    live, live_gradients = run(live_hidden(bundle, packed, visual))
    assert cached == pytest.approx(live, rel=1e-6)
    for name, gradient in live_gradients.items():
        assert (cached_gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_adapters_off_equals_store_exactly_in_equal_shapes(
    tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path
) -> None:
    bundle, cache = tiny_lora, FeatureCache()
    # one tree a shard, so that the store saw the shapes of the check
    for tree in make_trees(bundle, make_plan):
        store = ReferenceStore(tmp_path, {"reference": "tiny"})
        fill(bundle, store, [tree], reader, cache, kl=True, max_tokens=4096)
        packed = collate([tree])
        visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
        hidden = live_hidden(bundle, packed, visual)
        stored = store.get(keys_of(store, [tree]), kl=True)
        out = linear_logp(hidden, bundle.family.head(bundle.model).weight, packed.labels, reference=stored)
        assert torch.equal(out.logp, stored.logp)
        assert torch.equal(out.kl, torch.zeros_like(out.kl))
        assert start_check(bundle, store, [tree], reader, cache) == 0.0


def test_store_equals_other_shapes_within_rounding(tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    trees = make_trees(tiny_lora, make_plan)
    store = ReferenceStore(tmp_path, {"reference": "tiny"})
    budget = max(t.n_tokens for t in trees)  # a shard per tree or two, checked against one pack of all
    fill(tiny_lora, store, trees, reader, FeatureCache(), kl=False, max_tokens=budget)
    assert len(list((tmp_path / "shards").iterdir())) > 1
    assert start_check(tiny_lora, store, trees, reader, FeatureCache()) < 1e-4


def test_rewards_and_kl_are_zero_before_the_first_step(
    tiny: Any, lora: Any, reader: Any, make_plan: Any, tmp_path: Path
) -> None:
    bundle, cache = lora(tiny, random_b=False), FeatureCache()
    trees = make_trees(bundle, make_plan)
    store = ReferenceStore(tmp_path, {"reference": "tiny"})
    fill(bundle, store, trees, reader, cache, kl=True, max_tokens=4096)
    order = sorted(trees, key=lambda t: -t.n_tokens)  # as fill packs them: equal shapes
    packed = collate(order)
    visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
    stored = store.get(keys_of(store, order), kl=True)
    with torch.no_grad():
        hidden = tree_hidden(bundle, bundle.model, packed, visual)
        head = linear_logp(hidden, bundle.family.head(bundle.model).weight, packed.labels, reference=stored)
    out = make_objective("dpo", beta=0.3)(head.logp, head.ref_logp, head.kl, pairs_of(packed))
    assert torch.equal(out.chosen_rewards, torch.zeros_like(out.chosen_rewards))
    assert torch.equal(out.rejected_rewards, torch.zeros_like(out.rejected_rewards))
    assert torch.equal(head.kl, torch.zeros_like(head.kl))


def test_start_check_stops_another_model(
    tiny_lora: Any, tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path
) -> None:
    from tempo_fast.errors import InputError
    from tempo_fast.models.load import load_bundle

    trees = make_trees(tiny_lora, make_plan)
    store = ReferenceStore(tmp_path, {"reference": "tiny"})
    fill(tiny_lora, store, trees, reader, FeatureCache(), kl=False, max_tokens=4096)
    other = load_bundle(tiny_path, "float32", "cpu")
    with torch.no_grad():
        other.model.model.language_model.layers[0].mlp.down_proj.weight.mul_(1.05)
    with pytest.raises(InputError, match="differs from the stored reference"):
        start_check(other, store, trees, reader, FeatureCache())
