"""torch.compile and activation checkpointing work through the loss head: operators that are opaque, with fake twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tempo_kernels import one_pass, recompute, sweep
from tempo_kernels.head import HeadStatistics, head_statistics, linear_logp

N, V, D = 11, 149, 16
CASES = ["plain", "live", "cached", "exact", "capped", "trained"]


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SLICE", 64)
    monkeypatch.setattr(sweep, "ROWS", 8)


def make(case: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """The tensors that may take gradients (hidden, weight, bias), labels, and the options of the case."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g)
    weight = torch.randn(V, D, generator=g) / math.sqrt(D)
    bias = torch.randn(V, generator=g)
    labels = torch.randint(0, V, (N,), generator=g)
    ref = hidden + 0.1 * torch.randn(N, D, generator=g)
    options: dict[str, Any] = {
        "plain": {},
        "live": {"reference": ref},
        "cached": {"reference": head_statistics(ref, weight, labels)},
        "exact": {"reference": ref, "exact_kl": True},
        "capped": {"reference": ref, "softcap": 3.0},
        "trained": {"reference": ref},
    }[case]
    trains = case == "trained"
    return [hidden.requires_grad_(), weight.requires_grad_(trains), bias.requires_grad_(trains)], labels, options


def loss_of(tensors: list[Tensor], labels: Tensor, trains: bool, options: dict[str, Any]) -> Tensor:
    """A loss with a late coefficient per token, as preference objectives have; something before the head as well."""
    hidden, weight, bias = tensors
    out = linear_logp(torch.sin(hidden), weight, labels, bias=bias if trains else None, **options)
    loss = torch.nn.functional.softplus(-3 * out.logp.cumsum(0)).sum()
    if out.ref_logp is not None:
        loss = loss + (out.logp - out.ref_logp).square().sum()
    return loss if out.kl is None else loss + 2 * out.kl.sum()


def value_and_gradients(function: Any, case: str) -> list[Tensor]:
    tensors, labels, options = make(case)
    loss = function(tensors, labels, case == "trained", options)
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in tensors if t.requires_grad])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["eager", "aot_eager"])
def test_compiles_without_a_break(case: str, engine: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=engine)
    plain, ours = value_and_gradients(loss_of, case), value_and_gradients(compiled, case)
    assert len(ours) == (4 if case == "trained" else 2)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activations_may_be_checkpointed(case: str, reentrant: bool) -> None:
    def checkpointed(*arguments: Any) -> Tensor:
        tensors, *rest = arguments
        return checkpoint(lambda *t: loss_of(list(t), *rest), *tensors, use_reentrant=reentrant)

    for a, b in zip(value_and_gradients(loss_of, case), backward_of(checkpointed, case), strict=True):
        assert torch.equal(a, b)


def backward_of(function: Any, case: str) -> list[Tensor]:
    """As value_and_gradients by .backward(), which the reentrant kind needs."""
    tensors, labels, options = make(case)
    loss = function(tensors, labels, case == "trained", options)
    loss.backward()
    return [loss.detach(), *(t.grad for t in tensors if t.grad is not None)]


@pytest.mark.parametrize("case", CASES)
def test_a_second_derivative_is_refused(case: str) -> None:
    tensors, labels, options = make(case)
    first = torch.autograd.grad(loss_of(tensors, labels, case == "trained", options), tensors[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_the_operators_hold_what_they_declare() -> None:
    """Fake shapes and dtypes equal the real ones, nothing aliases, and the backward traces with unknown sizes."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    (hidden, weight, bias), labels, _ = make("trained")
    frozen, ref = weight.detach(), hidden.detach() + 0.1
    stats = head_statistics(ref, frozen, labels)
    kept = (stats.lse, stats.mean_logit, stats.mean_embedding)
    none = (None, None, None)
    for want in (False, True):
        torch.library.opcheck(one_pass._statistics, (ref, frozen, labels, want, "", 0), test_utils=tests)
    for reference in (none, kept):
        arguments = (hidden, frozen, labels, None, *reference, reference is kept, True, "", 0)
        torch.library.opcheck(one_pass._one_pass, arguments, test_utils=tests)
        arguments = (hidden, frozen, bias.detach(), labels, None, None, *reference, reference is kept, "", 0)
        torch.library.opcheck(recompute._recompute, arguments, test_utils=tests)
    arguments = (hidden, frozen, labels, ref, *none, True, True, "", 0)
    torch.library.opcheck(one_pass._one_pass, arguments, test_utils=tests)
    arguments = (hidden, weight, bias, labels, 4.0, ref, *none, True, "", 0)
    torch.library.opcheck(recompute._recompute, arguments, test_utils=tests)
    lse = torch.zeros(N)
    for x in (ref, ref.T.contiguous().T):
        arguments = (x, frozen, bias.detach(), labels, 4.0, ref, None, lse, lse, lse, lse, [True] * 3, "", 0)
        torch.library.opcheck(recompute._recompute_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("impl", ["one_pass", "recompute"])
def test_an_ignored_label_is_seen_where_it_cannot_be_checked(impl: str) -> None:
    """As on a GPU: a compiled graph does not look at labels, and a log-prob of no word must not look like one."""
    torch._dynamo.reset()
    (hidden, weight, _), labels, options = make("live")
    compiled = torch.compile(linear_logp, fullgraph=True, backend="eager")
    good = compiled(hidden, weight, labels, impl=impl, **options)
    wrong = labels.clone()
    wrong[3] = -100
    out = compiled(hidden, weight, wrong, impl=impl, **options)
    stats = torch.compile(head_statistics, fullgraph=True, backend="eager")(hidden, weight, wrong, impl=impl)
    others = torch.arange(N) != 3
    for values, expected in ((out.logp, good.logp), (out.ref_logp, good.ref_logp), (stats.logp, good.logp)):
        assert values[3].isnan() and torch.equal(values[others], expected[others])


def test_statistics_compile() -> None:
    torch._dynamo.reset()
    (hidden, weight, bias), labels, _ = make("plain")
    for head_bias in (None, bias):
        compiled = torch.compile(
            lambda x, b=head_bias: head_statistics(x, weight, labels, bias=b), fullgraph=True, backend="aot_eager"
        )
        plain, ours = head_statistics(hidden, weight, labels, bias=head_bias), compiled(hidden)
        assert isinstance(ours, HeadStatistics)
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
