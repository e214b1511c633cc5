"""Trees that cover what breaks their layout, and the loss and gradients of a packed batch.

1, 2 and 4 branches, answers of one token, odd frame counts, several videos in one prompt, several resolutions, a record
without a video. ``make_plan(name, frames, height, width)`` makes a video, sides in multiples of 28 or as it reads them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tempo_fast.reference.fill import reference_mode
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import PackedBatch
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import Branch, ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache, encode_pixels, prepare_pixels
from tempo_kernels.head import head_statistics
from tempo_kernels.objectives import BranchBatch

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
    bundle: Any,
    reader: Any,
    packed: PackedBatch,
    objective: Any,
    *,
    train_vision: bool = False,
    attention: str = "auto",
) -> tuple[float, dict[str, torch.Tensor]]:
    """Through the module that is trained, with cached statistics and their exact KL."""
    model, family = bundle.model, bundle.family
    model.zero_grad()
    with reference_mode(model):
        visual = FeatureCache().features(family, model, reader, packed.plans)
        hidden = tree_hidden(family, model, packed, visual, attention)
        reference = head_statistics(hidden, family.head(model).weight, packed.labels)
    module = TrainModule(model, family, objective, attention)
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
