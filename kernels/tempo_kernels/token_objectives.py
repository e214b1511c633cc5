"""Objectives that look inside an answer: the full-vocabulary KL per token, marked spans, token weights.

K(y) = Σ_t KL(ref || π) over all tokens of the answer; the rest of the notation as in ``pair_objectives``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tempo_kernels.base_objective import Objective, log_sigmoid, option, rejected_of
from tempo_kernels.branches import BranchBatch, Sums
from tempo_kernels.pair_objectives import Parts


@dataclass(frozen=True, kw_only=True)
class TDPO1(Objective):
    """-log s(β [x - (K_l - K_w)]), gradient through both K.

    Source: Zeng et al. 2404.11999, as in its released trainer. Rewards are β (D + K), as logged there.
    Options: beta > 0; sft_weight >= 0.
    """

    name: ClassVar[str] = "tdpo1"
    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = True
    beta: float = option(0.1, low=0, open_="l")
    sft_weight: float = option(0.0, low=0)

    def _penalty(self, k_w: Tensor, k_l: Tensor) -> Tensor:
        return k_l - k_w

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        win, lose = batch.chosen, rejected_of(batch)
        x = sums.D[win] - sums.D[lose]
        losses = -log_sigmoid(self.beta * (x - self._penalty(sums.K[win], sums.K[lose])))
        value = self.beta * (sums.D + sums.K)
        return losses, value[win], value[lose], {}


@dataclass(frozen=True, kw_only=True)
class TDPO2(TDPO1):
    """-log s(β [x - alpha (K_l - sg(K_w))]): no gradient through the chosen answer's K.

    Source: as tdpo1. Options: beta > 0; alpha >= 0 (0.5 in the release); sft_weight >= 0.
    """

    name: ClassVar[str] = "tdpo2"
    alpha: float = option(0.5, low=0)

    def _penalty(self, k_w: Tensor, k_l: Tensor) -> Tensor:
        return self.alpha * (k_l - k_w.detach())


@dataclass(frozen=True, kw_only=True)
class RRPO(Objective):
    """-log s(β u) + alpha K_w, u = Σ_{t in spans of w} (lp - rf) - Σ_{t in spans of l} (lp - rf).

    The spans of w are the pair's own (``batch.pair_spans``) where several pairs share w. K_w runs over all tokens of
    the chosen answer and is penalised (the printed formula's sign would reward drift; the released code penalises). A
    pair with no marked token on either side has the constant log 2 + alpha K_w, no ranking gradient, and counts in the
    metric ``spans/missing``. Source: 2504.12083 and pritamqu/RRPO.
    Rewards are β times the span sums. Options: beta > 0 (0.1 to 0.9); alpha >= 0 (0.01 to 0.1); sft_weight >= 0.
    """

    name: ClassVar[str] = "rrpo"
    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = True
    needs_spans: ClassVar[bool] = True
    beta: float = option(0.1, low=0, open_="l")
    alpha: float = option(0.01, low=0)
    sft_weight: float = option(0.0, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        assert sums.ratio is not None
        ratio_w, ratio_l = (x[:, 0] for x in batch.span_sums(sums.ratio))
        count_w, count_l = (x[:, 0] for x in batch.span_sums(torch.ones_like(logp)))
        losses = -log_sigmoid(self.beta * (ratio_w - ratio_l)) + self.alpha * sums.K[batch.chosen]
        missing = (count_w + count_l == 0).to(logp.dtype)
        return losses, self.beta * ratio_w, self.beta * ratio_l, {"spans/missing": missing}


@dataclass(frozen=True, kw_only=True)
class DDPO(Objective):
    """-log s(β (D'_w - D'_l)), D' = Σ_t w_t (lp - rf), divided by Σ_t w_t with ``average``.

    w_t is ``batch.weights`` or, without them, ``span_weight`` on marked tokens (of a chosen answer: those of the pair,
    ``batch.pair_spans``) and 1 elsewhere. Source: RLHF-V 2312.00849 and thunlp/Muffin. Rewards are β·D'.
    Options: beta > 0; span_weight >= 0 (1.1 in the released run); average true or false; sft_weight >= 0.
    """

    name: ClassVar[str] = "ddpo"
    needs_reference: ClassVar[bool] = True
    needs_spans: ClassVar[bool] = True
    beta: float = option(0.1, low=0, open_="l")
    span_weight: float = option(1.1, low=0)
    average: bool = False
    sft_weight: float = option(0.0, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        assert sums.ratio is not None
        d_w, d_l = self._weighted(sums.ratio, batch)
        if self.average:
            totals = self._weighted(torch.ones_like(logp), batch)
            d_w, d_l = (d / torch.where(n > 0, n, torch.ones_like(n)) for d, n in zip((d_w, d_l), totals, strict=True))
        return -log_sigmoid(self.beta * (d_w - d_l)), self.beta * d_w, self.beta * d_l, {}

    def _weighted(self, values: Tensor, batch: BranchBatch) -> tuple[Tensor, Tensor]:
        """Σ_t w_t values_t of each pair's chosen and rejected answer, [Q] each."""
        win, lose = batch.chosen, rejected_of(batch)
        if batch.weights is not None:
            total = batch.sum(values * batch.weights.to(values.dtype))
            return total[win], total[lose]
        total = batch.sum(values)
        marked_w, marked_l = (x[:, 0] for x in batch.span_sums(values))
        return total[win] + (self.span_weight - 1) * marked_w, total[lose] + (self.span_weight - 1) * marked_l


@dataclass(frozen=True, kw_only=True)
class DPA(Objective):
    """mean_i softplus(l_i(y_l) - l_i(y_w)) + alpha * Σ ``anchor_kl`` / ``anchor_size``.

    l_i(y) is the policy's summed log-prob over the i-th marked span (of a chosen answer shared by several pairs: the
    pair's own, ``batch.pair_spans``), no reference and no β; i runs over the spans that
    either answer of the pair has, and a span the other lacks is 0 there, as released. A pair without spans has loss 0
    and counts in ``spans/missing``. ``anchor_kl`` [M] is the per-token KL(ref || π) on a second, ordinary batch of
    ``anchor_size`` answers; every pair carries that batch's mean, so the mean over pairs holds it once.
    Source: HALVA 2405.18654, its value at one pair per micro-batch. Rewards are the span sums.
    Options: alpha >= 0 (0.4 at 7B); sft_weight >= 0.
    """

    name: ClassVar[str] = "dpa"
    needs_spans: ClassVar[bool] = True
    extra_inputs: ClassVar[tuple[str, ...]] = ("anchor_kl", "anchor_size")
    alpha: float = option(0.4, low=0)
    sft_weight: float = option(0.0, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        if int(extra["anchor_size"]) < 1:
            raise ValueError("objective 'dpa' needs anchor_size >= 1")
        width = max(1, batch.n_spans)
        table_w, table_l = batch.span_sums(logp, width)
        count_w, count_l = batch.span_sums(torch.ones_like(logp), width)
        either = (count_w + count_l > 0).to(logp.dtype)
        phrases = torch.nn.functional.softplus(table_l - table_w) * either
        losses = phrases.sum(1) / either.sum(1).clamp(min=1)
        anchor = extra["anchor_kl"].sum() / int(extra["anchor_size"])
        metrics = {"spans/missing": (either.sum(1) == 0).to(logp.dtype), "kl/anchor": anchor.expand_as(losses)}
        return losses + self.alpha * anchor, table_w.sum(1), table_l.sum(1), metrics
