"""Held-out probes of temporal understanding, with intervals over videos; and the bridge to lmms-eval."""

from tempo_fast.evaluation.evaluate import evaluate
from tempo_fast.evaluation.lmms_eval import lmms_eval_command

__all__ = ["evaluate", "lmms_eval_command"]
