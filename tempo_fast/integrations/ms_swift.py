"""ms-swift (4.x): its DPO trainer with log-probs from hidden states, so that a video's prompt never reaches the head.

    # plugin.py, for: swift rlhf --rlhf_type dpo --external_plugins plugin.py ...
    from swift.trainers.trainer_factory import TrainerFactory

    TrainerFactory.TRAINER_MAPPING["dpo"] = "tempo_fast.integrations.ms_swift.DPOTrainer"

The trainer's own loss math runs on what is returned here. Not with padding-free rows, packing, sequence parallelism,
``ld_alpha`` or a router's auxiliary loss. ``logits/*`` in the log are NaN: there are no logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tempo_fast.integrations.answers import answer_logps
from tempo_fast.integrations.drop_in import drop_in


class HiddenLogpsMixin:
    """Put before the trainer in the bases. The batch holds all chosen rows, then all rejected rows."""

    def concatenated_forward(
        self: Any, model: Any, batch: dict[str, Any], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        """chosen_logps, rejected_logps and their token counts [B]; for the policy nll_loss, the chosen tokens' mean.

        Sums; means for ipo where the trainer does not divide by the counts itself (before 4.6).
        """
        template, args = self.template, self.args
        unsupported = {
            "padding_free": getattr(template, "padding_free", False),
            "packing": getattr(template, "packing", False),
            "sequence_parallel_size": getattr(template, "sequence_parallel_size", 1) > 1,
            "ld_alpha": getattr(args, "ld_alpha", None) is not None,
            "router_aux_loss_coef": getattr(self, "aux_loss_enabled", False),
            "an encoder-decoder model": getattr(self, "is_encoder_decoder", False),
        }
        for key, used in unsupported.items():
            if used:
                raise ValueError(f"{key} is not supported with log-probs from hidden states")
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "text_position_ids")}
        answers = answer_logps(model, inputs, batch["labels"])
        half = answers.rows // 2
        logps, counts = answers.sums(), answers.lengths()
        types = self.loss_type if isinstance(self.loss_type, list) else [self.loss_type]
        if "ipo" in types and not hasattr(self, "_get_ipo_sequence_logps"):
            logps = logps / counts
        nothing = torch.full((), float("nan"), device=logps.device)
        output = {
            "chosen_logps": logps[:half], "rejected_logps": logps[half:],
            "mean_chosen_logits": nothing, "mean_rejected_logits": nothing,
            "chosen_completion_token_counts": counts[:half], "rejected_completion_token_counts": counts[half:],
        }
        if not is_ref_model:
            output["nll_loss"] = -answers.logp[answers.row < half].mean()
        return output


def __getattr__(name: str) -> Any:
    """``DPOTrainer``: importing this file imports nothing of ms-swift."""
    if name == "DPOTrainer":
        return drop_in(HiddenLogpsMixin, "swift.rlhf_trainers.dpo_trainer", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
