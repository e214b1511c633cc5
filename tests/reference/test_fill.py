"""Filling: each answer once, the model and torch's generators left as they were."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.config import LoaderConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.reference.fill import FillReport, fill, reference_mode
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.trees.layout import Branch, ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_fast.video.loader import WORKER


def tree_of(bundle: Any, make_plan: Any, name: str, answers: list[str], video: str = "v") -> ResponseTree:
    return build_tree(
        bundle.family, bundle.tokenizer, bundle.config,
        id=name, prompt_text="What happened?", answers=answers, plans=[make_plan(video, 3)],
    )  # fmt: skip


def test_each_answer_is_computed_once(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    store, cache = ReferenceStore(tmp_path, {"reference": "tiny"}), FeatureCache()
    first = tree_of(tiny, make_plan, "r16", ["A red circle", "It appears"])
    twin = tree_of(tiny, make_plan, "other id, same chosen", ["A red circle", "Then a blue square"])
    report = fill(tiny, store, [first, twin], reader, cache, kl=False, max_tokens=512)
    assert report == FillReport(computed=3, present=0, tokens=report.tokens)
    assert report.tokens == first.n_responses + len(twin.branches[1].input_ids)
    # the next stage: the chosen answer is there already
    later = tree_of(tiny, make_plan, "r8", ["A red circle", "A green triangle"])
    report = fill(tiny, store, [later], reader, cache, kl=False, max_tokens=512)
    assert (report.computed, report.present) == (1, 1)
    assert report.tokens == len(later.branches[1].input_ids)
    # another epoch, another process
    again = fill(tiny, ReferenceStore(tmp_path, {"reference": "tiny"}), [first, twin, later], reader, cache,
                 kl=False, max_tokens=512)  # fmt: skip
    assert again == FillReport(computed=0, present=4, tokens=0)


def test_videos_are_decoded_ahead_by_the_loader(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    pixels = type(reader).pixels
    monkeypatch.setattr(
        type(reader), "pixels", lambda *a: threads.append(threading.current_thread().name) or pixels(*a)
    )
    trees = [tree_of(tiny, make_plan, f"{i}", [f"A circle {i}"], video=f"v{i % 4}") for i in range(6)]
    found = []
    for loader in (None, LoaderConfig(workers=2, ahead=3)):
        threads.clear()
        store = ReferenceStore(tmp_path / str(loader is None), {"reference": "tiny"})
        cache = FeatureCache()
        fill(tiny, store, trees, reader, cache, kl=False, max_tokens=64, loader=loader)
        found.append(store.get([store.key(tree, 0) for tree in trees], kl=False).logp)
        assert len(threads) == 4 and {name == WORKER for name in threads} == {loader is not None}
        threads.clear()
        again = ReferenceStore(tmp_path / f"again {loader is None}", {"reference": "tiny"})
        fill(tiny, again, trees, reader, cache, kl=False, max_tokens=64, loader=loader)
        assert threads == []  # features are at hand
    assert torch.equal(*found)


def test_scalars_are_upgraded_when_the_kl_is_asked_for(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    store, cache = ReferenceStore(tmp_path, {"reference": "tiny"}), FeatureCache()
    tree = tree_of(tiny, make_plan, "a", ["A red circle", "It appears"])
    keys = [store.key(tree, b) for b in range(2)]
    fill(tiny, store, [tree], reader, cache, kl=False, max_tokens=512)
    scalars = store.get(keys, kl=False)
    assert scalars.mean_embedding is None and store.missing(keys, kl=True) == keys
    assert fill(tiny, store, [tree], reader, cache, kl=True, max_tokens=512).computed == 2
    full = store.get(keys, kl=True)
    assert full.mean_embedding is not None and full.mean_embedding.shape == (tree.n_responses, 64)
    torch.testing.assert_close(full.logp, scalars.logp, rtol=0, atol=1e-5)
    # scalars are enough for a fill without KL
    assert fill(tiny, store, [tree], reader, cache, kl=False, max_tokens=512).computed == 0


def test_statistics_are_the_log_probs_of_the_model(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    """Against a plain causal forward of transformers, one answer in float64 logits."""
    store, cache = ReferenceStore(tmp_path, {"reference": "tiny"}), FeatureCache()
    tree = tree_of(tiny, make_plan, "a", ["A red circle", "It appears at last."])
    fill(tiny, store, [tree], reader, cache, kl=False, max_tokens=512)
    prompt, answer = tree.prompt, torch.tensor(tree.branches[1].input_ids)
    ids = torch.cat([prompt.input_ids, answer])[None]
    tail = (prompt.next_position + torch.arange(len(answer))).expand(3, -1)
    positions = torch.cat([prompt.position_ids, tail], dim=1)[:, None]
    with torch.no_grad():
        visual = cache.features(tiny.family, tiny.model, reader, tree.plans)
        slots = torch.cat([prompt.visual, torch.zeros(len(answer), dtype=torch.bool)])[None]
        hidden = tiny.family.hidden_states(tiny.model, ids, positions, None, slots, visual)
        logits = tiny.model.lm_head(hidden[0, len(prompt.input_ids) - 1 : -1]).double()
    expected = logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]
    got = store.get([store.key(tree, 1)], kl=False).logp.double()
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_the_reference_is_the_model_without_adapters(
    tiny: Any, tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path
) -> None:
    tree = tree_of(tiny, make_plan, "a", ["A red circle", "It appears"])
    out = []
    for bundle, where in ((tiny, "plain"), (tiny_lora, "lora")):
        store = ReferenceStore(tmp_path / where, {"reference": "tiny"})
        fill(bundle, store, [tree], reader, FeatureCache(), kl=True, max_tokens=512)
        out.append(store.get([store.key(tree, 0), store.key(tree, 1)], kl=True))
    for ours, theirs in zip(*out, strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_left_changed(tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    model = tiny_lora.model
    model.train()
    tiny_lora.family.vision_tower(model).eval()
    next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)  # a partly frozen adapter
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    generator = torch.get_rng_state()
    tree = tree_of(tiny_lora, make_plan, "a", ["A red circle"])
    fill(tiny_lora, ReferenceStore(tmp_path, {"r": 1}), [tree], reader, FeatureCache(), kl=True, max_tokens=512)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(RuntimeError, match="inside"), reference_mode(model):
        torch.rand(3)
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), generator)
    tuners = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert tuners and not any(m.disable_adapters for m in tuners)


def test_a_tree_over_the_budget_is_named_before_decoding(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path
) -> None:
    trees = [tree_of(tiny, make_plan, f"rec{i}", ["A red circle"], video=f"v{i}") for i in range(2)]
    trees[1] = dataclasses.replace(trees[1], branches=[Branch.of([9] * 400)])
    store = ReferenceStore(tmp_path, {"reference": "tiny"})
    with pytest.raises(InputError, match="record rec1: .* exceed train.max_tokens 128"):
        fill(tiny, store, trees, reader, FeatureCache(), kl=False, max_tokens=128)
    assert reader.calls == [] and len(store) == 0


def test_a_stopped_fill_keeps_its_packs_and_says_which(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    trees = [tree_of(tiny, make_plan, f"t{i}", [f"A red circle {i}", f"It {i}"], video=f"v{i}") for i in range(5)]
    store, checks, told = ReferenceStore(tmp_path, {"reference": "tiny"}), [0], []

    def check() -> None:
        checks[0] += 1
        if checks[0] == 4:
            raise Interrupted("stop", 130)

    def run(check: Any) -> FillReport:
        return fill(
            tiny, store, trees, reader, FeatureCache(),
            kl=False, max_tokens=max(t.n_tokens for t in trees), check=check, on_stored=told.append,
        )  # fmt: skip

    every = {store.key(t, b) for t in trees for b in range(2)}
    with pytest.raises(Interrupted):
        run(check)
    assert checks == [4] and [len(keys) for keys in told] == [2, 2, 2]
    stored = {key for keys in told for key in keys}
    assert stored == every - set(store.missing(sorted(every))) and len(stored) == 6
    told.clear()
    report = run(lambda: None)
    assert (report.computed, report.present) == (4, 6)
    assert {key for keys in told for key in keys} == every - stored
