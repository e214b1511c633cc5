"""TRL (1.x): any objective of tempo_kernels in its DPO trainer, log-probs and exact KL from hidden states.

    from trl import DPOTrainer
    from tempo_fast.integrations.trl import ObjectiveMixin
    from tempo_kernels.objectives import make_objective

    class Trainer(ObjectiveMixin, DPOTrainer):
        objective = make_objective("tdpo2", beta=0.1, alpha=0.5)

Without ``objective`` the trainer's own ``loss_type`` (sigmoid, hinge, ipo, robust) decides. Objectives with spans read
``inputs["spans"]`` [2B, T], which the data collator has to supply. Not in the log: entropy, logits/*, token accuracy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from tempo_fast.integrations.answers import IGNORE, answer_logps
from tempo_kernels.objectives import BranchBatch, Objective, make_objective

_OWN_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "spans")


class ObjectiveMixin:
    """Put before ``trl.DPOTrainer`` in the bases. The batch holds all chosen rows, then all rejected rows."""

    objective: ClassVar[Objective | None] = None

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Tensor:
        if return_outputs:
            raise ValueError("there are no logits to return: leave compute_metrics unset")
        objective = self.objective or _of_trainer(self)
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORE)
        reference: Any = None
        if objective.needs_reference:
            # Continuing an adapter, TRL keeps its first state as the adapter "ref"; else the base is the reference.
            adapters = getattr(self.accelerator.unwrap_model(model), "peft_config", {})
            reference = self.ref_model if self.ref_model is not None else "ref" if "ref" in adapters else None
        answers = answer_logps(
            model, {k: v for k, v in inputs.items() if k not in _OWN_KEYS}, labels, reference=reference,
            adapters_off=objective.needs_reference and reference is None, kl=objective.needs_kl,
        )
        pairs = answers.rows // 2
        chosen = torch.arange(pairs, device=labels.device)
        spans = inputs["spans"][answers.row, answers.position] if "spans" in inputs else None
        batch = BranchBatch(answers.row, answers.rows, chosen, chosen + pairs, spans=spans)
        out = objective(answers.logp, answers.ref_logp, answers.kl, batch)

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


def _of_trainer(trainer: Any) -> Objective:
    """The objective the trainer's own arguments ask for. Raises ValueError for arguments that would be dropped."""
    args = trainer.args
    for key, plain in (("ld_alpha", None), ("use_weighting", False), ("precompute_ref_log_probs", False)):
        if getattr(args, key, plain) not in (plain, None):
            raise ValueError(f"{key} is not supported here: leave it unset")
    if getattr(args, "f_divergence_type", "reverse_kl") != "reverse_kl":
        raise ValueError("only f_divergence_type='reverse_kl' is supported here")
    names = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
    if len(names) != 1 or names[0] not in ("sigmoid", "hinge", "ipo", "robust"):
        raise ValueError(f"loss_type {args.loss_type} is not supported here: set the class's objective")
    options: dict[str, Any] = {"beta": args.beta}
    if names[0] == "robust":
        options["label_smoothing"] = args.label_smoothing
    return make_objective(names[0], **options)
