"""TRL: its DPO trainer with this loss head, and with any objective of tempo_kernels.

    from tempo_fast.integrations.trl import DPOTrainer            # in place of trl.DPOTrainer; all else stays

    trainer = DPOTrainer(model=model, args=DPOConfig(...), train_dataset=rows, processing_class=tokenizer)

    class Trainer(DPOTrainer):                                    # or an objective that TRL does not have
        objective = make_objective("tdpo2", beta=0.1, alpha=0.5)

Without ``objective`` the trainer's own ``loss_type`` (sigmoid, hinge, ipo, robust) decides. Only answer tokens reach
the head: a frozen one (LoRA) takes ``one_pass``, a trained one ``recompute``; a class's ``impl`` chooses another, and
its ``exact_kl = True`` forms the KL's gradient from p − q, which only a live reference allows.
Precomputed reference log-probs work for objectives of log-prob sums. Objectives with spans read ``inputs["spans"]``
[2B, T], which the data collator has to supply. ``padding_free`` does nothing in TRL's own trainer and nothing here. Not
in the log: entropy, logits/*, token accuracy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tempo_fast.integrations.answers import IGNORE, Answers, answer_logps, as_reference, plain_head
from tempo_fast.integrations.drop_in import drop_in
from tempo_kernels.objectives import BranchBatch, Objective, make_objective

_OWN_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "spans")
TRL_VERSIONS = ((1, 10), (1, 17))
"""The first TRL that works, and the first that is not known to."""


class ObjectiveMixin:
    """Put before ``trl.DPOTrainer`` in the bases. The batch holds all chosen rows, then all rejected rows.

    The constructor raises ValueError, before any work, for a TRL outside ``TRL_VERSIONS``, for arguments that would be
    dropped in silence, and for a head that cannot be used.
    """

    objective: ClassVar[Objective | None] = None
    impl: ClassVar[str] = "auto"
    """As :func:`tempo_kernels.head.linear_logp`."""
    exact_kl: ClassVar[bool] = False
    """As :func:`tempo_kernels.head.linear_logp`; for objectives with a KL."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _check_version()
        config = kwargs["args"] if "args" in kwargs else args[2] if len(args) > 2 else None
        objective = _objective(self, config)
        _check_arguments(config, objective)
        if self.exact_kl:
            _check_exact_kl(objective, self.impl)
        super().__init__(*args, **kwargs)  # type: ignore[misc]
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("a router's auxiliary loss is not supported here: set router_aux_loss_coef to 0.0")
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if any(getattr(parallel, size, 1) > 1 for size in ("tp_size", "cp_size", "sp_size")):
            raise ValueError("tensor, context and sequence parallelism are not supported here: use data parallelism")
        plain_head(self.model)

    def compute_ref_log_probs(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's summed log-probs [B/2] of the chosen and of the rejected rows, for TRL's precomputation."""
        adapter = self._reference_adapter() if self.ref_model is None else {}
        with self.accelerator.autocast(), as_reference(model, **adapter):
            chosen, rejected = answer_logps(model, *_split(inputs), impl=self.impl).sums().chunk(2)
        return chosen, rejected

    def _reference_adapter(self: Any) -> dict[str, Any]:
        """Which adapter of the policy is the reference: continuing one, TRL keeps its first state as "ref"."""
        adapters = getattr(self.accelerator.unwrap_model(self.model), "peft_config", None)
        if adapters is None:
            return {}
        return {"adapter": "ref"} if "ref" in adapters else {"adapters_off": True}

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Tensor:
        if return_outputs:
            raise ValueError("there are no logits to return: leave compute_metrics unset")
        objective = _objective(self, self.args)
        sums = _precomputed(inputs) if objective.needs_reference and self.precompute_ref_logps else None
        live: dict[str, Any] = {}
        if objective.needs_reference and sums is None:
            live = self._reference_adapter() if self.ref_model is None else {"reference": self.ref_model}
        model_inputs, labels = _split(inputs)
        wanted: dict[str, Any] = {"kl": objective.needs_kl, "exact_kl": self.exact_kl, "impl": self.impl}
        answers = answer_logps(model, model_inputs, labels, **live, **wanted)
        if sums is not None:  # objectives of sums alone get here: any split over the tokens is the same to them
            answers.ref_logp = (sums / answers.lengths())[answers.row].to(answers.logp.dtype)
        out = objective(answers.logp, answers.ref_logp, answers.kl, _batch(answers, inputs.get("spans")))

        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        margins = out.chosen_rewards - out.rejected_rewards
        logged = {
            "rewards/chosen": out.chosen_rewards, "rewards/rejected": out.rejected_rewards,
            "rewards/accuracies": (margins > 0).float(), "rewards/margins": margins, **out.metrics,
        }
        for key, values in logged.items():
            self._metrics[mode][key].append(self.accelerator.gather(values).mean().item())
        return out.losses.mean()


def __getattr__(name: str) -> Any:
    """``DPOTrainer``: importing this file imports nothing of TRL."""
    if name == "DPOTrainer":
        return drop_in(ObjectiveMixin, "trl", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# -- what comes in ----------------------------------------------------------------------------------------------------


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What the model takes, and the labels [2B, T]."""
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
    return {k: v for k, v in inputs.items() if k not in _OWN_KEYS}, labels


def _precomputed(inputs: dict[str, Any]) -> Tensor:
    """[2B] the reference's summed log-probs."""
    return torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])


def _batch(answers: Answers, spans: Tensor | None) -> BranchBatch:
    pairs = answers.rows // 2
    chosen = torch.arange(pairs, device=answers.row.device)
    marks = None if spans is None else spans[answers.row, answers.position]
    return BranchBatch(answers.row, answers.rows, chosen, chosen + pairs, spans=marks)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_version() -> None:
    import trl

    found = tuple(int(part) for part in trl.__version__.split(".")[:2])
    low, end = TRL_VERSIONS
    if not low <= found < end:
        raise ValueError(
            f"this trainer is tested with TRL {low[0]}.{low[1]} up to, not including, {end[0]}.{end[1]}; "
            f"TRL {trl.__version__} is installed: install one of those, or use trl.DPOTrainer as it is"
        )


def _objective(trainer: Any, config: Any) -> Objective:
    """The class's objective, or the one TRL's arguments ask for. Raises ValueError for arguments it would drop."""
    if trainer.objective is not None:
        return trainer.objective
    if config is None:
        return make_objective("sigmoid")
    for key, plain in (("ld_alpha", None), ("use_weighting", False), ("loss_weights", None)):
        if getattr(config, key, plain) not in (plain, None):
            raise ValueError(f"{key} is not supported here: leave it unset")
    if getattr(config, "f_divergence_type", "reverse_kl") != "reverse_kl":
        raise ValueError("only f_divergence_type='reverse_kl' is supported here")
    names = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type]
    if len(names) != 1 or names[0] not in ("sigmoid", "hinge", "ipo", "robust"):
        raise ValueError(
            f"loss_type {config.loss_type} is not supported here: set the class's objective, for ['sigmoid', 'sft'] "
            "make_objective('dpo', sft_weight=1.0), whose NLL is each chosen answer's mean"
        )
    options: dict[str, Any] = {"beta": config.beta}
    if names[0] == "robust":
        options["label_smoothing"] = config.label_smoothing
    return make_objective(names[0], **options)


def _check_arguments(config: Any, objective: Objective) -> None:
    if objective.extra_inputs:
        names = " and ".join(objective.extra_inputs)
        raise ValueError(f"objective {objective.name!r} needs {names}, which a DPO batch does not hold")
    if getattr(config, "use_liger_kernel", False):
        raise ValueError("use_liger_kernel replaces the head that this trainer uses: leave it unset")
    per_token = objective.needs_kl or objective.needs_spans
    if getattr(config, "precompute_ref_log_probs", False) and objective.needs_reference and per_token:
        raise ValueError(
            f"precompute_ref_log_probs keeps one sum per answer, and objective {objective.name!r} needs the "
            "reference's tokens: leave it unset"
        )


def _check_exact_kl(objective: Objective, impl: str) -> None:
    if not objective.needs_kl:
        raise ValueError(f"exact_kl: objective {objective.name!r} has no KL: leave exact_kl unset")
    if impl == "one_pass":
        raise ValueError("exact_kl: impl 'one_pass' cannot form p - q: use 'recompute' or 'auto'")
