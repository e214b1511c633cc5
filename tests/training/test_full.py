"""The language model itself trains: what moves and what does not, the references, resuming, and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from curricula import After, curriculum, first_row
from safetensors.torch import load_file
from tiny_qwen import make_bundle

from tempo_fast.config import ObjectiveConfig, RunConfig
from tempo_fast.configio import check_objective
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.models.load import load_bundle, weights_digest
from tempo_fast.training.adapters import unfreeze

FULL = {"train__tune": "full", "train__learning_rate": 1e-3}


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(str(Path(folder) / "model.safetensors"))


def moved(first: str | Path, second: str | Path) -> dict[str, bool]:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return {name: not torch.equal(a[name], b[name]) for name in a}


@pytest.mark.parametrize(("tie", "head"), [(True, False), (False, False), (True, True)])
def test_what_is_let_to_train(tmp_path: Path, tie: bool, head: bool) -> None:
    bundle = make_bundle(tmp_path, tie=tie)
    unfreeze(bundle, head=head)
    trained = {n for n, p in bundle.model.named_parameters() if p.requires_grad}
    assert not any("visual" in n for n in trained)
    assert any(n.endswith("layers.1.mlp.down_proj.weight") for n in trained)
    assert any(n.endswith("language_model.norm.weight") for n in trained)
    assert any("embed_tokens" in n for n in trained) == (head or not tie)
    assert any("lm_head" in n for n in trained) == (head and not tie)
    unfreeze(bundle, vision=True)
    assert all(p.requires_grad for n, p in bundle.model.named_parameters() if "visual" in n)


@pytest.mark.parametrize("mode", ["base", "previous_stage"])
def test_every_stage_starts_from_the_one_before(
    tmp_path: Path, tiny_path: str, reader: Any, plan_type: Any, mode: str
) -> None:
    outcome = curriculum(tmp_path, tiny_path, reader, plan_type, reference__mode=mode, **FULL).run()
    one, two = outcome.stages
    assert one["adapter"] == two["adapter"] == "" and one["base"] == tiny_path and two["base"] == one["model"]
    assert outcome.sft is not None and outcome.sft["base"] == two["model"]
    assert outcome.control is not None and outcome.control["base"] == tiny_path
    for start, end in ((tiny_path, one["model"]), (one["model"], two["model"]), (two["model"], outcome.sft["model"])):
        for name, did in moved(start, end).items():
            # the head is the embedding here
            frozen = "visual" in name or "embed_tokens" in name
            assert did != frozen or "k_proj.bias" in name, name
    # a model like any other, and the run's result in its place
    assert outcome.merged == str(tmp_path / "train" / "merged")
    assert weights_digest(outcome.merged) == weights_digest(outcome.sft["model"])
    loaded = load_bundle(outcome.merged, "float32", "cpu")
    assert loaded.tokenizer.get_vocab() == load_bundle(tiny_path, "float32", "cpu").tokenizer.get_vocab()
    # the reference: the model before the first stage, or that of the stage before
    assert abs(first_row(tmp_path, "stage1_r4")["rewards/chosen"]) < 1e-5
    later = first_row(tmp_path, "stage2_r2")
    if mode == "base":
        assert abs(later["rewards/chosen"]) > 1e-4 and two["reference"]["chosen_misses"] == 0
    else:
        assert abs(later["rewards/chosen"]) < 1e-5 and abs(later["kl/chosen"]) < 1e-5
        assert two["reference"]["chosen_misses"] == 3


@pytest.mark.parametrize("looks", [2, 6])
def test_interrupted_gives_the_same(tmp_path: Path, tiny_path: str, reader: Any, plan_type: Any, looks: int) -> None:
    how: dict[str, Any] = {"sft": False, "train__save_steps": 1, "train__async_save": True, **FULL}
    whole = curriculum(tmp_path / "a", tiny_path, reader, plan_type, **how).run()
    with pytest.raises(Interrupted):
        curriculum(tmp_path / "b", tiny_path, reader, plan_type, stopper=After(looks), **how).run()
    again = curriculum(tmp_path / "b", tiny_path, reader, plan_type, **how).run()
    assert weights_digest(whole.merged) == weights_digest(again.merged)
    assert curriculum(tmp_path / "b", tiny_path, reader, plan_type, **how).run() == again


def test_bfloat16_with_head_and_vision(tmp_path: Path, tiny_path: str, reader: Any, plan_type: Any) -> None:
    dpo = ObjectiveConfig("dpo", {"beta": 0.1})
    outcome = curriculum(
        tmp_path, tiny_path, reader, plan_type, sft=False, model__dtype="bfloat16", train__objective=dpo,
        train__tune_head=True, train__tune_vision=True, reference__mode="previous_stage", reference__kl="objective",
        **FULL,
    ).run()  # fmt: skip
    assert {w.dtype for w in weights(outcome.merged).values()} == {torch.bfloat16}
    start, end = weights(tiny_path), weights(outcome.merged)
    changed = {name: not torch.equal(start[name].bfloat16(), end[name]) for name in start}
    assert any(did for name, did in changed.items() if "visual" in name)
    assert any(did for name, did in changed.items() if "embed_tokens" in name)
    assert all(abs(first_row(tmp_path, s["name"])["rewards/chosen"]) < 0.05 for s in outcome.stages)


def test_what_a_trained_head_cannot_do_is_refused() -> None:
    config = RunConfig()
    config.train.tune, config.train.tune_head = "full", True
    check_objective(config)
    config.train.objective = ObjectiveConfig("rrpo", {"beta": 0.1, "alpha": 0.01})
    with pytest.raises(InputError, match="train.tune_head: rrpo needs the KL, which cached statistics give only"):
        check_objective(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune_head": True}, "train.tune_head must be false unless train.tune is full"),
        ({"tune_vision": True}, "train.tune_vision must be false unless train.tune is full"),
        (
            {"offload_optimizer": True, "engine": "deepspeed"},
            "train.offload_optimizer must be false below zero_stage 2",
        ),
        (
            {"offload_parameters": True, "engine": "deepspeed", "zero_stage": 2},
            "train.offload_parameters must be false below zero_stage 3",
        ),
        ({"deepspeed": "zero2"}, "train.deepspeed must be empty without deepspeed"),
        (
            {"tune": "full", "engine": "deepspeed"},
            "train.zero_stage must be 2 or 3 to train the whole model in bfloat16",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    config = RunConfig()
    config.model.dtype = "bfloat16"
    config.model.path = "x"
    for key, value in changes.items():
        setattr(config.train, key, value)
    with pytest.raises(InputError, match=message):
        config.validate()
