"""Filling with a model that ZeRO-3 has partitioned over two ranks: the statistics of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import together

from tempo_fast.config import TrainConfig
from tempo_fast.reference.fill import FillReport, fill
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.module import TrainModule
from tempo_fast.trees.layout import build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.objectives import make_objective

pytest.importorskip("deepspeed")


def test_two_ranks_under_zero_3(
    tiny_lora: Any, reader: Any, make_plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More packs than ranks, and an odd number: the rank that has none left runs along."""
    for name, value in (("DS_ACCELERATOR", "cpu"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    trees = [
        build_tree(
            tiny_lora.family, tiny_lora.tokenizer, tiny_lora.config, id=f"{i}", prompt_text="What happened?",
            answers=[f"A red circle {i}", *(["It appears at last."] * (i % 2))], plans=[make_plan(f"v{i}", 1 + i)],
        )
        for i in range(5)
    ]  # fmt: skip
    budget = max(tree.n_tokens for tree in trees)

    def run(root: Path, ranks: Ranks) -> tuple[FillReport, ReferenceStore]:
        store = ReferenceStore(root, {"reference": "tiny"})
        report = fill(tiny_lora, store, trees, reader, FeatureCache(), kl=True, max_tokens=budget, ranks=ranks)
        return report, store

    _, whole = run(tmp_path / "whole", Ranks())
    keys = [key for tree in trees for key in whole.keys(tree)]
    assert len(list((tmp_path / "whole" / "shards").iterdir())) % 2 == 1

    def rank(number: int) -> Callable[[], None]:
        def work() -> None:
            from tempo_fast.runtime.zero import DeepSpeedEngine

            ranks = Ranks(number, 2)
            dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=number, world_size=2)
            module = TrainModule(tiny_lora.model, tiny_lora.family, make_objective("dpo", beta=0.1))
            trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
            config = dataclasses.replace(TrainConfig(), engine="deepspeed", zero_stage=3)
            DeepSpeedEngine(module, trained, config, ranks, persist_below=0)
            assert any(hasattr(p, "ds_id") for p in tiny_lora.model.parameters())
            report, store = run(tmp_path / "ranks", ranks)
            assert report.computed == len(set(keys)) and run(tmp_path / "ranks", ranks)[0].computed == 0
            for found, expected in zip(store.get(keys, True), whole.get(keys, True), strict=True):
                assert found is not None and expected is not None and torch.equal(found, expected)
            dist.barrier()
            dist.destroy_process_group()

        return work

    assert together(rank(0), rank(1)) == [0, 0]
