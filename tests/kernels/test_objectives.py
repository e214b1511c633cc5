"""Every objective against its formula written a second time, as loops over python floats, and finite differences.

The batch: 5 answers of ragged lengths, tokens in shuffled order, one chosen answer shared by three pairs and a fourth
pair of its own, so that token order, sharing and lengths all matter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_kernels.objectives import ALIASES, OBJECTIVES, BranchBatch, ObjectiveOutput, make_objective

CHOSEN, REJECTED = [0, 0, 0, 4], [1, 2, 3, 2]
LENGTHS = [5, 3, 7, 1, 4]


def make_batch(seed: int = 0, spans: bool = True) -> tuple[Tensor, Tensor, Tensor, BranchBatch]:
    g = torch.Generator().manual_seed(seed)
    branch = torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS))
    branch = branch[torch.randperm(len(branch), generator=g)]
    n = len(branch)
    logp = -3 * torch.rand(n, generator=g, dtype=torch.float64) - 0.05
    ref = logp + 0.7 * torch.randn(n, generator=g, dtype=torch.float64)
    kl = torch.rand(n, generator=g, dtype=torch.float64)
    marks = torch.randint(0, 3, (n,), generator=g) if spans else None
    return logp, ref, kl, BranchBatch(branch, 5, torch.tensor(CHOSEN), torch.tensor(REJECTED), spans=marks)


def mark_pairs(batch: BranchBatch, seed: int) -> BranchBatch:
    """The batch with chosen marks of each pair's own, in random order; the first pair has none."""
    g = torch.Generator().manual_seed(seed)
    rows = [
        (q, t, int(torch.randint(1, 4, (1,), generator=g)))
        for q, w in enumerate(CHOSEN)
        for t, b in enumerate(batch.branch.tolist())
        if q and b == w and torch.rand(1, generator=g) < 0.6
    ]
    marks = torch.tensor(rows)[torch.randperm(len(rows), generator=g)]
    return dataclasses.replace(batch, pair_spans=marks)


def only_pair(batch: BranchBatch, q: int) -> tuple[Tensor, BranchBatch]:
    """The tokens [n] of one pair, and a batch of that pair alone whose marks are all in ``spans``."""
    w, v = CHOSEN[q], REJECTED[q]
    assert batch.spans is not None
    marks = batch.spans.clone()
    if batch.pair_spans is not None:
        marks[batch.branch == w] = 0
        for pair, token, k in batch.pair_spans.tolist():
            if pair == q:
                marks[token] = k
    keep = ((batch.branch == w) | (batch.branch == v)).nonzero()[:, 0]
    branch = (batch.branch[keep] == v).long()
    return keep, BranchBatch(branch, 2, torch.tensor([0]), torch.tensor([1]), marks[keep])


EXTRA: dict[str, dict[str, Any]] = {
    "kto": {"kl_logratio": torch.tensor([0.9, -0.2, 0.5], dtype=torch.float64)},
    "dpa": {"anchor_kl": torch.tensor([0.1, 0.4, 0.3], dtype=torch.float64), "anchor_size": 2},
}


# -- the formulas a second time --------------------------------------------------------------------------------------


def log_s(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Answer:
    """One answer's tokens as python floats."""

    def __init__(self, b: int, logp: Tensor, ref: Tensor, kl: Tensor, batch: BranchBatch) -> None:
        rows = [i for i, x in enumerate(batch.branch.tolist()) if x == b]
        self.lp, self.rf, self.kl = ([t.tolist()[i] for i in rows] for t in (logp, ref, kl))
        self.span = [0 if batch.spans is None else batch.spans.tolist()[i] for i in rows]
        self.n = len(rows)
        self.L, self.R, self.K = sum(self.lp), sum(self.rf), sum(self.kl)
        self.D, self.a = self.L - self.R, self.L / self.n
        self.nll = -self.a
        self.marked = sum(p - q for p, q, k in zip(self.lp, self.rf, self.span, strict=True) if k)

    def phrase(self, k: int) -> float:
        return sum(p for p, i in zip(self.lp, self.span, strict=True) if i == k)

    def weighted(self, c: float, average: bool) -> float:
        weights = [c if k else 1.0 for k in self.span]
        total = sum(x * (p - q) for x, p, q in zip(weights, self.lp, self.rf, strict=True))
        return total / sum(weights) if average else total


def odds(a: float) -> float:
    return a - math.log(1 - math.exp(a))


def dpa(w: Answer, v: Answer, alpha: float) -> float:
    spans = sorted({k for k in w.span + v.span if k})
    ranked = [math.log(1 + math.exp(v.phrase(k) - w.phrase(k))) for k in spans]
    return (sum(ranked) / len(ranked) if ranked else 0.0) + alpha * (0.1 + 0.4 + 0.3) / 2


def leanpo(w: Answer, v: Answer, b: float, gamma: float, ls: float, tau: float, lam: float) -> float:
    d = w.a - v.a
    e = ls if d < tau else 0.0
    return -(1 - e) * log_s(b * d - gamma) - e * log_s(-b * d - gamma) + lam * w.nll


def smoothed(z: float, e: float) -> float:
    return -(1 - e) * log_s(z) - e * log_s(-z)


FORMULAS: list[tuple[str, dict[str, Any], Any]] = [
    ("dpo", {}, lambda w, v: -log_s(0.1 * (w.D - v.D))),
    ("sigmoid", {"beta": 0.4}, lambda w, v: -log_s(0.4 * (w.D - v.D))),
    ("dpo", {"beta": 0.3, "sft_weight": 1.0}, lambda w, v: -log_s(0.3 * (w.D - v.D)) + w.nll),
    ("dpo", {"label_smoothing": 0.2}, lambda w, v: smoothed(0.1 * (w.D - v.D), 0.2)),
    ("cdpo", {"label_smoothing": 0.3}, lambda w, v: smoothed(0.1 * (w.D - v.D), 0.3)),
    (
        "robust",
        {"label_smoothing": 0.2, "sft_weight": 0.5},
        lambda w, v: (-0.8 * log_s(0.1 * (w.D - v.D)) + 0.2 * log_s(-0.1 * (w.D - v.D))) / 0.6 + 0.5 * w.nll,
    ),
    ("ipo", {"beta": 0.2}, lambda w, v: (w.D / w.n - v.D / v.n - 2.5) ** 2),
    ("hinge", {"beta": 0.9}, lambda w, v: max(0.0, 1 - 0.9 * (w.D - v.D))),
    ("simpo", {"label_smoothing": 0.1}, lambda w, v: smoothed(2.0 * (w.a - v.a) - 0.5, 0.1)),
    ("cpo", {"cpo_alpha": 0.7}, lambda w, v: -log_s(0.1 * (w.L - v.L)) + 0.7 * w.nll),
    ("orpo", {"beta": 0.3}, lambda w, v: w.nll - 0.3 * log_s(odds(w.a) - odds(v.a))),
    ("leanpo", {}, lambda w, v: leanpo(w, v, 2.0, 0.5, 0.1, 0.5, 0.5)),
    ("leanpo", {"tau": -0.1, "gamma": 1.0}, lambda w, v: leanpo(w, v, 2.0, 1.0, 0.1, -0.1, 0.5)),
    ("tdpo1", {}, lambda w, v: -log_s(0.1 * (w.D - v.D - (v.K - w.K)))),
    ("tdpo2", {"alpha": 0.7}, lambda w, v: -log_s(0.1 * (w.D - v.D - 0.7 * (v.K - w.K)))),
    ("rrpo", {"beta": 0.5, "alpha": 0.05}, lambda w, v: -log_s(0.5 * (w.marked - v.marked)) + 0.05 * w.K),
    ("ddpo", {}, lambda w, v: -log_s(0.1 * (w.weighted(1.1, False) - v.weighted(1.1, False)))),
    (
        "ddpo",
        {"span_weight": 3.0, "average": True, "beta": 0.5},
        lambda w, v: -log_s(0.5 * (w.weighted(3.0, True) - v.weighted(3.0, True))),
    ),
    ("dpa", {}, lambda w, v: dpa(w, v, 0.4)),
    (
        "kto",
        {"desirable_weight": 1.3, "undesirable_weight": 0.7},
        lambda w, v: (1.3 * (1 - s(0.1 * (w.D - 0.4))) + 0.7 * (1 - s(0.1 * (0.4 - v.D)))) / 2,
    ),
    ("sft", {}, lambda w, v: w.nll),
]


def run(
    name: str, options: dict[str, Any], logp: Tensor, ref: Tensor, kl: Tensor, batch: BranchBatch
) -> ObjectiveOutput:
    return make_objective(name, **options)(logp, ref, kl, batch, **EXTRA.get(name, {}))


@pytest.mark.parametrize(("name", "options", "formula"), FORMULAS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_loss_equals_its_formula(name: str, options: dict[str, Any], formula: Any, seed: int) -> None:
    logp, ref, kl, batch = make_batch(seed)
    answers = [Answer(b, logp, ref, kl, batch) for b in range(5)]
    expected = [formula(answers[w], answers[v]) for w, v in zip(CHOSEN, REJECTED, strict=True)]
    out = run(name, options, logp, ref, kl, batch)
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert out.metrics["logps/chosen"].tolist() == pytest.approx([answers[w].L for w in CHOSEN])
    assert out.metrics["kl/rejected"].tolist() == pytest.approx([answers[v].K for v in REJECTED])
    single = run(name, options, logp.float(), ref.float(), kl.float(), batch)
    assert single.losses.dtype == torch.float32
    assert single.losses.tolist() == pytest.approx(expected, rel=2e-5, abs=2e-6)


def test_every_objective_has_a_formula_here() -> None:
    assert {ALIASES.get(name, name) for name, _, _ in FORMULAS} == set(OBJECTIVES)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, _ in FORMULAS if n not in ("tdpo2",)])
def test_gradients_equal_finite_differences(name: str, options: dict[str, Any]) -> None:
    logp, ref, kl, batch = make_batch(3)

    def losses(logp: Tensor, kl: Tensor) -> Tensor:
        return run(name, options, logp, ref, kl, batch).losses

    assert torch.autograd.gradcheck(losses, (logp.requires_grad_(), kl.requires_grad_()), eps=1e-6, atol=1e-6)


def test_tdpo2_stops_the_gradient_of_the_chosen_kl() -> None:
    """Finite differences with the chosen answers' KL held fixed; and exactly no gradient into it."""
    logp, ref, kl, batch = make_batch(4)
    chosen_only = (batch.branch == 0) | (batch.branch == 4)
    held = kl.clone()

    def losses(logp: Tensor, kl: Tensor) -> Tensor:
        return run("tdpo2", {}, logp, ref, torch.where(chosen_only, held, kl), batch).losses

    assert torch.autograd.gradcheck(losses, (logp.requires_grad_(), kl.requires_grad_()), eps=1e-6, atol=1e-6)
    grad = torch.autograd.grad(run("tdpo2", {}, logp, ref, kl, batch).losses.sum(), kl)[0]
    assert torch.equal(grad[chosen_only], torch.zeros_like(grad[chosen_only]))
    assert (grad[~chosen_only] > 0).all()  # more drift on a rejected answer costs
    grad1 = torch.autograd.grad(run("tdpo1", {}, logp, ref, kl, batch).losses.sum(), kl)[0]
    assert (grad1[chosen_only] < 0).all()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_reference_and_extra_inputs_get_no_gradient(name: str) -> None:
    logp, ref, kl, batch = make_batch(5)
    logp.requires_grad_()
    ref.requires_grad_()
    out = run(name, {}, logp, ref, kl, batch)
    out.losses.sum().backward()
    assert ref.grad is None
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    assert all(not value.requires_grad and value.shape == (4,) for value in out.metrics.values())


@pytest.mark.parametrize("own_marks", [False, True])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_sharing_a_chosen_answer_equals_repeating_it(name: str, own_marks: bool) -> None:
    """One tree of 1 + 3 and a pair against four rows of 1 + 1: same losses, and the shared gradient is the sum.

    With marks of each pair's own, a pair's spans in the chosen answer are nobody else's.
    """
    logp, ref, kl, batch = make_batch(6)
    if own_marks:
        batch = mark_pairs(batch, 6)
    logp.requires_grad_()
    shared = run(name, {}, logp, ref, kl, batch)
    shared_grad = torch.autograd.grad(shared.losses.sum(), logp)[0]
    total = torch.zeros_like(shared_grad)
    for i in range(len(CHOSEN)):
        keep, pair = only_pair(batch, i)
        out = run(name, {}, logp[keep], ref[keep], kl[keep], pair)
        torch.testing.assert_close(out.losses[0], shared.losses[i])
        torch.testing.assert_close(out.chosen_rewards[0], shared.chosen_rewards[i])
        for key, value in out.metrics.items():
            torch.testing.assert_close(value[0], shared.metrics[key][i])
        total += torch.autograd.grad(out.losses.sum(), logp)[0]
    torch.testing.assert_close(shared_grad, total)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, _ in FORMULAS if n in ("rrpo", "ddpo", "dpa")])
def test_marks_of_a_pair_equal_its_formula(name: str, options: dict[str, Any]) -> None:
    formula = next(f for n, o, f in FORMULAS if (n, o) == (name, options))
    logp, ref, kl, batch = make_batch(14)
    batch = mark_pairs(batch, 14)
    out = run(name, options, logp.requires_grad_(), ref, kl, batch)
    for q in range(len(CHOSEN)):
        keep, pair = only_pair(batch, q)
        w, v = (Answer(b, logp[keep], ref[keep], kl[keep], pair) for b in (0, 1))
        assert out.losses[q].item() == pytest.approx(formula(w, v), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: run(name, options, x, ref, kl, batch).losses, (logp,), atol=1e-6)


def test_rrpo_counts_missing_marks_by_pair() -> None:
    logp, ref, kl, batch = make_batch(15)
    batch = mark_pairs(batch, 15)
    batch.spans = torch.where((batch.branch == 0) | (batch.branch == 2), batch.spans, 0)
    assert run("rrpo", {}, logp, ref, kl, batch).metrics["spans/missing"].tolist() == [1.0, 0.0, 0.0, 0.0]


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(OBJECTIVES)), branches=st.permutations(range(5)), seed=st.integers(0, 50))
def test_names_of_branches_and_order_of_tokens_do_not_matter(name: str, branches: list[int], seed: int) -> None:
    logp, ref, kl, batch = make_batch(seed)
    batch = mark_pairs(batch, seed) if seed % 2 else batch
    before = run(name, {}, logp, ref, kl, batch)
    order = torch.randperm(len(logp), generator=torch.Generator().manual_seed(seed))
    rename = torch.tensor(branches)
    assert batch.spans is not None and batch.rejected is not None
    marks = batch.pair_spans
    if marks is not None:
        marks = torch.stack([marks[:, 0], order.argsort()[marks[:, 1]], marks[:, 2]], 1)
    renamed = BranchBatch(
        rename[batch.branch][order], 5, rename[batch.chosen], rename[batch.rejected], batch.spans[order], marks
    )
    after = run(name, {}, logp[order], ref[order], kl[order], renamed)
    torch.testing.assert_close(before.losses, after.losses)
    torch.testing.assert_close(before.chosen_rewards, after.chosen_rewards)
    torch.testing.assert_close(before.rejected_rewards, after.rejected_rewards)


@pytest.mark.parametrize("name", [n for n, c in OBJECTIVES.items() if c.needs_reference])
def test_policy_equal_to_reference_has_no_rewards(name: str) -> None:
    logp, _, kl, batch = make_batch(7)
    out = run(name, {}, logp, logp.clone(), torch.zeros_like(kl), batch)
    assert torch.equal(out.chosen_rewards, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(out.rejected_rewards, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_pair_weights_scale_losses_only(name: str) -> None:
    logp, ref, kl, batch = make_batch(8)
    plain = run(name, {}, logp, ref, kl, batch)
    batch.pair_weight = torch.tensor([0.0, 1.0, 2.0, 0.5])
    weighted = run(name, {}, logp, ref, kl, batch)
    torch.testing.assert_close(weighted.losses, plain.losses * batch.pair_weight.double())
    assert torch.equal(weighted.chosen_rewards, plain.chosen_rewards)


def test_rrpo_without_spans_is_constant_and_counted() -> None:
    logp, ref, kl, batch = make_batch(9)
    batch.spans = torch.where((batch.branch == 0) | (batch.branch == 3), 0, 1)
    out = run("rrpo", {"alpha": 0.1}, logp.requires_grad_(), ref, kl, batch)
    assert out.metrics["spans/missing"].tolist() == [0.0, 0.0, 1.0, 0.0]
    k_w = kl[batch.branch == 0].sum()
    torch.testing.assert_close(out.losses[2], math.log(2) + 0.1 * k_w)
    grad = torch.autograd.grad(out.losses[2], logp)[0]
    assert torch.equal(grad, torch.zeros_like(grad))


def test_rrpo_touches_only_marked_tokens() -> None:
    logp, ref, kl, batch = make_batch(10)
    grad = torch.autograd.grad(run("rrpo", {}, logp.requires_grad_(), ref, kl, batch).losses.sum(), logp)[0]
    assert batch.spans is not None
    assert torch.equal(grad != 0, batch.spans > 0)


def test_ddpo_takes_given_token_weights() -> None:
    logp, ref, kl, batch = make_batch(11)
    by_span = run("ddpo", {"span_weight": 2.5}, logp, ref, kl, batch)
    assert batch.spans is not None
    batch.weights, batch.spans = torch.where(batch.spans > 0, 2.5, 1.0), None
    torch.testing.assert_close(run("ddpo", {}, logp, ref, kl, batch).losses, by_span.losses)


def test_kto_clamps_its_batch_mean_at_zero() -> None:
    logp, ref, kl, batch = make_batch(12)
    objective = make_objective("kto")
    low = objective(logp, ref, kl, batch, kl_logratio=torch.tensor([-3.0, -1.0]))
    zero = objective(logp, ref, kl, batch, kl_logratio=torch.tensor([0.0]))
    assert torch.equal(low.losses, zero.losses)


def test_dpa_without_spans_keeps_only_the_anchor() -> None:
    logp, ref, kl, batch = make_batch(13)
    batch.spans = torch.zeros_like(batch.branch)
    out = run("dpa", {"alpha": 0.5}, logp, ref, kl, batch)
    torch.testing.assert_close(out.losses, torch.full((4,), 0.2, dtype=torch.float64))
    assert out.metrics["spans/missing"].tolist() == [1.0] * 4


def test_leanpo_smooths_only_pairs_not_yet_apart() -> None:
    branch, chosen, rejected = torch.tensor([0, 1, 2]), torch.tensor([0, 0]), torch.tensor([1, 2])
    out = make_objective("leanpo", tau=0.5)(
        torch.tensor([-1.0, -1.4, -1.6]), None, None, BranchBatch(branch, 3, chosen, rejected)
    )
    assert out.metrics["smoothed"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("mean", [-1e-12, -1e-6, -0.6, -0.8, -90.0])
def test_orpo_stays_finite_at_both_ends(mean: float) -> None:
    logp = torch.tensor([mean, -1.0], requires_grad=True)
    batch = BranchBatch(torch.tensor([0, 1]), 2, torch.tensor([0]), torch.tensor([1]))
    out = make_objective("orpo")(logp, None, None, batch)
    out.losses.sum().backward()
    assert logp.grad is not None and logp.grad.isfinite().all() and out.losses.isfinite().all()


def test_no_pairs_and_no_tokens_give_nothing() -> None:
    empty = torch.zeros(0, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64)
    batch = BranchBatch(ids, 0, ids, ids, spans=ids)
    for name in OBJECTIVES:
        out = make_objective(name)(empty, empty.detach(), empty.detach(), batch, **EXTRA.get(name, {}))
        assert out.losses.shape == (0,)
        out.losses.sum().backward()
