"""Qwen2-VL's successors through everything that uses a family: packed trees, vision, answers, scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from family_checks import check_generation, check_scores, check_vision
from qwen_models import PATCH
from tree_checks import assert_equal, loss_and_gradients, make_tree, make_trees

from tempo_fast.trees.batch import collate, collate_rows
from tempo_kernels.objectives import make_objective


@pytest.fixture
def make(successor: Any, make_plan: Any) -> Callable[..., Any]:
    """Two merged tokens of this family where tree_checks has one: more than one window and one row."""
    patch = PATCH[successor.family.name]
    return lambda name, frames, h, w: make_plan(name, frames, h // 7 * patch, w // 7 * patch, patch)


@pytest.mark.parametrize(("attention", "own"), [("dense", "sdpa"), ("dense", "eager"), ("split", "sdpa")])
def test_tree_equals_rows(successor: Any, lora: Any, reader: Any, make: Any, attention: str, own: str) -> None:
    """Each way of attending packed trees against rows under a dense mask."""
    bundle = lora(successor)
    bundle.model.get_base_model().set_attn_implementation(own)
    trees = make_trees(bundle, make)
    made = make_objective("rrpo", beta=0.3, alpha=0.5)
    packed = loss_and_gradients(bundle, reader, collate(trees), made, attention=attention)
    assert_equal(packed, loss_and_gradients(bundle, reader, collate_rows(trees), made, attention="dense"))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_branch_count_equals_rows(successor: Any, lora: Any, reader: Any, make: Any, k: int) -> None:
    bundle = lora(successor)
    trees = [make_tree(bundle, make, f"t{i}", k, [(2 * i + 1, 28, 28)]) for i in range(2)]
    made = make_objective("sft") if k == 1 else make_objective("dpo", beta=0.3, sft_weight=0.5)
    packed = loss_and_gradients(bundle, reader, collate(trees), made)
    assert_equal(packed, loss_and_gradients(bundle, reader, collate_rows(trees), made))


def test_tree_equals_rows_where_vision_trains(successor: Any, lora: Any, reader: Any, make: Any) -> None:
    bundle = lora(successor, vision=True)
    trees = [make_tree(bundle, make, f"t{i}", 1, [(3, 28, 56)]) for i in range(2)]
    made = make_objective("sft")
    packed = loss_and_gradients(bundle, reader, collate(trees), made, train_vision=True)
    rows = loss_and_gradients(bundle, reader, collate_rows(trees), made, train_vision=True)
    # the last block feeds everything, so a tower without gradient shows
    assert any("visual.blocks.2." in name for name in packed[1])
    assert_equal(packed, rows)


def test_answers(successor: Any, reader: Any, make: Any) -> None:
    check_generation(successor, reader, make)


def test_scores(successor: Any, reader: Any, make: Any) -> None:
    check_scores(successor, reader, make)


def test_vision(successor: Any, reader: Any, make: Any) -> None:
    check_vision(successor, reader, make)
