"""The Triton kernels against float64: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1), else skipped.

Sizes: N around one and around four row tiles of the interpreter (32), V that leaves a ragged last tile and a slice of
one tile, D that fills no whole step, and D whose rows are not multiples of 16 bytes, which TMA cannot read. Errors are
held to those of the plain way in the same dtype. The interpreter's bfloat16 matmul is wrong, so there it is float16.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_kernels import fused, one_pass, recompute
from tempo_kernels.backend import backend
from tempo_kernels.head import HeadOutput, head_statistics, linear_logp
from tempo_kernels.oracle import oracle_gradients

CUDA = torch.cuda.is_available()
if not (CUDA or fused.interpreted()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from tempo_kernels.fused import launch, tiles  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _several_slices_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SLAB_BYTES", 1 << 14)
    monkeypatch.setattr(launch, "ROWS", 256 if CUDA else 96)


def make(n: int, v: int, d: int, dtype: torch.dtype, *, scale: float = 1.0, drift: float = 0.05, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, d, generator=g)
    hidden = ref + drift * torch.randn(n, d, generator=g)
    weight = torch.randn(v, d, generator=g) * scale / math.sqrt(d)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[: min(n, 3)] = torch.tensor([v - 1, 0, min(64, v - 1)])[:n]
    bias = torch.randn(v, generator=g)
    d_logp, d_kl = torch.randn(n, generator=g).to(DEVICE), torch.randn(n, generator=g).to(DEVICE)
    matrices = (t.to(DEVICE, dtype) for t in (hidden, ref, weight, bias))
    return *matrices, labels.to(DEVICE), d_logp, d_kl


def plain(hidden: Tensor, ref: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None):
    """logp and KL the usual way: logits in the dtype of the inputs, then float32."""

    def log_softmax(rows: Tensor) -> Tensor:
        z = torch.nn.functional.linear(rows, weight, bias)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.log_softmax(z.float(), -1)

    log_p, log_q = log_softmax(hidden), log_softmax(ref).detach()
    logp = log_p.gather(1, labels[:, None])[:, 0]
    return HeadOutput(logp, logp, None, (log_q.exp() * (log_q - log_p)).sum(-1))


def check(
    data: tuple[Tensor, ...], *, bias: bool = False, softcap: float | None = None, trains: bool = False,
    kl: bool = True, cached: bool = False, **options: Any,
) -> None:  # fmt: skip
    """Values and gradients err at most twice what the plain way errs, plus a few roundings of float32."""
    hidden, ref, weight, added, labels, d_logp, d_kl = data
    added = added if bias else None
    d_kl = d_kl if kl else torch.zeros_like(d_kl)
    truth = oracle_gradients(hidden, weight, labels, d_logp, d_kl, bias=added, softcap=softcap, reference=ref)

    def errors(way: Any) -> dict[str, float]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        b = None if added is None else added.clone().requires_grad_(trains)
        out = way(x, w, b)
        loss, found = (d_logp * out.logp).sum(), {"logp": out.logp}
        if kl:
            assert out.kl is not None
            loss, found = loss + (d_kl * out.kl).sum(), found | {"kl": out.kl}
        loss.backward()
        found["d_hidden"] = x.grad
        if trains:
            found |= {"d_weight": w.grad} | ({} if b is None else {"d_bias": b.grad})
        return {key: (t.double() - getattr(truth, key)).abs().max().item() for key, t in found.items()}

    assert backend(hidden, weight, ref).name == "triton"
    usual = errors(lambda x, w, b: plain(x, ref, w, b, labels, softcap))
    reference = head_statistics(ref, weight, labels, bias=added) if cached else ref if kl else None
    ours = errors(lambda x, w, b: linear_logp(x, w, labels, bias=b, softcap=softcap, reference=reference, **options))
    lse = truth.lse.abs().max().item()
    size = {"logp": lse, "kl": lse, "d_bias": d_logp.abs().max().item()}
    size["d_hidden"] = 2 * d_logp.abs().max().item() * weight.double().abs().max().item()
    size["d_weight"] = 2 * d_logp.abs().max().item() * hidden.double().abs().max().item()
    for key, error in ours.items():
        allowed = 2 * usual[key] + 16 * torch.finfo(torch.float32).eps * size[key]
        assert error <= allowed, (key, error, usual[key], size[key])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "v", "d"), [(1, 65, 32), (2, 330, 40), (127, 131, 33), (129, 259, 36)])
def test_one_pass_with_a_live_reference(n: int, v: int, d: int, dtype: torch.dtype) -> None:
    check(make(n, v, d, dtype, seed=n), impl="one_pass")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "v", "d"), [(2, 65, 32), (67, 330, 33)])
def test_recompute(n: int, v: int, d: int, dtype: torch.dtype) -> None:
    data = make(n, v, d, dtype, seed=n)
    check(data, impl="recompute", exact_kl=True)
    check(data, impl="recompute", trains=True)
    check(data, impl="recompute", trains=True, bias=True, softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recompute_without_a_live_reference(dtype: torch.dtype) -> None:
    data = make(67, 330, 40, dtype, seed=3)
    check(data, impl="recompute", trains=True, kl=False)
    check(data, impl="recompute", trains=True, kl=False, bias=True, softcap=3.0)
    check(data, impl="recompute", cached=True)
    check(data, impl="recompute", cached=True, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_slices_tiles_and_blocks(dtype: torch.dtype) -> None:
    """Of the tiles of any GPU, too: those have up to 128 rows and 256 columns."""
    data = make(*((300, 1300, 72) if CUDA else (99, 330, 36)), dtype, seed=4)
    check(data, impl="one_pass")
    check(data, impl="recompute", trains=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_that_accumulates(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For matmuls of 16-bit inputs into float32 that the library does not know."""
    monkeypatch.setattr(launch, "_library_accumulates", lambda _: False)
    check(make(65, 330, 40, dtype, seed=6), impl="one_pass")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 12.0])
def test_tiny_and_huge_logits(scale: float, dtype: torch.dtype) -> None:
    """Scale 12 gives logits of about ±60; columns beyond V must not count as logits of 0 beside tiny ones."""
    data = make(33, 131, 32, dtype, scale=scale, seed=5)
    check(data, impl="one_pass")
    check(data, impl="recompute", exact_kl=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_statistics_agree_with_a_live_reference(dtype: torch.dtype) -> None:
    hidden, ref, weight, _, labels, d_logp, d_kl = make(67, 259, 40, dtype, seed=1)
    found = []
    for reference in (ref, head_statistics(ref, weight, labels)):
        x = hidden.clone().requires_grad_()
        out = linear_logp(x, weight, labels, reference=reference, impl="one_pass")
        assert out.kl is not None and out.ref_logp is not None
        ((d_logp * out.logp).sum() + (d_kl * out.kl).sum()).backward()
        found.append((out.logp.detach(), out.ref_logp, out.kl.detach(), x.grad))
    # the two may cut the vocabulary differently, and then differ by rounding: of float32 in values, as stored in means
    rounding = 4 * torch.finfo(dtype).eps
    values = 16 * torch.finfo(torch.float32).eps * found[0][0].abs().max()
    for live, cached in zip(*found, strict=True):
        allowed = values if live.ndim == 1 else rounding * live.abs().max()
        assert (live - cached).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["one_pass", "recompute"])
def test_equal_policy_and_reference_have_no_kl(impl: str, dtype: torch.dtype) -> None:
    hidden, _, weight, _, labels, _, d_kl = make(67, 259, 40, dtype)
    x = hidden.clone().requires_grad_()
    out = linear_logp(x, weight, labels, reference=hidden.clone(), impl=impl, exact_kl=impl == "recompute")
    assert out.kl is not None and torch.equal(out.kl, torch.zeros_like(out.kl))
    assert torch.equal(out.ref_logp, out.logp)
    (d_kl * out.kl).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_far_below_every_other_token(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exponentials overflow at the first offset; the second one must be asked for, and give the same as float64."""
    hidden, ref, weight, _, labels, _, _ = make(70, 330, 32, dtype, seed=2)
    weight[:, 0] = 0.0
    weight[-5:, 0] = 200.0  # beyond the columns that the first offset looks at
    hidden[:, 0] = 1.0
    labels[:] = 3
    data = (hidden, ref, weight, hidden, labels, torch.ones(70, device=DEVICE), torch.zeros(70, device=DEVICE))
    asked = []
    safe = launch._safe_offset
    monkeypatch.setattr(launch, "_safe_offset", lambda *a: asked.append(1) or safe(*a))
    check(data, impl="one_pass")
    assert asked


def test_each_slab_holds_the_rows_that_are_wanted() -> None:
    hidden, ref, weight, _, labels, _, _ = make(67, 259, 40, DTYPES[0])
    both, other = launch.sweep_pair(hidden, ref, weight, labels, want_mean=True, want_ref_mean=True)
    policy, bare = launch.sweep_pair(hidden, ref, weight, labels, want_mean=True, want_ref_mean=False)
    assert bare.mean is None and torch.equal(policy.mean, both.mean) and torch.equal(bare.lse, other.lse)
    none, _ = launch.sweep_pair(hidden, ref, weight, labels, want_mean=False, want_ref_mean=False)
    assert none.mean is None and torch.equal(none.lse, both.lse)


def test_labels_of_another_rank_score_nothing() -> None:
    hidden, ref, weight, _, labels, _, _ = make(67, 259, 40, DTYPES[0])
    moved = labels.clone()
    moved[::2] += weight.shape[0]
    moved[1::4] -= weight.shape[0]
    inside = (moved >= 0) & (moved < weight.shape[0])
    there, here = (launch.sweep_head(hidden, weight, y, want_mean=False).target for y in (labels, moved))
    assert torch.equal(here, torch.where(inside, there, torch.zeros_like(there)))
    stats = launch.pair_forward(hidden, ref, weight, moved, None, None, False)
    assert (stats.target[~inside] == 0).all() and (stats.target[inside] != 0).all()


def test_any_strides() -> None:
    """Labels and biases that are columns of something, a transposed hidden state, one row of a wider matrix."""
    hidden, ref, weight, bias, labels, d_logp, d_kl = make(67, 259, 40, DTYPES[0])

    def column(t: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(t), t], 1)[:, 1]

    def wider(t: Tensor) -> Tensor:
        return torch.cat([t, t[:, :1]], 1)[:, :-1]

    def run(*inputs: Tensor) -> list[Tensor]:
        x, r, y, b, a, c = inputs
        n = x.shape[0]
        x = x.detach().requires_grad_()
        one = linear_logp(x, weight, y, reference=r, impl="one_pass")
        bare = head_statistics(r, weight, y, kl=False)
        two = linear_logp(x, weight, y, bias=b, reference=r, impl="recompute")
        assert one.kl is not None and two.kl is not None
        (grad,) = torch.autograd.grad(a[:n] @ (one.logp + two.logp) + c[:n] @ (one.kl + two.kl), [x])
        return [one.logp, one.kl, bare.logp, two.logp, two.kl, grad]

    vectors = bias, d_logp, d_kl
    for rows in (67, 1):
        x, r, y = hidden[:rows], ref[:rows], labels[:rows]
        plain = run(x, r, y, *vectors)
        strange = (x.T.contiguous().T if rows > 1 else wider(x), wider(r), column(y), *map(column, vectors))
        assert not strange[2].is_contiguous() or rows == 1
        for a, b in zip(plain, run(*strange), strict=True):
            assert (a - b).abs().max() <= 4 * torch.finfo(a.dtype).eps * a.abs().max()


def test_same_bits_every_time() -> None:
    data = make(67, 259, 40, DTYPES[-1])
    hidden, ref, weight, _, labels, d_logp, d_kl = data

    def run() -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        one = linear_logp(x, weight, labels, reference=ref, impl="one_pass")
        two = linear_logp(x, w, labels, reference=ref, impl="recompute")
        assert one.kl is not None and two.kl is not None
        loss = d_logp @ (one.logp + two.logp) + d_kl @ (one.kl + two.kl)
        return [one.logp, one.kl, two.kl, *torch.autograd.grad(loss, [x, w])]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_small_gradients_survive_a_float16_slab() -> None:
    hidden, ref, weight, _, labels, d_logp, _ = make(33, 131, 32, torch.float16)
    stats = launch.pair_forward(hidden, None, weight, labels, None, None, False)

    def gradient(scale: float) -> Tensor:
        found = launch.pair_backward(
            hidden, None, weight, labels, None, None, stats.lse, None, d_logp * scale, None,
            want_hidden=True, want_weight=False, want_bias=False,
        )  # fmt: skip
        return found[0] / scale

    assert (gradient(2.0**-24) - gradient(1.0)).abs().max() <= 1e-5 * gradient(1.0).abs().max()


def test_large_sums_with_small_gradients_fit_into_float16() -> None:
    """A frequent label under large hidden states: its row sums to 300, and to more than 65504 before it is scaled."""
    hidden, _, weight, _, labels, _, _ = make(67, 131, 40, torch.float16, scale=1e-3)
    hidden, labels, d_logp = hidden.abs() + 4000, torch.full_like(labels, 3), torch.full((67,), 1.2e-3, device=DEVICE)
    lse = launch.pair_forward(hidden, None, weight, labels, None, None, False).lse
    wanted = {"want_hidden": False, "want_weight": True, "want_bias": False}
    found = launch.pair_backward(hidden, None, weight, labels, None, None, lse, None, d_logp, None, **wanted)[1]
    truth = oracle_gradients(hidden, weight, labels, d_logp).d_weight
    assert found is not None and (found - truth).abs().max() <= 4 * torch.finfo(found.dtype).eps * truth.abs().max()


def test_the_operators_hold_what_they_declare() -> None:
    """Fake shapes, strides and dtypes are those of the kernels, whatever the layout of the inputs."""
    hidden, ref, weight, bias, labels, _, _ = make(33, 131, 40, DTYPES[0])
    tests, none = ("test_schema", "test_faketensor"), (None, None, None)
    for x in (hidden, hidden.T.contiguous().T):
        torch.library.opcheck(one_pass._statistics, (x, weight, labels, True, "", 0), test_utils=tests)
        torch.library.opcheck(one_pass._one_pass, (x, weight, labels, ref, *none, True, True, "", 0), test_utils=tests)
        arguments = (x, weight, bias, labels, 4.0, ref, *none, True, "", 0)
        torch.library.opcheck(recompute._recompute, arguments, test_utils=tests)
        lse = torch.zeros(33, device=DEVICE)
        arguments = (x, weight, bias, labels, 4.0, ref, None, lse, lse, lse, lse, [True] * 3, "", 0)
        torch.library.opcheck(recompute._recompute_backward, arguments, test_utils=tests)


@pytest.mark.skipif(CUDA, reason="the bench itself runs on a GPU")
def test_tuning_compares_every_candidate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from bench.tune import runs, tune

    table, other = tiles.tile_of("interpreter", "exp_slab"), tiles.Tile(64, 64, 32, 1, 1)
    monkeypatch.setitem(tiles.CANDIDATES, "interpreter", {"exp_slab": (other,)})
    calls = runs(5, 131, 32, "cpu", torch.float32)
    rows, better = tune(list(calls), "interpreter", calls, 1, "cpu")
    assert [r["impl"] for r in rows if r["case"] == "exp_slab"] == ["32x64x32x1x1", "64x64x32x1x1"]
    assert {r["case"] for r in rows} == set(calls) and all(r["ms"] > 0 for r in rows)
    assert better in ({}, {"exp_slab": list(other)}) and tiles.tile_of("interpreter", "exp_slab") == table
    monkeypatch.setattr(tiles, "tuned", lambda: {"exp_slab": other})
    with pytest.raises(ValueError, match=tiles.FILE_VARIABLE):
        tune(list(calls), "interpreter", calls, 1, "cpu")


def test_no_tokens() -> None:
    hidden, ref, weight, bias, labels, _, _ = make(4, 131, 32, DTYPES[0])
    x, w = hidden[:0].clone().requires_grad_(), weight.clone().requires_grad_()
    for head, options in ((weight, {"impl": "one_pass"}), (w, {"impl": "recompute", "bias": bias})):
        out = linear_logp(x, head, labels[:0], reference=ref[:0], **options)
        assert out.kl is not None and out.logp.shape == out.kl.shape == (0,)
        (out.logp.sum() + out.kl.sum()).backward()
    assert w.grad is not None and not w.grad.any()


def test_what_the_kernels_refuse_goes_to_torch() -> None:
    hidden, ref, weight, _, labels, _, _ = make(5, 131, 32, DTYPES[0])
    assert fused.supported(hidden, weight) is None
    assert "float64" in (fused.supported(hidden.double(), weight.double()) or "")
    assert "is torch" in (fused.supported(hidden.double(), weight) or "")
    assert "contiguous" in (fused.supported(hidden, weight.T.contiguous().T) or "")
    mixed = linear_logp(hidden.double(), weight, labels, reference=ref, impl="one_pass")
    assert mixed.logp.dtype == torch.float64
