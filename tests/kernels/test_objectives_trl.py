"""Every objective that TRL has, against TRL's own loss code: values, rewards and gradients on equal log-probs.

TRL's losses live in methods of its trainers. They run here on bare instances (no model, no data): a stand-in for the
model hands out the per-token log-probs, the references come as TRL's precomputed sums. What TRL averages over the
batch is compared with the mean of ours, gradients per token, so that no pair can stand in for another.
"""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_kernels.objectives import BranchBatch, make_objective

LENGTHS = {"chosen": [5, 1, 8, 3], "rejected": [2, 7, 4, 6]}
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Of the norm: some twenty roundings, of sums taken in another order."""


class Case:
    """Four pairs of ragged answers: TRL's table [2Q, T-1] of log-probs, and the same tokens in our order."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, pairs: int = 4) -> None:
        g = torch.Generator().manual_seed(seed)
        self.pairs = pairs
        lengths = torch.tensor(LENGTHS["chosen"][:pairs] + LENGTHS["rejected"][:pairs])
        self.mask = torch.arange(int(lengths.max()) + 2)[None] < (lengths + 1)[:, None]
        self.mask[:, 0] = False  # the prompt, one token long
        self.row, self.position = self.mask[:, 1:].nonzero(as_tuple=True)
        n = len(self.row)
        self.logp = (-3 * torch.rand(n, generator=g, dtype=torch.float64) - 0.05).to(dtype).requires_grad_()
        self.ref = (self.logp.detach() + 0.7 * torch.randn(n, generator=g, dtype=torch.float64)).to(dtype)
        self.lengths = lengths

    def table(self, values: Tensor) -> Tensor:
        """[2Q, T-1], zero outside the answers, differentiable."""
        return values.new_zeros(self.mask[:, 1:].shape).index_put((self.row, self.position), values)

    def sums(self, values: Tensor) -> Tensor:
        return self.table(values).sum(1)

    @property
    def batch(self) -> BranchBatch:
        chosen = torch.arange(self.pairs)
        return BranchBatch(self.row, 2 * self.pairs, chosen, chosen + self.pairs)

    def inputs(self) -> dict[str, Tensor]:
        ref = self.sums(self.ref)
        return {
            "input_ids": torch.zeros_like(self.mask, dtype=torch.int64), "attention_mask": torch.ones_like(self.mask),
            "completion_mask": self.mask.long(), "ref_chosen_logps": ref[: self.pairs],
            "ref_rejected_logps": ref[self.pairs :],
        }


def bare(cls: Any, **attributes: Any) -> Any:
    """An instance without its constructor: what the loss methods read, nothing else."""
    trainer = object.__new__(cls)

    def same(value: Any) -> Any:
        return value

    shared = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same),
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1,
        "model": SimpleNamespace(training=True), "aux_loss_enabled": False, "precompute_ref_logps": True,
        "label_smoothing": 0.0,
    }
    trainer.__dict__.update({**shared, **attributes})
    return trainer


def scores(table: Tensor) -> SimpleNamespace:
    """What TRL's fused head returns: the log-probs, and statistics that only its log reads."""
    nothing = torch.zeros_like(table)
    return SimpleNamespace(log_probs=table, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def dpo(case: Case, losses: list[str], weights: list[float], beta: float, smoothing: float) -> tuple[Tensor, Any]:
    from trl import DPOTrainer

    trainer = bare(
        DPOTrainer, ld_alpha=None, f_divergence_type="reverse_kl", loss_types=losses, loss_weights=weights, beta=beta,
        label_smoothing=smoothing, use_weighting=False,
    )
    loss = trainer._compute_loss(lambda **_: scores(case.table(case.logp)), case.inputs(), False)
    return loss, trainer._metrics["train"]


def agree(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found.double() - expected.double()).norm() <= bound * expected.double().norm()


def compare(case: Case, ours: Tensor, theirs: Tensor) -> None:
    bound = BOUND[case.logp.dtype]
    agree(ours.detach(), theirs.detach(), bound)
    (g_ours,), (g_theirs,) = (torch.autograd.grad(loss, case.logp) for loss in (ours, theirs))
    assert g_theirs.abs().max() > 1e-4
    agree(g_ours, g_theirs, bound)


DPO_CASES: list[tuple[str, dict[str, Any], list[str], list[float], int]] = [
    # ours, options, TRL's loss types with their weights, pairs (1 where TRL's term mixes the batch)
    ("sigmoid", {"beta": 0.4}, ["sigmoid"], [1.0], 4),
    ("dpo", {}, ["sigmoid"], [1.0], 4),
    ("dpo", {"beta": 0.3, "sft_weight": 0.7}, ["sigmoid", "sft"], [1.0, 0.7], 1),
    ("hinge", {"beta": 0.2}, ["hinge"], [1.0], 4),
    ("ipo", {"beta": 0.3}, ["ipo"], [1.0], 4),
    ("robust", {"beta": 0.5, "label_smoothing": 0.2}, ["robust"], [1.0], 4),
    ("cdpo", {"beta": 0.5, "label_smoothing": 0.2}, ["aot"], [1.0], 1),
    ("sft", {}, ["sft"], [1.0], 1),
]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "options", "losses", "weights", "pairs"), DPO_CASES)
def test_dpo_trainer(
    name: str, options: dict[str, Any], losses: list[str], weights: list[float], pairs: int, seed: int,
    dtype: torch.dtype,
) -> None:
    case = Case(dtype, seed, pairs)
    objective = make_objective(name, **options)
    out = objective(case.logp, case.ref, None, case.batch)
    beta = getattr(objective, "beta", 0.1)
    theirs, metrics = dpo(case, losses, weights, beta, options.get("label_smoothing", 0.0))
    compare(case, out.losses.mean(), theirs)
    if name == "sft":
        return
    margins = out.chosen_rewards - out.rejected_rewards
    for key, value in {
        "rewards/chosen": out.chosen_rewards, "rewards/rejected": out.rejected_rewards, "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).double(), "logps/chosen": out.metrics["logps/chosen"],
        "logps/rejected": out.metrics["logps/rejected"],
    }.items():
        assert value.mean().item() == pytest.approx(metrics[key][0], rel=1e-5, abs=1e-7), key


CPO_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("cpo", "sigmoid", {"beta": 0.2, "cpo_alpha": 0.6}),
    ("cpo", "sigmoid", {"beta": 0.2, "cpo_alpha": 0.0, "label_smoothing": 0.1}),
    ("simpo", "simpo", {"beta": 2.5, "simpo_gamma": 0.4}),
    ("simpo", "simpo", {"beta": 1.5, "simpo_gamma": 0.9, "label_smoothing": 0.3, "sft_weight": 0.8}),
]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("name", "loss_type", "options"), CPO_CASES)
def test_cpo_trainer(name: str, loss_type: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Its whole loss; the NLL term (one mean over the micro-batch there) makes it one pair at a time."""
    from trl.experimental.cpo import CPOTrainer

    alpha = options.get("cpo_alpha", options.get("sft_weight", 0.0))
    for seed in range(3):
        case = Case(dtype, seed, 1)
        sums = case.sums(case.logp)
        means = sums / case.lengths
        logps = means if loss_type == "simpo" else sums
        forward = (logps[:1], logps[1:], torch.zeros(1), torch.zeros(1), -means[0])
        trainer = bare(
            CPOTrainer, alpha=0.0, loss_type=loss_type, beta=options["beta"], cpo_alpha=alpha,
            simpo_gamma=options.get("simpo_gamma", 0.0), label_smoothing=options.get("label_smoothing", 0.0),
            concatenated_forward=lambda *_, forward=forward: forward,
        )
        theirs, metrics = trainer.get_batch_loss_metrics(None, {})
        out = make_objective(name, **options)(case.logp, None, None, case.batch)
        assert out.chosen_rewards.item() == pytest.approx(metrics["rewards/chosen"], rel=1e-6)
        assert out.rejected_rewards.item() == pytest.approx(metrics["rewards/rejected"], rel=1e-6)
        compare(case, out.losses.mean(), theirs)


@pytest.mark.parametrize(("name", "seed"), [("dpo", 0), ("cdpo", 1), ("hinge", 2)])
def test_smoothed_losses_of_any_margin(name: str, seed: int) -> None:
    """CPO's losses have no reference; fed with log-ratios in place of log-probs they are DPO's, smoothing included."""
    from trl.experimental.cpo import CPOTrainer

    case = Case(torch.float64, seed)
    smoothing = 0.0 if name == "hinge" else 0.3
    ratio = case.sums(case.logp - case.ref)
    trainer = bare(
        CPOTrainer, alpha=0.0, beta=0.4, label_smoothing=smoothing, loss_type="hinge" if name == "hinge" else "sigmoid"
    )
    theirs, chosen, rejected = trainer.cpo_loss(ratio[:4], ratio[4:])
    options = {} if name == "hinge" else {"label_smoothing": smoothing}
    out = make_objective(name, beta=0.4, **options)(case.logp, case.ref, None, case.batch)
    agree(out.losses.detach(), theirs.detach(), 1e-12)  # pair by pair, here
    agree(out.chosen_rewards, chosen, 1e-12)
    agree(out.rejected_rewards, rejected, 1e-12)
    compare(case, out.losses.mean(), theirs.mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_orpo_trainer(seed: int) -> None:
    """Its odds-ratio term (which it computes in float32), pair by pair; the NLL of the answer's tokens is ours."""
    from trl.experimental.orpo import ORPOTrainer

    case = Case(torch.float32, seed)
    means = case.sums(case.logp) / case.lengths
    weighted, chosen, rejected, _, _ = bare(ORPOTrainer, beta=0.3).odds_ratio_loss(means[:4], means[4:])
    out = make_objective("orpo", beta=0.3)(case.logp, None, None, case.batch)
    agree(out.losses.detach(), (-means[:4] - weighted).detach(), 1e-6)
    agree(out.chosen_rewards, chosen, 1e-6)
    agree(out.rejected_rewards, rejected, 1e-6)
    compare(case, out.losses.mean(), (-means[:4] - weighted).mean())


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shift", [-9.0, 0.4, 1.0])
def test_kto_trainer(shift: float, dtype: torch.dtype) -> None:
    """Its loss over examples; the batch's mean on mismatched completions clamped at zero, and not."""
    from trl import KTOTrainer

    case, other = Case(dtype, 3), Case(dtype, 4)
    table, mismatched = case.table(case.logp), other.table(other.logp.detach() + shift)
    trainer = bare(
        KTOTrainer, calculate_KL=True, loss_type="kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7
    )
    inputs = case.inputs()
    kl_ids = torch.ones_like(inputs["input_ids"])
    theirs = trainer._compute_loss(
        lambda input_ids, **_: scores(mismatched if input_ids is kl_ids else table),
        {
            "input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
            "completion_mask": inputs["completion_mask"], "label": torch.arange(8) < 4,
            "ref_logps": case.sums(case.ref), "KL_input_ids": kl_ids, "KL_attention_mask": inputs["attention_mask"],
            "KL_completion_mask": inputs["completion_mask"], "ref_KL_logps": other.sums(other.ref),
        },
        False,
    )
    ratio = mismatched.sum(1) - other.sums(other.ref)
    objective = make_objective("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    out = objective(case.logp, case.ref, None, case.batch, kl_logratio=ratio)
    assert (ratio.mean() > 0) == (shift > -9)
    compare(case, out.losses.mean(), theirs)


def test_every_loss_of_trl_is_here_or_has_a_nearest() -> None:
    """The names are read from TRL: from its DPO trainer's error, and from what its configurations offer."""
    from trl import KTOConfig
    from trl.experimental.cpo import CPOConfig

    with pytest.raises(ValueError, match="Should be one of") as error:
        dpo(Case(torch.float64), ["no such loss"], [1.0], 0.1, 0.0)
    names = set(re.findall(r"'([a-z_-]+)'", str(error.value).split("one of")[1]))
    for config in (KTOConfig, CPOConfig):
        names |= set(config.__dataclass_fields__["loss_type"].metadata["choices"])
    assert {"sigmoid", "discopop", "kto", "simpo"} <= names
    refused = set()
    for name in names:
        try:
            make_objective(name)
        except ValueError as refusal:
            assert "nearest: '" in str(refusal), refusal
            refused.add(name)
    assert names - refused == {"sigmoid", "hinge", "ipo", "robust", "sft", "simpo", "kto"}
