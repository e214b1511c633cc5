"""Every objective by name: loss math on per-token log-probs and KL, written once.

    objective = make_objective("dpo", beta=0.1, sft_weight=1.0)
    out = objective(logp, ref_logp, kl, batch)          # per-pair losses [Q], rewards, metrics
    loss = out.losses.sum() / global_number_of_pairs

Names and options are TRL's where TRL has them: a ``loss_type`` of its DPO, CPO or KTO trainer resolves, or the error
names what is nearest to it here. The classes, with formula, source and ranges, are in ``pair_objectives`` (functions of
per-answer sums) and ``token_objectives`` (spans, token weights, full-vocabulary KL).
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from tempo_kernels.base_objective import Objective
from tempo_kernels.branches import BranchBatch, ObjectiveOutput
from tempo_kernels.pair_objectives import CDPO, CPO, DPO, IPO, KTO, ORPO, SFT, Hinge, LeanPO, RobustDPO, SimPO
from tempo_kernels.token_objectives import DDPO, DPA, RRPO, TDPO1, TDPO2

__all__ = ["OBJECTIVES", "BranchBatch", "Objective", "ObjectiveOutput", "make_objective"]

_CLASSES: tuple[type[Objective], ...] = (
    DPO, CDPO, RobustDPO, IPO, Hinge, SimPO, CPO, ORPO, LeanPO, TDPO1, TDPO2, RRPO, DDPO, DPA, KTO, SFT,
)
OBJECTIVES: dict[str, type[Objective]] = {c.name: c for c in _CLASSES}
ALIASES = {"sigmoid": "dpo"}
NEAR = {
    "sigmoid_norm": "'ipo' (log-ratios per token) or 'simpo' (per token, no reference)",
    "exo_pair": "'cdpo' (the same smoothed target, the other direction of the KL)",
    "nca_pair": "'dpo' with sft_weight (which also holds the chosen answer up)",
    "bco_pair": "'kto' (answers judged one by one)",
    "sppo_hard": "'ipo' (squared distance to a margin)",
    "aot": "'cdpo' (the same loss of each pair, without sorting over the batch)",
    "aot_unpaired": "'cdpo' (the same loss of each pair, without sorting over the batch)",
    "apo_zero": "'kto' (the same saturating loss, around the batch's mean)",
    "apo_zero_unpaired": "'kto' (the same saturating loss, around the batch's mean)",
    "apo_down": "'kto' (the same saturating loss, around the batch's mean)",
    "discopop": "'dpo'",
    "alphapo": "'simpo' (its limit at alpha = 0)",
    "tpo-l": "'simpo' with simpo_gamma for tpo_l_gamma (and a gold answer's NLL as a loss of its own)",
}
"""loss_type of a TRL trainer that is no objective here -> the nearest one."""


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}? Known: " if close else "known: "


def make_objective(name: str, **options: Any) -> Objective:
    """The objective called ``name`` with its options checked.

    Raises ValueError for an unknown name or option (naming the nearest known one) and for a value out of range.
    """
    key = ALIASES.get(name, name)
    if key in NEAR:
        raise ValueError(f"TRL's loss {name!r} is not among the objectives; nearest: {NEAR[key]}")
    if key not in OBJECTIVES:
        known = [*OBJECTIVES, *ALIASES]
        raise ValueError(f"unknown objective {name!r}; {_nearest(str(name), known)}{', '.join(known)}")
    cls = OBJECTIVES[key]
    allowed = [f.name for f in fields(cls)]
    for option in options:
        if option not in allowed:
            hint = f"{_nearest(option, allowed)}{', '.join(allowed)}" if allowed else "it has none"
            raise ValueError(f"objective {name!r} has no option {option!r}; {hint}")
    return cls(**options)
