"""What the objectives refuse: unknown names and options, missing or misshapen inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_kernels.objectives import NEAR, OBJECTIVES, BranchBatch, make_objective


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("rppo", {}, "did you mean 'rrpo'"),
        ("tdpo", {}, "tdpo1"),
        ("zzz", {}, "known: dpo"),
        ("dpo", {"beat": 0.1}, "did you mean 'beta'"),
        ("sft", {"beta": 0.1}, "it has none"),
        ("dpo", {"beta": 0.0}, "beta must be a number in \\(0, inf\\)"),
        ("dpo", {"beta": math.nan}, "beta"),
        ("dpo", {"beta": "0.1"}, "beta"),
        ("dpo", {"beta": True}, "beta"),
        ("robust", {"label_smoothing": 0.5}, "\\[0, 0.5\\)"),
        ("rrpo", {"alpha": -1}, "alpha"),
        ("ddpo", {"average": 0.5}, "true or false"),
        ("sigmoid_norm", {}, "TRL's loss 'sigmoid_norm' .* nearest: 'ipo'"),
    ],
)
def test_bad_names_and_options_say_what_is_near(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_objective(name, **options)


def test_missing_inputs_are_named() -> None:
    logp, ref, kl = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) - 1
    marks = torch.tensor([0, 1, 0, 2])
    batch = BranchBatch(torch.tensor([0, 1, 0, 1]), 2, torch.tensor([0]), torch.tensor([1]), spans=marks)
    with pytest.raises(ValueError, match="ref_logp"):
        make_objective("dpo")(logp, None, None, batch)
    with pytest.raises(ValueError, match="needs kl"):
        make_objective("rrpo")(logp, ref, None, batch)
    with pytest.raises(ValueError, match="kl_logratio"):
        make_objective("kto")(logp, ref, None, batch)
    with pytest.raises(ValueError, match="takes no input"):
        make_objective("dpo")(logp, ref, None, batch, kl_logratio=logp)
    with pytest.raises(ValueError, match="logp must be"):
        make_objective("dpo")(logp[:-1], ref, None, batch)
    batch.spans = None
    extra: dict[str, Any] = {"dpa": {"anchor_kl": kl, "anchor_size": 2}}
    for name in ("rrpo", "ddpo", "dpa"):
        with pytest.raises(ValueError, match="spans"):
            make_objective(name)(logp, ref, kl, batch, **extra.get(name, {}))
    batch.rejected = None
    with pytest.raises(ValueError, match="rejected"):
        make_objective("dpo")(logp, ref, None, batch)
    assert make_objective("sft")(logp, None, None, batch).losses.shape == (1,)


@pytest.mark.parametrize(
    "change",
    [
        {"branch": torch.tensor([0, 1, 2])},
        {"chosen": torch.tensor([-1])},
        {"rejected": torch.tensor([0, 1])},
        {"branch": torch.tensor([0.0, 1.0])},
        {"spans": torch.tensor([1])},
        {"pair_spans": torch.tensor([[0, 0]])},
        {"pair_spans": torch.tensor([[1, 0, 1]])},
        {"pair_spans": torch.tensor([[0, 2, 1]])},
        {"pair_spans": torch.tensor([[0, 1, 1]])},
        {"pair_spans": torch.tensor([[0, 0, 0]])},
    ],
)
def test_a_batch_checks_its_shapes(change: dict[str, Tensor]) -> None:
    fields: dict[str, Any] = {"branch": torch.tensor([0, 1]), "n_branches": 2, "chosen": torch.tensor([0])}
    with pytest.raises(ValueError, match="BranchBatch"):
        BranchBatch(**{**fields, "rejected": torch.tensor([1]), **change})


@pytest.mark.parametrize("name", sorted(NEAR))
def test_the_nearest_objective_named_is_one(name: str) -> None:
    with pytest.raises(ValueError, match="nearest") as error:
        make_objective(name)
    assert any(f"'{known}'" in str(error.value) for known in OBJECTIVES)
