"""LLaMA-Factory: its DPO trainer with log-probs from hidden states, so that a prompt never reaches the head.

    # train.py, for: torchrun --nproc-per-node 8 train.py config.yaml        (stage: dpo)
    from llamafactory.train.dpo import trainer
    from llamafactory.train.tuner import run_exp
    from tempo_fast.integrations.llama_factory import CustomDPOTrainer

    trainer.CustomDPOTrainer = CustomDPOTrainer       # its workflow looks the class up there (0.9.5)
    run_exp()

The trainer's own loss math runs on the sums (or, for ipo, orpo and simpo, means) returned here. Not with
``ld_alpha``. ``logits/*`` in the log are NaN: there are no logits.
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
        """chosen_logps, rejected_logps, chosen_logps_avg [B], and NaN in place of the logits."""
        if getattr(self, "ld_alpha", None) is not None:
            raise ValueError("ld_alpha is not supported with log-probs from hidden states")
        answers = answer_logps(model, {k: v for k, v in batch.items() if k != "labels"}, batch["labels"])
        half = answers.rows // 2
        sums = answers.sums()
        means = sums / answers.lengths()
        logps = means if self.loss_type in ("ipo", "orpo", "simpo") else sums
        nothing = torch.full((1,), float("nan"), device=sums.device)
        return {
            "chosen_logps": logps[:half], "rejected_logps": logps[half:], "chosen_logits": nothing,
            "rejected_logits": nothing, "chosen_logps_avg": means[:half],
        }


def __getattr__(name: str) -> Any:
    """``CustomDPOTrainer``: importing this file imports nothing of LLaMA-Factory."""
    if name == "CustomDPOTrainer":
        return drop_in(HiddenLogpsMixin, "llamafactory.train.dpo.trainer", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
