"""Families that see whole frames through everything that uses a family: packed trees, vision, answers, scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_checks import check_generation, check_scores, check_vision
from frame_models import FramesPlan, FramesReader
from tree_checks import assert_equal, loss_and_gradients, make_tree, make_trees

from tempo_fast.trees.batch import collate, collate_rows
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.objectives import make_objective


@pytest.fixture
def reader() -> FramesReader:
    return FramesReader()


@pytest.fixture
def make(frames: Any) -> Callable[..., FramesPlan]:
    """Videos of any size become squares of the model's."""
    return lambda name, n_frames, height, width: FramesPlan(f"{name} {height}x{width}", n_frames, frames.geometry)


@pytest.mark.parametrize(
    ("attention", "own"), [("dense", "sdpa"), ("dense", "eager"), ("split", "sdpa"), ("split", "eager")]
)
@pytest.mark.parametrize("objective", ["dpo", "rrpo"])
def test_tree_equals_rows(
    frames: Any, lora: Any, reader: Any, make: Any, attention: str, own: str, objective: str
) -> None:
    bundle = lora(frames)
    bundle.model.get_base_model().set_attn_implementation(own)
    trees = make_trees(bundle, make)
    options = {"beta": 0.3, "alpha": 0.5} if objective == "rrpo" else {"beta": 0.3, "sft_weight": 1.0}
    made = make_objective(objective, **options)
    packed = loss_and_gradients(bundle, reader, collate(trees), made, attention=attention)
    assert_equal(packed, loss_and_gradients(bundle, reader, collate_rows(trees), made, attention="dense"))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_branch_count_equals_rows(frames: Any, lora: Any, reader: Any, make: Any, k: int) -> None:
    bundle = lora(frames)
    trees = [make_tree(bundle, make, f"t{i}", k, [(2 * i + 1, 28, 28)]) for i in range(2)]
    made = make_objective("sft") if k == 1 else make_objective("dpo", beta=0.3, sft_weight=0.5)
    packed = loss_and_gradients(bundle, reader, collate(trees), made)
    assert_equal(packed, loss_and_gradients(bundle, reader, collate_rows(trees), made))


def test_tree_equals_rows_where_vision_trains(frames: Any, lora: Any, reader: Any, make: Any) -> None:
    bundle = lora(frames, vision=True)
    trees = [make_tree(bundle, make, f"t{i}", 1, [(3, 28, 28)]) for i in range(2)]
    made = make_objective("sft")
    packed = loss_and_gradients(bundle, reader, collate(trees), made, train_vision=True)
    rows = loss_and_gradients(bundle, reader, collate_rows(trees), made, train_vision=True)
    # LLaVA-NeXT-Video reads the tower before its last layer
    layers = bundle.config.vision_config.num_hidden_layers - (bundle.family.name == "llava_next_video")
    assert sum("vision_tower" in name for name in packed[1]) == layers * 6 * 2
    assert_equal(packed, rows)


def test_training_the_language_model_keeps_cached_features(frames: Any, lora: Any, reader: Any, make: Any) -> None:
    bundle = lora(frames)
    cache, plan = FeatureCache(), make("v", 2, 28, 28)

    def look(changed: str) -> tuple[int, int]:
        with torch.no_grad():
            next(p for n, p in bundle.model.named_parameters() if changed in n).add_(1)
        cache.features(bundle.family, bundle.model, reader, [plan])
        return cache.hits, cache.misses

    assert [look(n) for n in ("lora_B", "lora_B", "multi_modal_projector")] == [(0, 1), (1, 1), (1, 2)]


def test_answers(frames: Any, reader: Any, make: Any) -> None:
    check_generation(frames, reader, make)


def test_scores(frames: Any, reader: Any, make: Any) -> None:
    check_scores(frames, reader, make)


def test_vision(frames: Any, reader: Any, make: Any) -> None:
    check_vision(frames, reader, make)
