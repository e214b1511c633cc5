"""TRL's DPO trainer beside ours, which is the same trainer with our head: losses step by step, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_fast.integrations import trl as drop_in
from tempo_kernels import backend
from tempo_kernels.objectives import make_objective

VOCABULARY = 61
STEPS = 20
Make = Callable[..., Any]
BOUND = 1e-5
"""Of a loss, and of a training's whole movement relative to its norm.

A log-prob comes out of logits below 8 in size, within some ulp(8) = 5e-7 of the exact one in float32; a margin is beta
(0.3) times a sum of some thirty of them, whose errors add up at random: 0.3 * 5.5 * 5e-7 = 1e-6. Plain SGD, at a rate
where the loss falls, carries the error of a step on without making it larger (Adam would divide by it), and twenty of
them stay within ten times one. At ten times these rates the trainings are chaotic, TRL's beside float64 as well.
"""


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t1", pad_token="t2", unk_token="t0")


def rows(count: int = 12, seed: int = 0) -> Any:
    """Prompts and answers of ragged lengths, so that padding, single tokens and long answers meet in a batch."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        n = int(torch.randint(low, high, (1,), generator=g))
        return " ".join(f"t{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=g).tolist())

    return Dataset.from_list(
        [{"prompt": text(2, 9) + " ", "chosen": text(1, 12), "rejected": text(1, 12)} for _ in range(count)]
    )


def arguments(folder: Path, **changes: Any) -> Any:
    from trl import DPOConfig

    settings = {
        "output_dir": str(folder), "beta": 0.3, "max_steps": STEPS, "per_device_train_batch_size": 2, "optim": "sgd",
        "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": "none",
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True,
    }
    return DPOConfig(**{**settings, **changes})


def build(cls: Any, folder: Path, model: Any, *, ref_model: Any = None, data: Any = None, **changes: Any) -> Any:
    """The trainer, with its micro-batch losses kept in ``seen``."""

    class Watched(cls):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.seen = [*getattr(self, "seen", []), loss.item()]
            return loss

    return Watched(
        model=model, ref_model=ref_model, args=arguments(folder, **changes), train_dataset=data or rows(),
        processing_class=tokenizer(),
    )


def movement(model: Any, start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters() if p.requires_grad])


TRAININGS: dict[str, dict[str, Any]] = {
    "lora": {"lora": True, "impl": "one_pass"},
    "lora, precomputed": {"lora": True, "impl": "one_pass", "precompute_ref_log_probs": True},
    "lora, accumulated": {"lora": True, "gradient_accumulation_steps": 3},
    "lora, checkpointed": {"lora": True, "gradient_checkpointing": True, "loss_type": "ipo"},
    "full": {"impl": "recompute", "loss_type": "robust", "label_smoothing": 0.1, "learning_rate": 0.005},
    "full, eager": {"impl": "eager", "loss_type": "hinge", "learning_rate": 0.005},
    "full, precomputed": {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2, "learning_rate": 0.005},
}


@pytest.mark.parametrize("case", list(TRAININGS))
def test_twenty_steps_beside_trl(case: str, tmp_path: Path, make_model: Make, with_adapter: Make) -> None:
    from trl import DPOTrainer

    options = dict(TRAININGS[case])
    lora, impl = options.pop("lora", False), options.pop("impl", "auto")
    ours = type("Ours", (drop_in.DPOTrainer,), {"impl": impl})
    runs = []
    for name, cls in (("theirs", DPOTrainer), ("ours", ours)):
        model = with_adapter(make_model(), init_lora_weights=True) if lora else make_model()
        reference = None if lora or options.get("precompute_ref_log_probs") else make_model()
        # A folder and rows of its own: TRL keeps precomputed sums in a file by the rows' and the weights' digest.
        data = rows()
        data._fingerprint = f"{name}-{case}"
        trainer = build(cls, tmp_path / name, model, ref_model=reference, data=data, **options)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = movement(trainer.model, start)
        runs.append((torch.tensor(trainer.seen, dtype=torch.float64), moved, trainer.state.log_history))
    (theirs, moved_theirs, log_theirs), (found, moved, log) = runs
    assert len(found) == STEPS * options.get("gradient_accumulation_steps", 1)
    assert (theirs - theirs[0]).abs().max() > 1000 * BOUND  # there is something to follow
    assert (found - theirs).abs().max() <= BOUND
    assert (moved - moved_theirs).norm() <= BOUND * moved_theirs.norm()
    keys = ("loss", "rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected", "num_tokens")
    for i, (expected, step) in enumerate(zip(log_theirs[:-1], log[:-1], strict=True)):
        for key in (*keys, "rewards/accuracies") if i else keys:  # at first a margin is zero, or rounding
            assert step[key] == pytest.approx(expected[key], rel=BOUND, abs=BOUND), (i, key)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_an_evaluation_beside_trl(loss_type: str, tmp_path: Path, make_model: Make, with_adapter: Make) -> None:
    from trl import DPOTrainer

    results = []
    for cls in (DPOTrainer, drop_in.DPOTrainer):
        smoothing = 0.2 if loss_type == "robust" else 0.0
        trainer = build(
            cls, tmp_path, with_adapter(make_model()), loss_type=loss_type, label_smoothing=smoothing
        )
        results.append(trainer.evaluate(rows(5, seed=1)))
    for key in ("eval_loss", "eval_rewards/chosen", "eval_rewards/margins", "eval_logps/rejected"):
        assert results[1][key] == pytest.approx(results[0][key], rel=1e-5, abs=BOUND), key


def test_the_reference_of_a_continued_adapter_is_its_first_state(
    tmp_path: Path, make_model: Make, with_adapter: Make
) -> None:
    """TRL copies the adapter it is given to "ref": before the first step the rewards are zero, of ours exactly."""
    trainer = build(drop_in.DPOTrainer, tmp_path, with_adapter(make_model()))
    assert "ref" in trainer.model.peft_config
    trainer.evaluate(rows(4, seed=2))
    log = trainer.state.log_history[-1]
    assert log["eval_rewards/chosen"] == log["eval_rewards/rejected"] == 0.0


@pytest.mark.parametrize("exact", [False, True])
def test_an_objective_that_trl_does_not_have(
    exact: bool, tmp_path: Path, make_model: Make, with_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact KL and spans through TRL's trainer, against softmax over whole logits in float64."""
    walks = []
    pair_backward = backend.TORCH.pair_backward

    def spy(*arguments: Any, **wanted: Any) -> Any:
        walks.append(wanted)
        return pair_backward(*arguments, **wanted)

    monkeypatch.setattr(backend, "TORCH", backend.TORCH._replace(pair_backward=spy))

    class Trainer(drop_in.DPOTrainer):
        objective = make_objective("rrpo", beta=0.5, alpha=0.1)
        exact_kl = exact

    trainer = build(Trainer, tmp_path, with_adapter(make_model()))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    spans = torch.randint(0, 2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(trainer.model, {**batch, "spans": spans})
    loss.backward()
    assert len(walks) == exact  # p - q takes a second walk

    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    policy = torch.log_softmax(trainer.model(**inputs).logits[:, :-1].double(), -1)
    trainer.model.set_adapter("ref")
    with torch.no_grad():
        reference = torch.log_softmax(trainer.model(**inputs).logits[:, :-1].double(), -1)
    labels, mask = batch["input_ids"][:, 1:, None], batch["completion_mask"][:, 1:].bool()
    marked = ((policy - reference).gather(-1, labels)[..., 0] * spans[:, 1:] * mask).sum(1)
    kl = ((reference.exp() * (reference - policy)).sum(-1) * mask).sum(1)
    expected = (-torch.nn.functional.logsigmoid(0.5 * (marked[:3] - marked[3:])) + 0.1 * kl[:3]).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "objective", "words"),
    [
        ({"ld_alpha": 0.5}, None, "ld_alpha"),
        ({"use_weighting": True}, None, "use_weighting"),
        ({"loss_weights": [0.5]}, None, "loss_weights"),
        ({"f_divergence_type": "js_divergence"}, None, "reverse_kl"),
        ({"loss_type": "discopop"}, None, "discopop"),
        ({"loss_type": ["sigmoid", "sft"]}, None, "sft_weight"),
        ({"use_liger_kernel": True}, None, "use_liger_kernel"),
        ({"precompute_ref_log_probs": True}, "tdpo1", "reference's tokens"),
        ({"precompute_ref_log_probs": True}, "ddpo", "reference's tokens"),
        ({}, "kto", "kl_logratio"),
        ({}, "dpa", "anchor_kl and anchor_size"),
    ],
)
def test_arguments_are_never_dropped_in_silence(
    changes: dict[str, Any], objective: str | None, words: str, tmp_path: Path
) -> None:
    """At construction, before the model is looked at."""
    cls = drop_in.DPOTrainer
    if objective is not None:
        cls = type("Trainer", (cls,), {"objective": make_objective(objective)})
    config = arguments(tmp_path)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=words):
        cls(None, None, config)


@pytest.mark.parametrize(
    ("objective", "impl", "changes", "words"),
    [
        ("dpo", "auto", {}, "has no KL"),
        ("tdpo1", "one_pass", {}, "recompute"),
        ("tdpo1", "auto", {"precompute_ref_log_probs": True}, "reference's tokens"),
    ],
)
def test_an_exact_kl_that_cannot_be_is_refused(
    objective: str, impl: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    members = {"objective": make_objective(objective), "impl": impl, "exact_kl": True}
    with pytest.raises(ValueError, match=words):
        type("Trainer", (drop_in.DPOTrainer,), members)(None, None, arguments(tmp_path, **changes))


def test_heads_that_cannot_be_used_are_refused_at_construction(
    tmp_path: Path, make_model: Make, with_adapter: Make
) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        build(drop_in.DPOTrainer, tmp_path, with_adapter(make_model(), target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        build(drop_in.DPOTrainer, tmp_path, with_adapter(make_model(), modules_to_save=["lm_head"]))


def test_a_trained_head_and_its_adapterless_self_are_no_pair(
    tmp_path: Path, make_model: Make, with_adapter: Make
) -> None:
    trainer = build(drop_in.DPOTrainer, tmp_path, with_adapter(make_model()))
    trainer.model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze the head"):
        trainer.train()


def test_outputs_are_not_pretended(tmp_path: Path, make_model: Make, with_adapter: Make) -> None:
    trainer = build(drop_in.DPOTrainer, tmp_path, with_adapter(make_model()))
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with pytest.raises(ValueError, match="compute_metrics"):
        trainer.compute_loss(trainer.model, batch, return_outputs=True)


class Host:
    """What stands behind the mixin when the trainer's own constructor has run."""

    def __init__(self, **attributes: Any) -> None:
        self.accelerator = SimpleNamespace(parallelism_config=None)
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"aux_loss_enabled": True}, "router_aux_loss_coef"),
        ({"accelerator": SimpleNamespace(parallelism_config=SimpleNamespace(cp_size=2))}, "context"),
    ],
)
def test_layouts_that_would_lie_are_refused(attributes: dict[str, Any], words: str, make_model: Make) -> None:
    cls = type("Trainer", (drop_in.ObjectiveMixin, Host), {})
    assert cls(model=make_model()).impl == "auto"
    with pytest.raises(ValueError, match=words):
        cls(model=make_model(), **attributes)


@pytest.mark.parametrize("version", ["1.9.2", "1.17.0", "2.0.0.dev0"])
def test_another_trl_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ValueError, match=f"TRL {version} is installed"):
        drop_in.DPOTrainer(None)


def test_importing_it_imports_nothing_of_trl() -> None:
    code = (
        "import sys, tempo_fast.integrations.trl as t\n"
        "assert not {'trl', 'transformers', 'peft', 'datasets'} & set(sys.modules), 'heavy'\n"
        "import trl\n"
        "assert issubclass(t.DPOTrainer, trl.DPOTrainer) and t.DPOTrainer is t.DPOTrainer"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
