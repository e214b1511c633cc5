"""Objectives that are functions of per-answer sums.

w and l are a pair's chosen and rejected answer; L(y) = Σ_t log π(y_t), R(y) the same of the reference, D = L - R,
n(y) tokens, a = L / n, NLL(y_w) = -a_w (token mean of that answer), s = sigmoid, β = ``beta``.
Every loss below is per pair, [Q]; ``sft_weight`` >= 0 adds sft_weight * NLL(y_w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tempo_kernels.base_objective import Objective, log_sigmoid, option, rejected_of
from tempo_kernels.branches import BranchBatch, Sums

Parts = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class _ReferencePair(Objective):
    """Losses of x = D_w - D_l. Rewards are β·D."""

    needs_reference: ClassVar[bool] = True
    beta: float = option(0.1, low=0, open_="l")
    sft_weight: float = option(0.0, low=0)

    def _of_margin(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        d_w, d_l = sums.D[batch.chosen], sums.D[rejected_of(batch)]
        return self._of_margin(d_w - d_l), self.beta * d_w, self.beta * d_l, {}


@dataclass(frozen=True, kw_only=True)
class DPO(_ReferencePair):
    """-log s(β x) [+ sft_weight * NLL(y_w): RPO].

    Source: Rafailov et al. 2305.18290, TRL ``loss_type="sigmoid"``; the SFT term (2404.19733) as ``rpo_alpha`` of older
    TRL, today ``loss_type=["sigmoid", "sft"]``, at one pair per micro-batch. With ``label_smoothing`` ε the loss is
    cDPO's. Options: beta > 0; sft_weight >= 0; label_smoothing in [0, 0.5).
    """

    name: ClassVar[str] = "dpo"
    label_smoothing: float = option(0.0, low=0, high=0.5, open_="h")

    def _of_margin(self, x: Tensor) -> Tensor:
        e, z = self.label_smoothing, self.beta * x
        return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)


@dataclass(frozen=True, kw_only=True)
class CDPO(DPO):
    """-(1-ε) log s(β x) - ε log s(-β x): labels flipped with probability ε = ``label_smoothing``.

    Source: Mitchell's cDPO note; the sigmoid loss with ``label_smoothing`` of older TRL, today its ``aot`` on one pair.
    Options: as dpo, label_smoothing 0.1.
    """

    name: ClassVar[str] = "cdpo"
    label_smoothing: float = option(0.1, low=0, high=0.5, open_="h")


@dataclass(frozen=True, kw_only=True)
class RobustDPO(DPO):
    """[-(1-ε) log s(β x) + ε log s(-β x)] / (1 - 2ε): unbiased under labels flipped with probability ε.

    Source: Chowdhury et al. 2403.00409, TRL ``robust``. Options: as dpo, label_smoothing 0.1, in [0, 0.5).
    """

    name: ClassVar[str] = "robust"
    label_smoothing: float = option(0.1, low=0, high=0.5, open_="h")

    def _of_margin(self, x: Tensor) -> Tensor:
        e, z = self.label_smoothing, self.beta * x
        return (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)


@dataclass(frozen=True, kw_only=True)
class Hinge(_ReferencePair):
    """max(0, 1 - β x).

    Source: SLiC 2305.10425 / RSO 2309.06657, TRL ``hinge``. Options: beta > 0; sft_weight >= 0.
    """

    name: ClassVar[str] = "hinge"

    def _of_margin(self, x: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * x)


@dataclass(frozen=True, kw_only=True)
class IPO(_ReferencePair):
    """(D_w / n_w - D_l / n_l - 1 / (2β))²: log-ratios averaged over tokens.

    Source: Azar et al. 2310.12036, TRL ``ipo`` (length-normalised there too). Rewards stay β·D.
    Options: beta > 0 (the paper's τ); sft_weight >= 0.
    """

    name: ClassVar[str] = "ipo"

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        win, lose = batch.chosen, rejected_of(batch)
        mean = sums.D / sums.n
        losses = (mean[win] - mean[lose] - 1 / (2 * self.beta)) ** 2
        return losses, self.beta * sums.D[win], self.beta * sums.D[lose], {}


@dataclass(frozen=True, kw_only=True)
class SimPO(Objective):
    """-(1-ε) log s(β (a_w - a_l) - γ) - ε log s(-(β (a_w - a_l) - γ)), γ = ``simpo_gamma``; no reference.

    Source: Meng et al. 2405.14734; TRL's CPO trainer with ``loss_type="simpo"``. Rewards are β·a.
    Options: beta > 0; simpo_gamma >= 0; label_smoothing in [0, 0.5); sft_weight >= 0 (TRL's cpo_alpha: CPO-SimPO).
    """

    name: ClassVar[str] = "simpo"
    beta: float = option(2.0, low=0, open_="l")
    simpo_gamma: float = option(0.5, low=0)
    label_smoothing: float = option(0.0, low=0, high=0.5, open_="h")
    sft_weight: float = option(0.0, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        a_w, a_l = sums.mean_logp[batch.chosen], sums.mean_logp[rejected_of(batch)]
        e, z = self.label_smoothing, self.beta * (a_w - a_l) - self.simpo_gamma
        return -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z), self.beta * a_w, self.beta * a_l, {}


@dataclass(frozen=True, kw_only=True)
class CPO(Objective):
    """-(1-ε) log s(β (L_w - L_l)) - ε log s(-β (L_w - L_l)) + cpo_alpha * NLL(y_w); sums, no reference.

    Source: Xu et al. 2401.08417, TRL's CPO trainer ``sigmoid``; NLL here is over the answer's tokens. Rewards are β·L.
    Options: beta > 0; cpo_alpha >= 0; label_smoothing in [0, 0.5).
    """

    name: ClassVar[str] = "cpo"
    beta: float = option(0.1, low=0, open_="l")
    cpo_alpha: float = option(1.0, low=0)
    label_smoothing: float = option(0.0, low=0, high=0.5, open_="h")

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        win, lose = batch.chosen, rejected_of(batch)
        e, z = self.label_smoothing, self.beta * (sums.L[win] - sums.L[lose])
        nll = -sums.mean_logp[win]
        losses = -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z) + self.cpo_alpha * nll
        return losses, self.beta * sums.L[win], self.beta * sums.L[lose], {"nll/chosen": nll}


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0, stable at both ends; a is held 1e-7 below 0, where the odds are infinite."""
    a = a.clamp(max=-1e-7)
    near = a > -math.log(2)
    # Each branch gets a harmless argument where the other is taken: no inf * 0 in the backward.
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, a, a.new_tensor(-1.0)))),
        torch.log1p(-torch.exp(torch.where(near, a.new_tensor(-1.0), a))),
    )


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """NLL(y_w) - β log s((a_w - a_l) - (log(1 - e^{a_w}) - log(1 - e^{a_l}))): no reference.

    Source: Hong et al. 2403.07691, TRL's ORPO trainer; NLL here is over the answer's tokens (TRL's: prompt too).
    Rewards are β·a. Options: beta > 0 (the paper's λ).
    """

    name: ClassVar[str] = "orpo"
    beta: float = option(0.1, low=0, open_="l")

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        a_w, a_l = sums.mean_logp[batch.chosen], sums.mean_logp[rejected_of(batch)]
        odds = (a_w - a_l) - (log1mexp(a_w) - log1mexp(a_l))
        losses = -a_w - self.beta * log_sigmoid(odds)
        return losses, self.beta * a_w, self.beta * a_l, {"nll/chosen": -a_w, "log_odds_ratio": odds}


@dataclass(frozen=True, kw_only=True)
class LeanPO(Objective):
    """-(1-ε) log s(β d - γ) - ε log s(-β d - γ) + sft_weight * NLL(y_w), d = a_w - a_l, no reference.

    ε = label_smoothing where d < tau, else 0 (not differentiated): only pairs not yet apart are smoothed. γ is
    subtracted in *both* terms, unlike SimPO's smoothing. Source: 2506.05260 as in its author's training code.
    Rewards are β·a. Options: beta > 0; gamma >= 0; label_smoothing in [0, 1); tau any; sft_weight >= 0.
    """

    name: ClassVar[str] = "leanpo"
    beta: float = option(2.0, low=0, open_="l")
    gamma: float = option(0.5, low=0)
    label_smoothing: float = option(0.1, low=0, high=1, open_="h")
    tau: float = option(0.5)
    sft_weight: float = option(0.5, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        a_w, a_l = sums.mean_logp[batch.chosen], sums.mean_logp[rejected_of(batch)]
        d = a_w - a_l
        e = self.label_smoothing * (d.detach() < self.tau).to(d.dtype)
        z = self.beta * d
        losses = -(1 - e) * log_sigmoid(z - self.gamma) - e * log_sigmoid(-z - self.gamma)
        return losses, self.beta * a_w, self.beta * a_l, {"smoothed": (e > 0).to(d.dtype)}


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """½ [ w_d (1 - s(β (D_w - z))) + w_u (1 - s(β (z - D_l))) ], z = max(0, mean of ``kl_logratio``), detached.

    ``kl_logratio`` [M] (any M >= 1) is D of mismatched completions, summed per sequence; average it over ranks first
    when there are several. The half makes the mean over pairs the mean over examples, as TRL's.
    Source: Ethayarajh et al. 2402.01306, TRL's KTO trainer. Rewards are β·D.
    Options: beta > 0; desirable_weight, undesirable_weight >= 0.
    """

    name: ClassVar[str] = "kto"
    needs_reference: ClassVar[bool] = True
    extra_inputs: ClassVar[tuple[str, ...]] = ("kl_logratio",)
    beta: float = option(0.1, low=0, open_="l")
    desirable_weight: float = option(1.0, low=0)
    undesirable_weight: float = option(1.0, low=0)

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        d_w, d_l = sums.D[batch.chosen], sums.D[rejected_of(batch)]
        if extra["kl_logratio"].numel() == 0:
            raise ValueError("objective 'kto' needs at least one value in kl_logratio")
        z = extra["kl_logratio"].detach().to(d_w.dtype).mean().clamp(min=0)
        chosen = self.desirable_weight * (1 - torch.sigmoid(self.beta * (d_w - z)))
        rejected = self.undesirable_weight * (1 - torch.sigmoid(self.beta * (z - d_l)))
        return (chosen + rejected) / 2, self.beta * d_w, self.beta * d_l, {"kl/batch": z.expand_as(d_w)}


@dataclass(frozen=True, kw_only=True)
class SFT(Objective):
    """NLL(y): mean over the answer's tokens, one loss per record in ``batch.chosen``; ``batch.rejected`` is not read.

    TRL's ``sft`` averages over the tokens of the micro-batch: the same for one record, or for equal lengths.
    No rewards: both are zeros. No options.
    """

    name: ClassVar[str] = "sft"

    def _losses(self, sums: Sums, logp: Tensor, batch: BranchBatch, extra: dict[str, Any]) -> Parts:
        nll = -sums.mean_logp[batch.chosen]
        zeros = torch.zeros_like(nll)
        return nll, zeros, zeros, {"nll/chosen": nll}
