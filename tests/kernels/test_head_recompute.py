"""The two-pass head against float64: a head that trains, a bias, a softcap, and the exact gradient of small KLs.

Sizes: N of 0, 1, 2 and around 128 (more than one block of rows), V below, at and above the slice width and never a
multiple of it. Errors are measured against those of the plain way in the same dtype: logits from one linear layer in
the dtype of its inputs, and autograd.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempo_kernels import pairs, sweep
from tempo_kernels.head import head_statistics, linear_logp
from tempo_kernels.oracle import Gradients, oracle, oracle_gradients

SLICE = 64
RAGGED = 5 * SLICE + 7
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SLICE", SLICE)
    monkeypatch.setattr(sweep, "ROWS", 96)


def make(
    n: int, v: int, *, d: int = 24, scale: float = 1.0, drift: float = 0.05, seed: int = 0, dtype=torch.float32
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, d, generator=g)
    hidden = ref + drift * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * scale / math.sqrt(d)
    bias = torch.randn(v, generator=g)
    return {
        "hidden": hidden.to(dtype), "weight": weight.to(dtype), "bias": bias.to(dtype), "reference": ref.to(dtype),
        "labels": torch.randint(0, v, (n,), generator=g), "d_logp": torch.randn(n, generator=g),
        "d_kl": torch.randn(n, generator=g),
    }  # fmt: skip


def truth_of(x: dict[str, Any], softcap: float | None) -> Gradients:
    return oracle_gradients(
        x["hidden"], x["weight"], x["labels"], x["d_logp"], x["d_kl"],
        bias=x["bias"], softcap=softcap, reference=x["reference"],
    )  # fmt: skip


def found_by(x: dict[str, Any], softcap: float | None, plainly: bool = False, **options: Any) -> Gradients:
    kept = (x["hidden"], x["weight"], x["bias"])
    hidden, weight, bias = (None if t is None else t.clone().requires_grad_() for t in kept)
    if plainly:
        out = plain(hidden, weight, bias, x["labels"], x["reference"], softcap)
    else:
        out = linear_logp(
            hidden, weight, x["labels"], bias=bias, softcap=softcap, reference=x["reference"], **options
        )  # fmt: skip
    loss = (x["d_logp"] * out[0]).sum() + (x["d_kl"] * out[3]).sum()
    found = torch.autograd.grad(loss, [t for t in (hidden, weight, bias) if t is not None])
    return Gradients(*out, *found, *(() if bias is not None else (None,)))


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ref: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def scores(rows: Tensor) -> Tensor:
        z = torch.nn.functional.linear(rows, weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z if z.dtype == torch.float64 else z.float()

    z, ref_z = scores(hidden), scores(ref).detach()
    lse = torch.logsumexp(z, -1)
    log_p, log_q = z - lse[:, None], torch.log_softmax(ref_z, -1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    pick = labels[:, None]
    return log_p.gather(1, pick)[:, 0], lse, log_q.gather(1, pick)[:, 0], kl


def errors(found: Gradients, truth: Gradients) -> dict[str, Tensor]:
    """Largest error of each row, absolute."""
    out = {}
    for name, true in truth._asdict().items():
        if true is not None and true.numel():
            out[name] = (getattr(found, name).double() - true).abs().reshape(true.shape[0], -1).amax(1)
    return out


def assert_as_exact_as_plain(x: dict[str, Any], softcap: float | None = None, **options: Any) -> None:
    """Each value and gradient errs at most twice what the plain way errs, in its worst row and on average, plus a few
    roundings of float32 sums and of the result's own dtype."""
    truth = truth_of(x, softcap)
    ours, theirs = errors(found_by(x, softcap, **options), truth), errors(found_by(x, softcap, plainly=True), truth)
    sums = torch.finfo(torch.float64 if x["hidden"].dtype == torch.float64 else torch.float32).eps
    for name, error in ours.items():
        true = getattr(truth, name)
        size = (truth.lse if name == "kl" else true).abs().max().item()
        rounding = torch.finfo(x["hidden"].dtype).eps if name.startswith("d_") else 0.0
        if name == "d_hidden":  # a sum over V words whose terms cancel
            size = max(size, x["weight"].double().abs().max().item())
        allowed = 16 * sums * size + rounding * true.abs().max().item()
        assert error.max() <= 2 * theirs[name].max() + allowed, (name, error.max(), theirs[name].max(), allowed)
        assert error.mean() <= 2 * theirs[name].mean() + allowed, (name, error.mean(), theirs[name].mean(), allowed)


@pytest.mark.parametrize("n", [1, 2, 127, 129])
@pytest.mark.parametrize("v", [SLICE - 1, SLICE, SLICE + 1, RAGGED])
def test_values_and_all_gradients(n: int, v: int) -> None:
    assert_as_exact_as_plain(make(n, v, seed=n + v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dtypes_bias_and_softcap(dtype: torch.dtype, softcap: float | None, with_bias: bool) -> None:
    x = make(129, RAGGED, scale=4.0, seed=5, dtype=dtype)
    if not with_bias:
        x["bias"] = None
    assert_as_exact_as_plain(x, softcap, impl="recompute")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_huge_logits(dtype: torch.dtype, softcap: float | None) -> None:
    """Logits beyond ±60, and a later slice that towers over the first: exp(120) is not a float32."""
    x = make(33, RAGGED, scale=25.0, seed=3, dtype=dtype)
    x["hidden"][:, 0] = x["reference"][:, 0] = 1.0
    x["weight"][:SLICE, 0] = -60.0
    x["weight"][SLICE + 3, 0] = 60.0
    assert_as_exact_as_plain(x, softcap)


def test_tiny_logits() -> None:
    assert_as_exact_as_plain(make(33, RAGGED, scale=1e-3, seed=4))


def test_a_label_at_each_slice_border() -> None:
    borders = [0, SLICE - 1, SLICE, 2 * SLICE - 1, 2 * SLICE, 3 * SLICE - 1, 3 * SLICE]
    x = make(len(borders), 3 * SLICE + 1, seed=7)
    x["labels"] = torch.tensor(borders)
    assert_as_exact_as_plain(x)
    assert_as_exact_as_plain(x, 2.0)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 8), v=st.integers(1, 200), d=st.integers(1, 9), width=st.integers(1, 70), rows=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_slices_and_blocks_give_the_same_values(n: int, v: int, d: int, width: int, rows: int, seed: int) -> None:
    x = make(n, v, d=d, scale=3.0, seed=seed)
    before, (sweep.SLICE, sweep.ROWS) = (sweep.SLICE, sweep.ROWS), (width, rows)
    try:
        found = found_by(x, None)
    finally:
        sweep.SLICE, sweep.ROWS = before
    for ours, true in zip(found, truth_of(x, None), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=5e-5)


def test_the_two_oracles_agree() -> None:
    x = make(9, RAGGED, scale=3.0, drift=0.5, seed=12, dtype=torch.float64)
    x["bias"] = None
    one, two = oracle(x["hidden"], x["weight"], x["labels"], x["reference"]), truth_of(x, None)
    for name in ("logp", "lse", "ref_logp", "kl"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name))
    d_hidden = x["d_logp"][:, None] * one.d_logp + x["d_kl"][:, None] * one.d_kl
    torch.testing.assert_close(two.d_hidden, d_hidden)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float64")])
def test_hidden_states_and_head_may_have_two_dtypes(dtypes: tuple[str, str]) -> None:
    x = make(9, RAGGED, seed=13)
    x["hidden"], x["weight"] = (x[k].to(getattr(torch, d)) for k, d in zip(("hidden", "weight"), dtypes, strict=True))
    truth, found = truth_of(x, 3.0), found_by(x, 3.0)
    for name, true in truth._asdict().items():
        ours = getattr(found, name)
        rtol = 2 * torch.finfo(ours.dtype).eps + 1e-4
        torch.testing.assert_close(ours.double(), true, rtol=rtol, atol=2e-5)
        assert ours.dtype == (x[name[2:]].dtype if name.startswith("d_") else sweep.sum_dtype(x["weight"]))


def test_no_walk_holds_logits_or_a_float32_copy_of_the_head() -> None:
    n, v, d = 33, 20 * SLICE, 24
    x = make(n, v, d=d, dtype=torch.bfloat16)
    lse = torch.zeros(n)
    walks = {
        "sweep": lambda: sweep.sweep_pair(
            x["hidden"], x["reference"], x["weight"], x["labels"], want_mean=True, want_ref_mean=True
        ),
        "forward": lambda: pairs.pair_forward(
            x["hidden"], x["reference"], x["weight"], x["labels"], x["bias"], 3.0, True
        ),
        "backward": lambda: pairs.pair_backward(
            x["hidden"], x["reference"], x["weight"], x["labels"], x["bias"], 3.0, lse, lse, lse, lse,
            want_hidden=True, want_weight=True, want_bias=True,
        ),
    }  # fmt: skip

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for t in tree_leaves(out):
                if isinstance(t, Tensor) and t.dtype == torch.float32:
                    self.bytes = max(self.bytes, t.untyped_storage().nbytes())
            return out

    for name, walk in walks.items():
        with Largest() as largest:
            walk()
        assert 0 < largest.bytes <= 4 * max(n * SLICE, SLICE * d, n * d, v), name
        assert largest.bytes < 4 * min(n * v, v * d) / 8


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "hidden")])
def test_only_what_trains_gets_a_gradient(trained: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    walk = pairs.pair_backward

    def spy(*arguments: Any, **wanted: Any) -> Any:
        found = walk(*arguments, **wanted)
        asked.append([t is not None for t in found])
        return found

    from tempo_kernels import backend

    monkeypatch.setattr(backend, "TORCH", backend.TORCH._replace(pair_backward=spy))
    x = make(9, RAGGED, seed=8)
    truth = truth_of(x, None)
    tensors = {name: x[name].clone().requires_grad_(name in trained) for name in ("hidden", "weight", "bias")}
    out = linear_logp(
        tensors["hidden"], tensors["weight"], x["labels"], bias=tensors["bias"], reference=x["reference"]
    )  # fmt: skip
    assert out.logp.requires_grad == bool(trained)
    if trained:
        ((x["d_logp"] * out.logp).sum() + (x["d_kl"] * out.kl).sum()).backward()
    for name, tensor in tensors.items():
        if name in trained:
            torch.testing.assert_close(tensor.grad.double(), getattr(truth, f"d_{name}"), rtol=1e-4, atol=1e-5)
        else:
            assert tensor.grad is None
    assert asked == ([[name in trained for name in tensors]] if trained else [])


@pytest.mark.parametrize("kl_only", [True, False])
def test_one_of_two_outputs_may_be_unused(kl_only: bool) -> None:
    x = make(9, RAGGED, seed=9)
    x["d_logp" if kl_only else "d_kl"] = torch.zeros(9)
    truth = truth_of(x, None)
    hidden, weight = x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_()
    out = linear_logp(hidden, weight, x["labels"], bias=x["bias"], reference=x["reference"])
    loss = (x["d_kl"] * out.kl).sum() if kl_only else (x["d_logp"] * out.logp).sum()
    for found, true in zip(torch.autograd.grad(loss, (hidden, weight)), truth[4:6], strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("n", [1, 129])
def test_equal_policy_and_reference_give_exactly_zero(dtype: torch.dtype, softcap: float | None, n: int) -> None:
    x = make(n, RAGGED, scale=4.0, seed=1, dtype=dtype)
    tensors = [x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = tensors
    out = linear_logp(
        hidden, weight, x["labels"], bias=bias, softcap=softcap, reference=hidden.detach().clone(), impl="recompute"
    )  # fmt: skip
    assert torch.equal(out.kl, torch.zeros_like(out.kl)) and torch.equal(out.logp, out.ref_logp)
    for found in torch.autograd.grad((x["d_kl"] * out.kl).sum(), tensors):
        assert torch.equal(found, torch.zeros_like(found))


def test_two_runs_give_equal_bits() -> None:
    x = make(129, RAGGED, seed=2)
    first, second = (found_by(x, 5.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens() -> None:
    x = make(0, 100)
    found = found_by(x, None)
    assert all(value.shape == (0,) for value in found[:4])
    for value, name in zip(found[4:], ("hidden", "weight", "bias"), strict=True):
        assert torch.equal(value, torch.zeros_like(x[name]))


def test_labels_outside_get_a_target_of_zero_and_no_gradient_of_their_own() -> None:
    """What a rank of a vocabulary-parallel head sees of the other ranks' labels."""
    x = make(6, RAGGED, seed=6)
    labels = torch.tensor([-5, -1, 0, RAGGED - 1, RAGGED, 10 * RAGGED])
    inside = torch.tensor([False, False, True, True, False, False])
    logits = x["hidden"] @ x["weight"].T
    for walk in (
        sweep.sweep_head(x["hidden"], x["weight"], labels, want_mean=False),
        pairs.pair_forward(x["hidden"], None, x["weight"], labels, None, None, False),
    ):
        expected = torch.where(inside, logits.gather(1, labels.clamp(0, RAGGED - 1)[:, None])[:, 0], torch.zeros(6))
        torch.testing.assert_close(walk.target, expected)
        assert torch.equal(walk.target[~inside], torch.zeros(4))
    lse = torch.logsumexp(logits, -1)
    d_hidden, _, _ = pairs.pair_backward(
        x["hidden"], None, x["weight"], labels, None, None, lse, None, x["d_logp"], None,
        want_hidden=True, want_weight=False, want_bias=False,
    )  # fmt: skip
    own = torch.where(inside[:, None], x["weight"][labels.clamp(0, RAGGED - 1)], torch.zeros(6, 1))
    mean = torch.softmax(logits, -1) @ x["weight"]
    torch.testing.assert_close(d_hidden, x["d_logp"][:, None] * (own - mean), rtol=1e-4, atol=1e-5)


def test_statistics_through_two_passes_equal_those_of_one() -> None:
    x = make(129, RAGGED, seed=10)
    arguments = (x["reference"], x["weight"], x["labels"])
    for ours, theirs in zip(
        head_statistics(*arguments, impl="recompute"), head_statistics(*arguments, impl="one_pass"), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_cached_statistics_of_a_head_with_a_bias() -> None:
    x = make(129, RAGGED, scale=3.0, drift=0.3, seed=14)
    truth = truth_of(x, None)
    stats = head_statistics(x["reference"], x["weight"], x["labels"], bias=x["bias"])
    hidden = x["hidden"].clone().requires_grad_()
    out = linear_logp(hidden, x["weight"], x["labels"], bias=x["bias"], reference=stats)
    torch.testing.assert_close(out.kl.double(), truth.kl, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(out.ref_logp.double(), truth.ref_logp, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad((x["d_logp"] * out.logp).sum() + (x["d_kl"] * out.kl).sum(), hidden)[0]
    torch.testing.assert_close(found.double(), truth.d_hidden, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("exact_kl", "bound"), [(False, 0.05), (True, 0.005)])
def test_gradient_of_a_small_kl(dtype: torch.dtype, exact_kl: bool, bound: float) -> None:
    """KL of about 1e-3, where logits rounded to bfloat16 leave a gradient that is mostly noise."""
    x = make(33, 4001, d=256, drift=0.045, seed=11, dtype=dtype)
    truth = oracle(x["hidden"], x["weight"], x["labels"], x["reference"])
    assert truth.kl is not None and truth.d_kl is not None and 3e-4 < truth.kl.mean() < 3e-3
    hidden = x["hidden"].clone().requires_grad_()
    out = linear_logp(hidden, x["weight"], x["labels"], reference=x["reference"], exact_kl=exact_kl)
    found = torch.autograd.grad(out.kl.sum(), hidden)[0].double()
    error = (found - truth.d_kl).norm() / truth.d_kl.norm()
    assert error < bound, error


def test_exact_kl_needs_a_live_reference() -> None:
    x = make(5, RAGGED)
    stats = head_statistics(x["reference"], x["weight"], x["labels"])
    with pytest.raises(ValueError, match="live reference"):
        linear_logp(x["hidden"], x["weight"], x["labels"], reference=stats, exact_kl=True)


@pytest.mark.parametrize("trains", [False, True])
def test_backward_under_autocast_sums_in_float32(trains: bool) -> None:
    x = make(5, RAGGED, scale=5.0, seed=17)
    if not trains:
        x["bias"] = None
    tensors = [x["hidden"].requires_grad_(), x["weight"].requires_grad_(trains)]

    def gradients() -> list[Tensor]:
        out = linear_logp(*tensors, x["labels"], bias=x["bias"], reference=x["reference"])
        return list(torch.autograd.grad((out.logp + out.kl).sum(), tensors[: 1 + trains]))

    plainly = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plainly, inside, strict=True))
