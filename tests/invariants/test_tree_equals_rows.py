"""A packed tree gives the loss and every adapter gradient of separate rows; packing several trees changes nothing.

The trees cover what breaks such layouts: see tree_checks.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tree_checks import assert_equal, loss_and_gradients, make_tree, make_trees

from tempo_fast.trees.batch import PackedBatch, collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import Branch, ResponseTree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.objectives import make_objective


@pytest.mark.parametrize("objective", ["dpo", "rrpo"])
@pytest.mark.parametrize(
    ("attention", "own"), [("dense", "sdpa"), ("dense", "eager"), ("split", "sdpa"), ("split", "eager")]
)
def test_tree_equals_rows(
    tiny_lora: Any, reader: Any, make_plan: Any, attention: str, own: str, objective: str
) -> None:
    """Each way of attending packed trees against rows under a dense mask."""
    tiny_lora.model.get_base_model().set_attn_implementation(own)
    trees = make_trees(tiny_lora, make_plan)
    options = {"beta": 0.3, "alpha": 0.5} if objective == "rrpo" else {"beta": 0.3, "sft_weight": 1.0}
    made = make_objective(objective, **options)
    packed = loss_and_gradients(tiny_lora, reader, collate(trees), made, attention=attention)
    rows = loss_and_gradients(tiny_lora, reader, collate_rows(trees), made, attention="dense")
    assert_equal(packed, rows)


@pytest.mark.parametrize("attention", ["dense", "split"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_branch_count_equals_rows(tiny_lora: Any, reader: Any, make_plan: Any, k: int, attention: str) -> None:
    trees = [make_tree(tiny_lora, make_plan, f"t{i}", k, [(2 * i + 1, 28, 28)]) for i in range(2)]
    made = make_objective("sft") if k == 1 else make_objective("dpo", beta=0.3, sft_weight=0.5)
    packed = loss_and_gradients(tiny_lora, reader, collate(trees), made, attention=attention)
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
