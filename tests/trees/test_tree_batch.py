"""Packed batches: the mask rule, positions, gather indices; rows say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tempo_fast.models.family import Prompt
from tempo_fast.trees.batch import collate, collate_rows
from tempo_fast.trees.layout import Branch, ResponseTree


def make_trees(seed: int, n: int = 3) -> list[ResponseTree]:
    """Random trees: lengths 1 to 6, 1 to 4 branches, positions that do not start at 0."""
    g = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=g))

    trees = []
    for t in range(n):
        length = draw(1, 7)
        positions = torch.randint(0, 20, (3, length), generator=g)
        prompt = Prompt(torch.randint(0, 99, (length,), generator=g), positions, torch.zeros(length, dtype=torch.bool))
        branches = []
        for _ in range(draw(1, 5)):
            k = draw(1, 7)
            branches.append(Branch.of(torch.randint(0, 99, (k,), generator=g).tolist(), [draw(0, 3) for _ in range(k)]))
        trees.append(ResponseTree(f"t{t}", prompt, branches, [f"plan {t}"]))
    return trees


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_the_rule_written_out(seed: int) -> None:
    packed = collate(make_trees(seed))
    allowed, branch, tree = packed.allowed()[0], packed.branch_ids, packed.tree_ids
    for q in range(len(branch)):
        for k in range(len(branch)):
            expected = k <= q and tree[k] == tree[q] and (branch[k] == -1 or branch[k] == branch[q])
            assert bool(allowed[q, k]) == bool(expected), (q, k)
    for dtype in (torch.float32, torch.bfloat16):
        mask = packed.mask(dtype)
        assert mask.shape == (1, 1, len(branch), len(branch)) and mask.dtype == dtype
        assert torch.equal(mask[0, 0] == 0, allowed) and mask.min() == torch.finfo(dtype).min


@pytest.mark.parametrize("seed", range(4))
def test_labels_follow_the_position_that_predicts_them(seed: int) -> None:
    trees = make_trees(seed)
    packed = collate(trees)
    ids, positions = packed.input_ids[0], packed.position_ids[:, 0]
    n = 0
    branch_number = 0
    for t, tree in enumerate(trees):
        assert packed.tree_branches[t] == list(range(branch_number, branch_number + len(tree.branches)))
        for branch in tree.branches:
            rows = packed.gather[n : n + len(branch.input_ids)].tolist()
            # the first from the prompt's last position, the others from the token before
            assert packed.branch_ids[rows[0]] == -1 and int(ids[rows[0]]) == int(tree.prompt.input_ids[-1])
            assert ids[rows[1:]].tolist() == branch.input_ids[:-1]
            assert packed.labels[n : n + len(rows)].tolist() == branch.input_ids
            assert packed.spans[n : n + len(rows)].tolist() == branch.spans
            assert packed.branch[n : n + len(rows)].tolist() == [branch_number] * len(rows)
            for axis in range(3):
                start = tree.prompt.next_position
                assert positions[axis, rows[1:]].tolist() == list(range(start, start + len(rows) - 1))
            n, branch_number = n + len(rows), branch_number + 1
    assert n == len(packed.gather) == len(packed.labels) and packed.n_branches == branch_number
    assert packed.n_tokens == len(ids) == sum(t.n_tokens for t in trees)
    assert packed.plans == [p for t in trees for p in t.plans]


@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_the_same_tokens_in_the_same_order(seed: int) -> None:
    trees = make_trees(seed)
    packed, rows = collate(trees), collate_rows(trees)
    for name in ("labels", "branch", "spans"):
        assert torch.equal(getattr(packed, name), getattr(rows, name))
    assert packed.tree_branches == rows.tree_branches
    assert torch.equal(packed.input_ids.flatten()[packed.gather], rows.input_ids.flatten()[rows.gather])
    flat = [b.position_ids.flatten(1)[:, b.gather] for b in (packed, rows)]
    assert torch.equal(*flat)
    # one row an answer, its prompt and plan again in each
    answers = [(t, b) for t in trees for b in t.branches]
    assert rows.input_ids.shape[0] == len(answers) and rows.plans == [p for t, _ in answers for p in t.plans]
    assert rows.n_tokens == sum(len(t.prompt.input_ids) + len(b.input_ids) for t, b in answers)
    for i, (tree, branch) in enumerate(answers):
        n = len(tree.prompt.input_ids) + len(branch.input_ids)
        assert torch.equal(rows.allowed()[i, :n, :n], torch.ones(n, n, dtype=torch.bool).tril())
        assert not rows.allowed()[i, :n, n:].any()  # nobody sees the padding
        assert rows.tree_ids.view(len(answers), -1)[i, n:].eq(-1).all()


def test_an_empty_batch_is_refused() -> None:
    for make in (collate, collate_rows):
        with pytest.raises(ValueError, match="at least one tree"):
            make([])


def test_visual_slots_and_features_must_agree(tiny: Any, make_plan: Any) -> None:
    from tempo_fast.trees.forward import tree_hidden
    from tempo_fast.trees.layout import build_tree

    tree = build_tree(
        tiny.family, tiny.tokenizer, tiny.config,
        id="a", prompt_text="?", answers=["x"], plans=[make_plan("v", 2)],
    )  # fmt: skip
    for features in (None, torch.zeros(2, 64)):
        with pytest.raises(ValueError, match="1 visual slots"):
            tree_hidden(tiny, tiny.model, collate([tree]), features)
