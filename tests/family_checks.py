"""What every family must fulfil beyond packed trees (tree_checks.py).

``bundle`` is a loaded model, ``reader`` gives the pixels of what ``make_plan(name, frames, height, width)`` plans.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tempo_fast.config import GenerationConfig
from tempo_fast.evaluation.scoring import score
from tempo_fast.generation import Request, make_engine
from tempo_fast.models import Grid
from tempo_fast.trees.batch import collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import build_tree, prompt_of
from tempo_fast.trees.vision import FeatureCache, encode_pixels, prepare_pixels
from tempo_kernels.head import linear_logp


def greedy_by_full_forwards(bundle: Any, reader: Any, features: FeatureCache, request: Request, limit: int) -> str:
    """No cache, no padding: a forward over everything for each token."""
    family, model = bundle.family, bundle.model
    prompt = prompt_of(family, bundle.tokenizer, bundle.config, request.prompt, request.plans, request.turns)
    visual = features.features(family, model, reader, request.plans)
    ids, positions, slots = prompt.input_ids[None], prompt.position_ids[:, None], prompt.visual[None]
    out: list[int] = []
    stop = family.answer_ids(bundle.tokenizer, "")[-1]
    for step in range(limit):
        with torch.no_grad():
            hidden = family.hidden_states(model, ids, positions, None, slots, visual)
            token = int(family.head(model)(hidden[0, -1]).argmax())
        if token == stop:
            break
        out.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
        positions = torch.cat([positions, torch.full((3, 1, 1), prompt.next_position + step)], 2)
        slots = torch.cat([slots, torch.zeros(1, 1, dtype=torch.bool)], 1)
    return bundle.tokenizer.decode(out, skip_special_tokens=True).strip()


def check_generation(bundle: Any, reader: Any, make_plan: Any) -> None:
    """Greedy answers of the engine, alone and in a padded batch: no video, one, two; odd frame counts."""
    a, b = make_plan("a", 3, 28, 56), make_plan("b", 8, 28, 28)
    requests = [
        Request((a,), "Describe what happens in this video in order."),
        Request((), "What happened before the blue square?"),
        Request((a, b), "Say it."),
    ]
    want = [greedy_by_full_forwards(bundle, reader, FeatureCache(), r, 6) for r in requests]
    assert len(set(want)) > 1  # the model looks at its input
    for size in (1, 3):
        engine = make_engine(GenerationConfig(batch_size=size, max_new_tokens=6), bundle, reader, FeatureCache(), 0)
        assert engine.generate(requests) == want


def check_scores(bundle: Any, reader: Any, make_plan: Any) -> None:
    """Shared-prefix scores are the log-probs of separate rows."""
    plans = [make_plan("a", 5, 28, 56)]
    items = [
        ("What happened?", ["A red circle moves left.", "It appears at last."]),
        ("Describe what happens in this video in order.", ["Then a blue square grows."]),
    ]
    got = score(bundle, reader, FeatureCache(), plans, items)
    for (text, answers), scores in zip(items, got, strict=True):
        tree = build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id="x", prompt_text=text, answers=answers, plans=plans
        )
        packed = collate_rows([tree])
        with torch.no_grad():
            visual = FeatureCache().features(bundle.family, bundle.model, reader, packed.plans)
            hidden = tree_hidden(bundle, bundle.model, packed, visual)
            logp = linear_logp(hidden, bundle.family.head(bundle.model).weight, packed.labels, impl="eager").logp
        sums = torch.zeros(len(answers), dtype=torch.float64).index_add_(0, packed.branch, logp.double())
        assert [s.total for s in scores] == pytest.approx(sums.tolist(), abs=2e-4)


def check_vision(bundle: Any, reader: Any, make_plan: Any) -> None:
    """Cached features are those of one call for all videos, in order, with repeats."""
    a, b = make_plan("a", 3, 28, 56), make_plan("b", 2, 84, 28)
    family, model, cache = bundle.family, bundle.model, FeatureCache()
    plans = [a, b, a]
    for _ in range(2):
        cached = cache.features(family, model, reader, plans)
    assert cached is not None and (cache.hits, cache.misses) == (2, 2)
    prepared = prepare_pixels(reader, plans, "cpu", torch.float32)
    assert prepared is not None
    with torch.no_grad():
        together = encode_pixels(family, model, prepared)
    assert len(cached) == sum(bundle.geometry.tokens(Grid(*p.grid)) for p in plans)
    assert cached.std() > 0.01
    torch.testing.assert_close(cached, together, rtol=1e-5, atol=1e-5)
