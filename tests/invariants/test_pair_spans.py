"""RRPO on trees equals RRPO on single pairs: what a pair sums over the chosen answer are the spans that differ from its
own rejected answer, whoever else shares the tree. From records to losses and adapter gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.pairs.spans import differing_spans
from tempo_fast.reference.fill import reference_mode
from tempo_fast.schema import PreferenceRecord, Rejected
from tempo_fast.training.data import branch_batch, preference_items
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.head import head_statistics
from tempo_kernels.objectives import make_objective

# against "A red circle. It grows. <i>. Stop.", each marks other sentences
TEXTS = ["It grows. A red circle.", "A red circle. It grows. Stop.", "A blue square. It grows.", "Stop."]


def make_records() -> list[PreferenceRecord]:
    """1 + 3 and 1 + 2 answers; the chosen spans of a record all differ."""
    records = []
    for i, n in enumerate((3, 2)):
        chosen = f"A red circle. It grows. {i}. Stop."
        marked = [(t, *differing_spans(chosen, t)) for t in TEXTS[i : i + n]]
        rejected = [Rejected(t, "shuffle", 4, spans=b, chosen_spans=a) for t, a, b in marked]
        assert len({str(x.chosen_spans) for x in rejected}) == n
        records.append(PreferenceRecord(f"r{i}", f"v{i}", "What happened?", chosen, rejected, 4))
    return records


def alone(records: list[PreferenceRecord]) -> list[PreferenceRecord]:
    """The same pairs, a record each."""
    return [dataclasses.replace(r, id=f"{r.id}/{i}", rejected=[x]) for r in records for i, x in enumerate(r.rejected)]


@pytest.fixture
def outcome(tiny_lora: Any, reader: Any, make_plan: Any, monkeypatch: Any) -> Callable[..., Any]:
    """outcome(records, collate): the loss of the batch, its metric sums, and the adapters' gradients."""
    monkeypatch.setattr(reader, "plan", lambda video: make_plan(video, 3), raising=False)
    model, family, cache = tiny_lora.model, tiny_lora.family, FeatureCache()
    module = TrainModule(model, family, make_objective("rrpo", beta=0.7, alpha=0.5))

    def run(records: list[PreferenceRecord], layout: Any) -> Any:
        items = preference_items(tiny_lora, reader, records).items
        packed = layout([item.tree for item in items])
        batch, kinds = branch_batch(items, packed)
        features = cache.features(family, model, reader, packed.plans)
        with reference_mode(model):
            hidden = tree_hidden(family, model, packed, features)
            reference = head_statistics(hidden, family.head(model).weight, packed.labels)
        model.zero_grad()
        loss, sums = module(packed, batch, kinds, features=features, reference=reference)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return float(loss.detach()), sums.means(), gradients

    return run


@pytest.mark.parametrize("layout", [collate, collate_rows])
def test_pairs_of_a_tree_keep_their_own_spans(outcome: Callable[..., Any], layout: Any) -> None:
    records = make_records()
    loss, metrics, gradients = outcome(records, layout)
    expected_loss, expected_metrics, expected = outcome(alone(records), collate_rows)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-5)
    assert abs(metrics["rewards/chosen"]) > 1e-3  # the spans count for something
    assert gradients.keys() == expected.keys() and len(gradients) >= 28
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0 and (gradients[name] - gradient).abs().max() <= 1e-4 * scale, name


def test_spans_of_the_record_serve_records_made_elsewhere(outcome: Callable[..., Any]) -> None:
    pairs = alone(make_records())
    foreign = [
        dataclasses.replace(r, spans=x.chosen_spans, rejected=[dataclasses.replace(x, chosen_spans=[])])
        for r in pairs
        for x in r.rejected
    ]
    loss, metrics, gradients = outcome(foreign, collate)
    expected_loss, expected_metrics, expected = outcome(pairs, collate)
    assert (loss, metrics) == (expected_loss, expected_metrics)
    assert all(torch.equal(gradients[name], value) for name, value in expected.items())
    assert metrics["spans/missing"] == 0


def test_a_pair_without_key_phrases_is_left_out_by_name(tiny_lora, reader, make_plan, monkeypatch, caplog) -> None:
    """A loss over key phrases would count it as a pair and learn nothing from it."""
    monkeypatch.setattr(reader, "plan", lambda video: make_plan(video, 3), raising=False)
    records = make_records()
    for record, bare in zip(records, (1, 2), strict=True):
        for x in record.rejected[:bare]:
            x.spans, x.chosen_spans = [], []
    found = preference_items(tiny_lora, reader, records, spans_needed=True).items
    assert [(i.tree.id, len(i.kinds), len(i.tree.branches)) for i in found] == [("r0", 2, 3)]
    assert "3 without a key phrase" in caplog.text and "record r0" in caplog.text
    assert len(preference_items(tiny_lora, reader, records).items) == 2
    with pytest.raises(InputError, match=r"no key phrase is marked in any record \(first: r1\)"):
        preference_items(tiny_lora, reader, records[1:], spans_needed=True)
