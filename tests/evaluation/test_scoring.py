"""Shared-prefix scores equal those of the response tree, of separate rows, and of a log-softmax over full logits."""

from __future__ import annotations

import pytest
import torch

from tempo_fast.evaluation import scoring
from tempo_fast.models import Grid
from tempo_fast.trees.batch import collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.head import linear_logp

ITEMS = [
    ("Describe what happens in this video in order.", ["A red circle moves left. Then a blue square grows.", "Then."]),
    ("What happened before the blue square?", ["A red circle moves left.", "It appears at last.", "A green triangle."]),
    ("Describe it.", ["A blue square grows. A green triangle moves right. A red circle moves left. It appears."]),
]


def by_trees(bundle, reader, features, plans, items, collate_fn):
    out = []
    for prompt, answers in items:
        tree = build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id="x", prompt_text=prompt, answers=answers, plans=plans
        )
        packed = collate_fn([tree], bundle.device)
        visual = features.features(bundle.family, bundle.model, reader, packed.plans)
        with torch.no_grad():
            hidden = tree_hidden(bundle, bundle.model, packed, visual)
            head = bundle.family.head(bundle.model)
            logp = linear_logp(hidden, head.weight, packed.labels, impl="eager").logp
        sums = torch.zeros(len(answers), dtype=torch.float64)
        sums.index_add_(0, packed.branch, logp.double())
        out.append([(float(s), len(b.input_ids)) for s, b in zip(sums, tree.branches, strict=True)])
    return out


@pytest.mark.parametrize("frames", [None, 2, 13])
@pytest.mark.parametrize("collate_fn", [collate, collate_rows])
def test_equal_to_trees_and_rows(tiny, reader, make_plan, frames, collate_fn):
    plans = [] if frames is None else [make_plan("v", frames, 28, 56)]
    features = FeatureCache()
    want = by_trees(tiny, reader, features, plans, ITEMS, collate_fn)
    got = scoring.score(tiny, reader, features, plans, ITEMS)
    for mine, theirs in zip(got, want, strict=True):
        assert [s.tokens for s in mine] == [n for _, n in theirs]
        for s, (total, n) in zip(mine, theirs, strict=True):
            assert s.total == pytest.approx(total, abs=2e-4)
            assert s.mean == pytest.approx(total / n, abs=1e-4)


def test_equal_to_full_logits_in_double_precision(tiny_path, reader, make_plan):
    """The oracle: no cache, no sharing, float64, one row per answer."""
    from tempo_fast.models.load import load_bundle

    bundle = load_bundle(tiny_path, "float32", "cpu")
    bundle.model.double()
    plans = [make_plan("v", 6)]
    features = FeatureCache()
    double = type("R", (), {"pixels": lambda self, plan: reader.pixels(plan).double()})()
    got = scoring.score(bundle, double, features, plans, ITEMS)
    visual = features.features(bundle.family, bundle.model, double, plans)
    for (text, answers), scores in zip(ITEMS, got, strict=True):
        prompt = bundle.family.build_prompt(bundle.tokenizer, bundle.config, text, [Grid(*plans[0].grid)])
        for answer, s in zip(answers, scores, strict=True):
            tail = torch.tensor(bundle.family.answer_ids(bundle.tokenizer, answer))
            ids = torch.cat([prompt.input_ids, tail])[None]
            where = torch.arange(prompt.next_position, prompt.next_position + len(tail)).expand(3, -1)
            positions = torch.cat([prompt.position_ids, where], 1)[:, None]
            slots = torch.cat([prompt.visual, torch.zeros(len(tail), dtype=torch.bool)])[None]
            with torch.no_grad():
                hidden = bundle.family.hidden_states(bundle.model, ids, positions, None, slots, visual)[0]
                logp = bundle.family.head(bundle.model)(hidden).log_softmax(-1)
            total = sum(float(logp[len(prompt.input_ids) + k - 1, t]) for k, t in enumerate(tail.tolist()))
            assert s.total == pytest.approx(total, abs=1e-5)


def test_small_batches_and_adapters(tiny_lora, tiny, reader, make_plan, monkeypatch):
    plans = [make_plan("v", 5)]
    one = scoring.score(tiny_lora, reader, FeatureCache(), plans, ITEMS)
    monkeypatch.setattr(scoring, "MAX_TOKENS", 1)
    two = scoring.score(tiny_lora, reader, FeatureCache(), plans, ITEMS)
    base = scoring.score(tiny, reader, FeatureCache(), plans, ITEMS)
    for a, b, c in zip(one, two, base, strict=True):
        assert [s.total for s in a] == pytest.approx([s.total for s in b], abs=2e-4)
        assert all(abs(x.total - y.total) > 1e-2 for x, y in zip(a, c, strict=True))


def test_one_item_and_none(tiny, reader, make_plan):
    plans = [make_plan("v", 2)]
    whole = scoring.score(tiny, reader, FeatureCache(), plans, ITEMS)
    alone = [scoring.score(tiny, reader, FeatureCache(), plans, [item])[0] for item in ITEMS]
    for a, b in zip(whole, alone, strict=True):
        assert [s.total for s in a] == pytest.approx([s.total for s in b], abs=2e-4)
    assert scoring.score(tiny, reader, FeatureCache(), plans, []) == []
