"""Hidden states in the store are the live reference: equal losses and gradients, half the bytes in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.errors import InputError
from tempo_fast.models.load import load_bundle
from tempo_fast.reference.fill import fill, reference_mode
from tempo_fast.reference.shard import form_of
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.batch import PackedBatch, collate
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.layout import ResponseTree, build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.objectives import BranchBatch, make_objective


def trees_of(bundle: Any, make_plan: Any) -> list[ResponseTree]:
    return [
        build_tree(
            bundle.family, bundle.tokenizer, bundle.config, id=f"{i}", prompt_text="What happened?",
            answers=["A red circle moves left.", "Then a blue square grows.", "It appears"], spans=[[[0, 5]]] * 3,
            plans=[make_plan(f"v{i}", 3)],
        )
        for i in range(2)
    ]  # fmt: skip


def pairs_of(packed: PackedBatch) -> BranchBatch:
    chosen = torch.tensor([b[0] for b in packed.tree_branches for _ in b[1:]])
    rejected = torch.tensor([x for b in packed.tree_branches for x in b[1:]])
    return BranchBatch(packed.branch, packed.n_branches, chosen, rejected, spans=packed.spans)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_to_the_live_reference(
    tiny_path: str, lora: Any, reader: Any, make_plan: Any, tmp_path: Path, dtype: str
) -> None:
    bundle, cache = lora(load_bundle(tiny_path, dtype, "cpu")), FeatureCache()
    trees = trees_of(bundle, make_plan)
    stores = {
        k: ReferenceStore(tmp_path / k, {"r": 1}, form=form_of(k, bundle.dtype)) for k in ("mean_embedding", "hidden")
    }
    keys = [key for tree in trees for key in stores["hidden"].keys(tree)]
    for store in stores.values():
        fill(bundle, store, trees, reader, cache, kl=True, max_tokens=4096)
    packed = collate(trees)
    visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
    with reference_mode(bundle.model):
        live = tree_hidden(bundle.family, bundle.model, packed, visual)
    module = TrainModule(bundle.model, bundle.family, make_objective("rrpo", beta=0.3, alpha=0.5))

    def run(reference: Any) -> tuple[torch.Tensor, torch.Tensor]:
        bundle.model.zero_grad()
        loss, _ = module(packed, pairs_of(packed), [], features=visual, reference=reference)
        loss.backward()
        grads = [p.grad.flatten().float() for p in bundle.model.parameters() if p.requires_grad]
        return loss.detach(), torch.cat(grads)

    hidden = stores["hidden"].read(keys, True)
    assert isinstance(hidden, torch.Tensor) and hidden.dtype == bundle.dtype
    # the same trees in the same order were one pack; the fill's order is by length
    order = sorted(range(len(trees)), key=lambda i: -trees[i].n_tokens)
    assert order == list(range(len(trees))) and torch.equal(hidden, live)
    loss, gradient = run(hidden)
    live_loss, live_gradient = run(live)
    assert torch.equal(loss, live_loss) and torch.equal(gradient, live_gradient)
    mean_loss, mean_gradient = run(stores["mean_embedding"].read(keys, True))
    assert float(loss) == pytest.approx(float(mean_loss), rel=1e-5 if dtype == "float32" else 1e-2)
    assert (gradient - mean_gradient).norm() <= (1e-4 if dtype == "float32" else 2e-2) * gradient.norm()
    sizes = {k: sum(p.stat().st_size for p in (tmp_path / k / "shards").iterdir()) for k in stores}
    assert sizes["hidden"] < (0.7 if dtype == "bfloat16" else 1.0) * sizes["mean_embedding"]


def test_a_head_that_trains_is_refused(tiny_path: str, lora: Any, reader: Any, make_plan: Any, tmp_path: Path) -> None:
    bundle, cache = lora(load_bundle(tiny_path, "float32", "cpu")), FeatureCache()
    trees = trees_of(bundle, make_plan)[:1]
    store = ReferenceStore(tmp_path, {"r": 1}, form="hidden.float32")
    fill(bundle, store, trees, reader, cache, kl=True, max_tokens=4096)
    bundle.family.head(bundle.model).weight.requires_grad_()
    packed = collate(trees)
    visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
    module = TrainModule(bundle.model, bundle.family, make_objective("dpo", beta=0.1))
    with pytest.raises(InputError, match="reference.keep: .*set it to mean_embedding"):
        module(packed, pairs_of(packed), [], features=visual, reference=store.read(store.keys(trees[0]), True))
