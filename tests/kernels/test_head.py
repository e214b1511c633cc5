"""The loss head against the float64 oracle.

Sizes: N of 1, 2 and around 128 (a row tile's border), V below, at and above the slice width and never a multiple of
it, so that a ragged last slice, a single slice and a slice of one column all occur.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_kernels import head as head_module
from tempo_kernels import sweep
from tempo_kernels.head import HeadOutput, HeadStatistics, head_statistics, linear_logp
from tempo_kernels.oracle import Truth, oracle

SLICE = 64


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SLICE", SLICE)
    monkeypatch.setattr(sweep, "ROWS", 96)


def make(n: int, v: int, d: int = 24, scale: float = 1.0, drift: float = 0.05, seed: int = 0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, d, generator=g)
    hidden = ref + drift * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * scale / math.sqrt(d)
    labels = torch.randint(0, v, (n,), generator=g)
    return hidden.to(dtype), weight.to(dtype), labels, ref.to(dtype)


def gradients(out: HeadOutput, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    d_logp = torch.autograd.grad(out.logp.sum(), hidden, retain_graph=True)[0]
    return d_logp, None if out.kl is None else torch.autograd.grad(out.kl.sum(), hidden, retain_graph=True)[0]


def errors(out: HeadOutput, hidden: Tensor, truth: Truth) -> dict[str, float]:
    """Largest absolute error of each value and gradient."""
    d_logp, d_kl = gradients(out, hidden)
    pairs = {"logp": (out.logp, truth.logp), "lse": (out.lse, truth.lse), "d_logp": (d_logp, truth.d_logp)}
    if out.kl is not None and truth.kl is not None and d_kl is not None and truth.d_kl is not None:
        pairs |= {"kl": (out.kl, truth.kl), "d_kl": (d_kl, truth.d_kl)}
    return {key: (a.double() - b).abs().max().item() for key, (a, b) in pairs.items()}


def assert_close_to_truth(hidden: Tensor, weight: Tensor, labels: Tensor, ref: Tensor, factor: float = 2.0) -> None:
    """one_pass may err ``factor`` times what eager errs in the same dtype, plus a few roundings of the values' size."""
    truth = oracle(hidden, weight, labels, ref)
    hidden = hidden.clone().requires_grad_()
    eager = errors(linear_logp(hidden, weight, labels, reference=ref, impl="eager"), hidden, truth)
    stats = head_statistics(ref, weight, labels)
    size = {key: getattr(truth, key).abs().max().item() for key in eager}
    size["kl"] = size["lse"]  # a difference of sums of this size
    size["d_kl"] = size["d_logp"] = weight.double().abs().max().item()
    for reference in (ref, stats):
        ours = errors(linear_logp(hidden, weight, labels, reference=reference, impl="one_pass"), hidden, truth)
        for key, error in ours.items():
            allowed = factor * eager[key] + 8 * torch.finfo(torch.float32).eps * size[key]
            assert error <= allowed, (key, error, eager[key], size[key])


@pytest.mark.parametrize("n", [1, 2, 127, 129])
@pytest.mark.parametrize("v", [SLICE - 1, SLICE, SLICE + 1, 5 * SLICE + 7])
def test_one_pass_is_as_exact_as_eager(n: int, v: int) -> None:
    assert_close_to_truth(*make(n, v, seed=n + v))


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_tiny_and_huge_logits(scale: float) -> None:
    assert_close_to_truth(*make(33, 5 * SLICE + 7, scale=scale, seed=3))


def test_the_offset_moves_when_a_later_slice_towers_over_the_first() -> None:
    """Logits of -60 in the first slice and +60 in a later one: exp(120) is not a float32."""
    n, d, v = 5, 4, 3 * SLICE + 5
    hidden = torch.zeros(n, d)
    hidden[:, 0] = 1.0
    weight = torch.randn(v, d, generator=torch.Generator().manual_seed(0)) * 1e-2
    weight[:SLICE, 0] = -60.0
    weight[SLICE + 3, 0] = 60.0
    weight[-1, 0] = 59.0
    labels = torch.tensor([0, SLICE + 3, v - 1, SLICE, 1])
    assert_close_to_truth(hidden, weight, labels, hidden + 1e-3)


def test_small_logits_in_a_ragged_vocabulary_get_no_phantom_columns() -> None:
    """Zero-filled columns beyond V would add e^0 each to a sum of e^-30 each."""
    hidden, weight = torch.ones(3, 2), torch.full((SLICE + 1, 2), -15.0)
    out = linear_logp(hidden, weight, torch.tensor([0, 5, SLICE]), impl="one_pass")
    torch.testing.assert_close(out.lse, torch.full((3,), -30.0 + math.log(SLICE + 1)))
    torch.testing.assert_close(out.logp, torch.full((3,), -math.log(SLICE + 1)))


def test_labels_on_slice_borders() -> None:
    v = 3 * SLICE + 1
    labels = torch.tensor([0, SLICE - 1, SLICE, 2 * SLICE - 1, 2 * SLICE, 3 * SLICE - 1, 3 * SLICE])
    hidden, weight, _, ref = make(len(labels), v, seed=7)
    assert_close_to_truth(hidden, weight, labels, ref)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 8), v=st.integers(1, 200), d=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 99)
)
def test_any_slice_width_gives_the_same_values(n: int, v: int, d: int, width: int, seed: int) -> None:
    hidden, weight, labels, ref = make(n, v, d, scale=3.0, seed=seed)
    truth = oracle(hidden, weight, labels, ref)
    before, sweep.SLICE = sweep.SLICE, width
    try:
        out = linear_logp(hidden.requires_grad_(), weight, labels, reference=ref, impl="one_pass")
        d_logp, d_kl = gradients(out, hidden)
    finally:
        sweep.SLICE = before
    for ours, true in ((out.logp, truth.logp), (out.kl, truth.kl), (d_logp, truth.d_logp), (d_kl, truth.d_kl)):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("impl", ["eager", "one_pass"])
def test_bfloat16_inputs_are_summed_in_float32(impl: str) -> None:
    """Logits rounded to bfloat16 would err by 2^-9 of their size; from the same bfloat16 inputs we err 1000x less."""
    hidden, weight, labels, ref = make(17, 5 * SLICE + 7, scale=8.0, seed=5, dtype=torch.bfloat16)
    truth = oracle(hidden, weight, labels, ref)
    hidden.requires_grad_()
    out = linear_logp(hidden, weight, labels, reference=ref, impl=impl)
    assert out.logp.dtype == out.lse.dtype == torch.float32
    assert out.kl is not None and truth.kl is not None and truth.d_kl is not None
    assert (out.logp.double() - truth.logp).abs().max() < 1e-4
    assert (out.kl.double() - truth.kl).abs().max() < 1e-4
    d_logp, d_kl = gradients(out, hidden)
    assert d_logp.dtype == torch.bfloat16 and d_kl is not None
    assert (d_logp.double() - truth.d_logp).norm() < 5e-3 * truth.d_logp.norm()  # only the result is rounded
    assert (d_kl.double() - truth.d_kl).norm() < 5e-3 * truth.d_kl.norm()


def test_float64_inputs_stay_float64() -> None:
    hidden, weight, labels, ref = make(6, 2 * SLICE + 3, seed=2, dtype=torch.float64)
    truth = oracle(hidden, weight, labels, ref)
    hidden.requires_grad_()
    for impl in ("eager", "one_pass"):
        found = errors(linear_logp(hidden, weight, labels, reference=ref, impl=impl), hidden, truth)
        assert max(found.values()) < 1e-12


@pytest.mark.parametrize("drift", [1e-3, 1e-2, 1e-1])
def test_small_kl_keeps_its_gradient(drift: float) -> None:
    """KL from about 1e-6 to 1e-2; the relative error of its gradient is what training feels."""
    hidden, weight, labels, ref = make(16, 1000, d=32, scale=2.0, drift=drift, seed=11)
    truth = oracle(hidden, weight, labels, ref)
    assert truth.d_kl is not None
    hidden.requires_grad_()
    for impl in ("eager", "one_pass"):
        d_kl = gradients(linear_logp(hidden, weight, labels, reference=ref, impl=impl), hidden)[1]
        assert d_kl is not None
        assert (d_kl.double() - truth.d_kl).norm() < 1e-3 * truth.d_kl.norm()


@pytest.mark.parametrize("impl", ["eager", "one_pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 129])
def test_equal_policy_and_reference_give_exactly_zero(impl: str, dtype: torch.dtype, n: int) -> None:
    hidden, weight, labels, _ = make(n, 5 * SLICE + 7, scale=4.0, seed=1, dtype=dtype)
    hidden.requires_grad_()
    references: list[Tensor | HeadStatistics] = [hidden.detach().clone()]
    if impl == "one_pass":
        references.append(head_statistics(hidden.detach(), weight, labels))
    for reference in references:
        out = linear_logp(hidden, weight, labels, reference=reference, impl=impl)
        assert out.kl is not None and out.ref_logp is not None
        assert torch.equal(out.kl, torch.zeros_like(out.kl))
        assert torch.equal(out.logp, out.ref_logp)
        assert torch.equal(gradients(out, hidden)[1], torch.zeros_like(hidden))


def test_cached_statistics_equal_the_live_reference() -> None:
    hidden, weight, labels, ref = make(129, 5 * SLICE + 7, seed=4)
    hidden.requires_grad_()
    live = linear_logp(hidden, weight, labels, reference=ref, impl="one_pass")
    cached = linear_logp(hidden, weight, labels, reference=head_statistics(ref, weight, labels), impl="one_pass")
    for a, b in zip(live, cached, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(gradients(live, hidden), gradients(cached, hidden), strict=True))


def test_statistics_of_single_tokens_can_be_joined() -> None:
    """The store keeps answers apart and joins them in another order and another batch."""
    hidden, weight, labels, ref = make(7, 2 * SLICE + 9, seed=6)
    parts = [head_statistics(ref[i : i + 1], weight, labels[i : i + 1]) for i in range(7)]
    joined = HeadStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))
    whole = linear_logp(hidden, weight, labels, reference=ref)
    ours = linear_logp(hidden, weight, labels, reference=joined)
    torch.testing.assert_close(ours.kl, whole.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.ref_logp, whole.ref_logp)


def test_two_runs_give_equal_bits() -> None:
    hidden, weight, labels, ref = make(129, 5 * SLICE + 7, seed=8)
    hidden.requires_grad_()
    runs = []
    for _ in range(2):
        out = linear_logp(hidden, weight, labels, reference=ref, impl="one_pass")
        runs.append((*out, *gradients(out, hidden)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("impl", ["eager", "one_pass"])
def test_no_tokens(impl: str) -> None:
    hidden, weight, labels, ref = make(0, 100)
    hidden.requires_grad_()
    out = linear_logp(hidden, weight, labels, reference=ref, impl=impl)
    assert all(value is not None and value.shape == (0,) for value in out)
    (out.logp.sum() + out.kl.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_per_token_coefficients_reach_the_gradient() -> None:
    """A late, per-token weight (what DPO needs) scales each row; lse is not differentiable."""
    hidden, weight, labels, ref = make(9, 150, seed=12)
    truth = oracle(hidden, weight, labels, ref)
    assert truth.d_kl is not None
    c, k = torch.randn(9), torch.randn(9)
    hidden.requires_grad_()
    for impl in ("eager", "one_pass"):
        out = linear_logp(hidden, weight, labels, reference=ref, impl=impl)
        assert not out.lse.requires_grad
        assert out.ref_logp is not None and not out.ref_logp.requires_grad and out.kl is not None
        found = torch.autograd.grad((c * out.logp).sum() + (k * out.kl).sum(), hidden)[0]
        expected = c[:, None].double() * truth.d_logp + k[:, None].double() * truth.d_kl
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["eager", "recompute"])
def test_bias_and_softcap_match_plain_torch(impl: str) -> None:
    hidden, weight, labels, ref = make(8, 90, scale=4.0, seed=13, dtype=torch.float64)
    bias, cap = torch.randn(90, dtype=torch.float64), 5.0
    hidden.requires_grad_()
    weight.requires_grad_()
    bias.requires_grad_()
    out = linear_logp(hidden, weight, labels, bias=bias, softcap=cap, reference=ref, impl=impl)
    log_p = torch.log_softmax(cap * torch.tanh((hidden @ weight.T + bias) / cap), -1)
    log_q = torch.log_softmax(cap * torch.tanh((ref @ weight.T + bias) / cap), -1).detach()
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(out.logp, log_p[range(8), labels])
    torch.testing.assert_close(out.kl, kl)
    ours = torch.autograd.grad(out.logp.sum() + 2 * out.kl.sum(), (hidden, weight, bias))
    plain = torch.autograd.grad(log_p[range(8), labels].sum() + 2 * kl.sum(), (hidden, weight, bias))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_with_a_bias_give_the_live_kl() -> None:
    hidden, weight, labels, ref = make(5, 70, scale=3.0, seed=14, dtype=torch.float64)
    bias = torch.randn(70, dtype=torch.float64)
    stats = head_statistics(ref, weight, labels, bias=bias)
    live = linear_logp(hidden, weight, labels, bias=bias, reference=ref)
    cached = linear_logp(hidden, weight, labels, bias=bias, reference=stats)
    torch.testing.assert_close(cached.kl, live.kl)
    torch.testing.assert_close(cached.ref_logp, live.ref_logp)


def test_scalars_only_statistics_skip_the_kl() -> None:
    hidden, weight, labels, ref = make(5, 70, seed=15)
    full, scalars = head_statistics(ref, weight, labels), head_statistics(ref, weight, labels, kl=False)
    assert scalars.mean_logit is None and scalars.mean_embedding is None
    assert torch.equal(full.logp, scalars.logp) and torch.equal(full.lse, scalars.lse)
    out = linear_logp(hidden, weight, labels, reference=scalars)
    assert out.kl is None and torch.equal(out.ref_logp, full.logp)
    assert linear_logp(hidden, weight, labels, reference=ref, kl=False).kl is None


def test_a_trained_head_gets_its_gradient() -> None:
    hidden, weight, labels, _ = make(5, 70, seed=16, dtype=torch.float64)
    weight.requires_grad_()
    out = linear_logp(hidden, weight, labels)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(
        torch.autograd.grad(-out.logp.sum(), weight)[0], torch.autograd.grad(expected, weight)[0]
    )


def test_under_autocast_sums_stay_float32() -> None:
    hidden, weight, labels, ref = make(5, 200, scale=5.0, seed=17)
    plain = linear_logp(hidden, weight, labels, reference=ref)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_logp(hidden, weight, labels, reference=ref)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_no_grad_skips_the_gradient_walk() -> None:
    hidden, weight, labels, _ = make(5, 200, seed=18)
    hidden.requires_grad_()
    with torch.no_grad():
        out = linear_logp(hidden, weight, labels, impl="one_pass")
    assert not out.logp.requires_grad
    torch.testing.assert_close(out.logp, linear_logp(hidden, weight, labels, impl="eager").logp.detach())


def test_the_backward_keeps_neither_head_nor_logits() -> None:
    """Under ZeRO-3 the head is gone when the backward comes."""
    n, v, d = 5, 3 * SLICE + 1, 7
    hidden, weight, labels, ref = make(n, v, d, seed=19)
    kept = []

    def keep(value: Tensor) -> Tensor:
        kept.append(tuple(value.shape))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        linear_logp(hidden.requires_grad_(), weight, labels, reference=ref, impl="one_pass")
    assert kept == [(n, d), (n, d)]


def test_auto_says_once_which_path_and_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_said", set())
    hidden, weight, labels, _ = make(3, 20)
    with caplog.at_level(logging.INFO, logger="tempo_kernels.head"):
        for _ in range(3):
            linear_logp(hidden, weight, labels)
        linear_logp(hidden, weight, labels, softcap=30.0)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "one_pass" in lines[0] and "frozen" in lines[0]
    assert "recompute" in lines[1] and "soft-capped" in lines[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"impl": "one_pass", "exact_kl": True, "reference": torch.zeros(3, 24)}, "exact_kl"),
        ({"vocab_start": 3}, "group"),
        ({"impl": "fast"}, "one_pass"),
        ({"impl": "one_pass", "softcap": 5.0}, "soft-capped"),
        ({"impl": "one_pass", "bias": torch.zeros(20)}, "bias"),
        ({"impl": "one_pass", "weight": torch.zeros(20, 24, requires_grad=True)}, "trains"),
        ({"weight": torch.zeros(0)}, "gathered"),
        ({"weight": torch.nn.Linear(24, 20)}, "head.weight"),
        ({"labels": torch.tensor([0, 1, 20])}, "0..19"),
        ({"labels": torch.tensor([0, 1, -100])}, "gather"),
        ({"labels": torch.tensor([0, 1])}, "labels"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0])}, "integer"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"softcap": 0.0}, "softcap"),
        ({"reference": torch.zeros(2, 24)}, "reference"),
        ({"reference": 3}, "HeadStatistics"),
        ({"reference": HeadStatistics(torch.zeros(2), torch.zeros(3))}, "reference.logp"),
        ({"reference": HeadStatistics(torch.zeros(3), torch.zeros(3), torch.zeros(3))}, "only one"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(change: dict, words: str) -> None:
    hidden, weight, labels, _ = make(3, 20)
    arguments = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=words):
        linear_logp(**arguments)


def test_cached_kl_is_refused_for_a_trained_or_capped_head() -> None:
    hidden, weight, labels, ref = make(3, 20)
    stats = head_statistics(ref, weight, labels)
    with pytest.raises(ValueError, match="softcap"):
        linear_logp(hidden, weight, labels, softcap=5.0, reference=stats)
    with pytest.raises(ValueError, match="softcap"):
        head_statistics(ref, weight, labels, softcap=5.0)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        linear_logp(hidden, weight, labels, reference=stats)
    assert linear_logp(hidden, weight, labels, reference=stats, kl=False).ref_logp is not None
