"""A packed tree gives the loss and every adapter gradient of separate rows; packing several trees changes nothing.

The trees cover what breaks such layouts: 1, 2 and 4 branches, answers of one token, odd frame counts, several videos in
one prompt, several resolutions, a record without a video.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tempo_fast.reference.fill import reference_mode
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import PackedBatch, collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import Branch, ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache, encode_pixels, prepare_pixels
from tempo_kernels.head import head_statistics
from tempo_kernels.objectives import BranchBatch, make_objective

ANSWERS = ["A red circle moves left. Then a blue square grows.", "x", "It appears at last.", "A green triangle"]


def make_tree(bundle: Any, make_plan: Any, name: str, k: int, videos: list[tuple[int, int, int]]) -> ResponseTree:
    tree = build_tree(
        bundle.family, bundle.tokenizer, bundle.config,
        id=name, prompt_text=f"What happened in {name}?", answers=ANSWERS[:k],
        spans=[[[0, min(5, len(a))]] for a in ANSWERS[:k]] if k != 2 else None,
        plans=[make_plan(f"{name}{i}", f, h, w) for i, (f, h, w) in enumerate(videos)],
    )  # fmt: skip
    return tree


def make_trees(bundle: Any, make_plan: Any) -> list[ResponseTree]:
    trees = [
        make_tree(bundle, make_plan, "odd", 2, [(5, 28, 28)]),
        make_tree(bundle, make_plan, "two videos", 4, [(1, 56, 28), (3, 28, 84)]),
        make_tree(bundle, make_plan, "text", 2, []),
        make_tree(bundle, make_plan, "single", 1, [(2, 28, 28)]),
    ]
    # an answer of exactly one token, as labels only: no end of turn
    one = Branch.of(trees[0].branches[1].input_ids[:1])
    trees[0] = dataclasses.replace(trees[0], branches=[trees[0].branches[0], one])
    return trees


def pairs_of(packed: PackedBatch) -> BranchBatch:
    others = [(b[0], x) for b in packed.tree_branches for x in (b[1:] or b[:1])]
    chosen, rejected = zip(*others, strict=True)
    return BranchBatch(
        branch=packed.branch,
        n_branches=packed.n_branches,
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        spans=packed.spans,
    )


def loss_and_gradients(
    bundle: Any, reader: Any, packed: PackedBatch, objective: Any, *, train_vision: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Through the module that is trained, with cached statistics and their exact KL."""
    model, family = bundle.model, bundle.family
    model.zero_grad()
    with reference_mode(model):
        visual = FeatureCache().features(family, model, reader, packed.plans)
        hidden = tree_hidden(family, model, packed, visual)
        reference = head_statistics(hidden, family.head(model).weight, packed.labels)
    module = TrainModule(model, family, objective)
    if train_vision:
        pixels = prepare_pixels(reader, packed.plans, "cpu", torch.float32)
        visual = None if pixels is None else encode_pixels(family, model, pixels)
    loss, _ = module(packed, pairs_of(packed), [], features=visual, reference=reference)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return float(loss.detach()), gradients


def assert_equal(ours: Any, theirs: Any, *, rel: float = 1e-4) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) >= 28
    for name, gradient in theirs[1].items():
        scale = gradient.abs().max()
        assert scale > 0, name
        assert (ours[1][name] - gradient).abs().max() <= rel * scale, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("objective", ["dpo", "rrpo"])
def test_tree_equals_rows(tiny_lora: Any, reader: Any, make_plan: Any, objective: str, attention: str) -> None:
    tiny_lora.model.get_base_model().set_attn_implementation(attention)
    trees = make_trees(tiny_lora, make_plan)
    options = {"beta": 0.3, "alpha": 0.5} if objective == "rrpo" else {"beta": 0.3, "sft_weight": 1.0}
    made = make_objective(objective, **options)
    packed = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    rows = loss_and_gradients(tiny_lora, reader, collate_rows(trees), made)
    assert_equal(packed, rows)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_branch_count_equals_rows(tiny_lora: Any, reader: Any, make_plan: Any, k: int) -> None:
    trees = [make_tree(tiny_lora, make_plan, f"t{i}", k, [(2 * i + 1, 28, 28)]) for i in range(2)]
    made = make_objective("sft") if k == 1 else make_objective("dpo", beta=0.3, sft_weight=0.5)
    packed = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    rows = loss_and_gradients(tiny_lora, reader, collate_rows(trees), made)
    assert_equal(packed, rows)


def test_packed_equals_unpacked(tiny_lora: Any, reader: Any, make_plan: Any) -> None:
    trees = make_trees(tiny_lora, make_plan)
    made = make_objective("rrpo", beta=0.3, alpha=0.5)
    together = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    total, summed = 0.0, {}
    for tree in trees:
        loss, gradients = loss_and_gradients(tiny_lora, reader, collate([tree]), made)
        total += loss
        for name, gradient in gradients.items():
            summed[name] = summed.get(name, 0) + gradient
    assert_equal(together, (total, summed))


def test_order_of_trees_does_not_matter(tiny_lora: Any, reader: Any, make_plan: Any) -> None:
    trees = make_trees(tiny_lora, make_plan)
    made = make_objective("dpo", beta=0.3, sft_weight=1.0)
    one = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    other = loss_and_gradients(tiny_lora, reader, collate(trees[::-1]), made)
    assert_equal(one, other)


def test_tree_equals_rows_where_vision_trains(tiny: Any, lora: Any, reader: Any, make_plan: Any) -> None:
    bundle = lora(tiny, vision=True)
    trees = [make_tree(bundle, make_plan, f"t{i}", 1, [(3, 28, 28)]) for i in range(2)]
    made = make_objective("sft")
    packed = loss_and_gradients(bundle, reader, collate(trees), made, train_vision=True)
    rows = loss_and_gradients(bundle, reader, collate_rows(trees), made, train_vision=True)
    assert any("visual" in name for name in packed[1])
    assert_equal(packed, rows)


def test_a_branch_sees_neither_its_siblings_nor_other_trees(tiny: Any, reader: Any, make_plan: Any) -> None:
    """Changing one branch leaves every other branch's hidden states as they were, to the bit."""
    trees = make_trees(tiny, make_plan)
    cache = FeatureCache()

    def hidden(trees: list[ResponseTree]) -> tuple[PackedBatch, torch.Tensor]:
        packed = collate(trees)
        with torch.no_grad():
            visual = cache.features(tiny.family, tiny.model, reader, packed.plans)
            return packed, tree_hidden(tiny, tiny.model, packed, visual)

    packed, before = hidden(trees)
    branches = list(trees[1].branches)
    branches[1] = Branch.of([int(t) ^ 1 for t in branches[1].input_ids])
    _, after = hidden([trees[0], dataclasses.replace(trees[1], branches=branches), *trees[2:]])
    changed = packed.branch == packed.tree_branches[1][1]
    first_of_changed = changed.nonzero()[0]  # predicted from the prompt, which is not changed
    assert not torch.equal(before[changed][1:], after[changed][1:]) or changed.sum() == 1
    assert torch.equal(before[~changed], after[~changed])
    assert torch.equal(before[first_of_changed], after[first_of_changed])
