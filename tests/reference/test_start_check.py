"""The start check lets rounding through and refuses everything else, in float32 and in bfloat16."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.models.load import load_bundle
from tempo_fast.reference.fill import fill, start_check
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.trees import forward
from tempo_fast.trees.attention_causal import causal_attention
from tempo_fast.trees.batch import PackedBatch
from tempo_fast.trees.layout import ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.head import HeadStatistics

ANSWERS = ["A red circle moves left. Then a blue square grows.", "It appears at last.", "A green triangle moves right."]
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def trees_of(bundle: Any, make_plan: Any) -> list[ResponseTree]:
    return [
        build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id=f"t{i}", prompt_text="What happened?",
            answers=ANSWERS[: 3 - i], plans=[make_plan(f"v{i}", 7 + 2 * i, 56, 28)],
        )
        for i in range(2)
    ]  # fmt: skip


def filled(bundle: Any, trees: list[ResponseTree], reader: Any, root: Path) -> ReferenceStore:
    store = ReferenceStore(root, {"reference": "tiny"})
    fill(bundle, store, trees, reader, FeatureCache(), kl=False, max_tokens=4096)
    return store


def keys_of(store: ReferenceStore, trees: list[ResponseTree]) -> list[list[str]]:
    return [[store.key(t, b) for b in range(len(t.branches))] for t in trees]


def changed(store: ReferenceStore, trees: list[ResponseTree], root: Path, change: Any) -> ReferenceStore:
    """A store whose log-probs of each answer are ``change(logp)``."""
    out = ReferenceStore(root, {"reference": "tiny"})
    for key in (key for row in keys_of(store, trees) for key in row):
        found = store.get([key], kl=False)
        out.put({key: HeadStatistics(change(found.logp), found.lse, None, None)})
    return out


@DTYPES
@pytest.mark.parametrize("shapes", ["as filled", "one shard a tree", "float32"])
def test_the_same_reference_passes(
    tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str, shapes: str
) -> None:
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    filler = load_bundle(tiny_path, "float32", "cpu") if shapes == "float32" else bundle
    store = filled(filler, trees[:1] if shapes == "one shard a tree" else trees, reader, tmp_path)
    if shapes == "one shard a tree":
        fill(bundle, store, trees[1:], reader, FeatureCache(), kl=False, max_tokens=4096)
    hits = store.hits
    difference = start_check(bundle, store, trees, reader, FeatureCache(), max_tokens=4096)
    assert store.hits == hits
    assert difference < (1e-4 if dtype == "float32" else 0.2)


@DTYPES
def test_another_reference_is_refused(tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str) -> None:
    """Every weight off by one percent."""
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    store = filled(bundle, trees, reader, tmp_path)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in bundle.model.parameters():
            p.mul_((1 + 0.01 * torch.randn(p.shape, generator=g)).to(p.dtype))
    with pytest.raises(InputError, match="differs from the stored reference"):
        start_check(bundle, store, trees, reader, FeatureCache())


@DTYPES
def test_other_pixels_are_refused(tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str) -> None:
    """Noise of a tenth of the pixels' own spread."""
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    store = filled(bundle, trees, reader, tmp_path)

    class Other:
        def pixels(self, plan: Any) -> torch.Tensor:
            pixels = reader.pixels(plan)
            return pixels + 0.1 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(5))

    with pytest.raises(InputError, match="differs from the stored reference"):
        start_check(bundle, store, trees, Other(), FeatureCache())


@DTYPES
def test_shifted_labels_are_refused(tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str) -> None:
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    store = changed(filled(bundle, trees, reader, tmp_path / "a"), trees, tmp_path / "b", lambda x: x.roll(1))
    with pytest.raises(InputError, match="differs from the stored reference"):
        start_check(bundle, store, trees, reader, FeatureCache())


@DTYPES
@pytest.mark.parametrize("sign", [1, -1])
def test_a_systematic_shift_is_refused_below_the_spread_of_rounding(
    tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str, sign: int
) -> None:
    """By less than the mean absolute difference that is let through, and a tenth of the largest."""
    by = sign * (1e-4 if dtype == "float32" else 0.024)
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    sound = filled(bundle, trees, reader, tmp_path / "a")
    with pytest.raises(InputError, match="on average"):
        start_check(bundle, changed(sound, trees, tmp_path / "b", lambda x: x + by), trees, reader, FeatureCache())

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x + by * torch.tensor([1.0, -1.0]).repeat(len(x))[: len(x)]

    start_check(bundle, changed(sound, trees, tmp_path / "c", spread), trees, reader, FeatureCache())


@DTYPES
def test_one_wrong_token_is_refused(tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, dtype: str) -> None:
    by = 2e-3 if dtype == "float32" else 0.5
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)
    sound = filled(bundle, trees, reader, tmp_path / "a")
    first = keys_of(sound, trees)[0][0]
    store = changed(sound, trees, tmp_path / "b", lambda x: x)
    found = sound.get([first], kl=False)
    logp = found.logp.clone()
    logp[2] -= by
    wrong = ReferenceStore(tmp_path / "c", {"reference": "tiny"})
    wrong.put({first: HeadStatistics(logp, found.lse, None, None)})
    wrong.put({k: store.get([k], kl=False) for row in keys_of(store, trees) for k in row if k != first})
    start_check(bundle, store, trees, reader, FeatureCache())
    with pytest.raises(InputError, match="differs from the stored reference"):
        start_check(bundle, wrong, trees, reader, FeatureCache())


@DTYPES
def test_an_attention_that_mixes_trees_is_refused(
    tiny_path: str, reader: Any, make_plan: Any, tmp_path: Path, monkeypatch: Any, dtype: str
) -> None:
    """Measured noise cannot excuse itself: packed and alone differ here, and the fill made the same mistake."""
    bundle = load_bundle(tiny_path, dtype, "cpu")
    trees = trees_of(bundle, make_plan)

    monkeypatch.setattr("tempo_fast.trees.attention._attention", lambda path, packed: causal_attention)
    store = filled(bundle, sorted(trees, key=lambda t: -t.n_tokens), reader, tmp_path)
    with pytest.raises(InputError, match="does not keep the trees apart"):
        start_check(bundle, store, sorted(trees, key=lambda t: -t.n_tokens), reader, FeatureCache())


@pytest.mark.parametrize(("budget", "packed"), [(None, True), (10_000, True), (-1, False)])
def test_trees_over_the_budget_are_not_packed(
    tiny: Any, reader: Any, make_plan: Any, tmp_path: Path, monkeypatch: Any, budget: int | None, packed: bool
) -> None:
    trees = trees_of(tiny, make_plan)
    store = filled(tiny, trees, reader, tmp_path)
    seen: list[int] = []
    plain = forward.tree_hidden

    def recording(family: Any, model: Any, batch: PackedBatch, *rest: Any) -> torch.Tensor:
        seen.append(batch.n_tokens)
        return plain(family, model, batch, *rest)

    monkeypatch.setattr("tempo_fast.reference.fill.tree_hidden", recording)
    total = sum(t.n_tokens for t in trees)
    start_check(tiny, store, trees, reader, FeatureCache(), max_tokens=total - 1 if budget == -1 else budget)
    assert (total in seen) == packed
    assert all(n <= max(t.n_tokens for t in trees) for n in seen if n != total)


def test_one_answer_is_enough(tiny: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    tree = trees_of(tiny, make_plan)[0]
    tree = dataclasses.replace(tree, branches=tree.branches[:1])
    store = filled(tiny, [tree], reader, tmp_path)
    assert start_check(tiny, store, [tree], reader, FeatureCache()) == 0.0
