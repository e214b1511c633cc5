"""Held-out probes of temporal understanding, with intervals over videos; and the bridge to lmms-eval."""

from tempo_fast.evaluation.lmms_eval import lmms_eval_command
from tempo_fast.evaluation.row import evaluate

__all__ = ["evaluate", "lmms_eval_command"]
