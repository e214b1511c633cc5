"""Where roundings would add up or fail to cancel: many slices, and the gradient of a KL that is nearly 0."""

from __future__ import annotations

import math

import pytest
import torch

from tempo_kernels import sweep
from tempo_kernels.head import head_statistics, linear_logp
from tempo_kernels.oracle import oracle


@pytest.mark.parametrize("impl", ["one_pass", "recompute"])
def test_a_thousand_slices_err_no_more_than_whole_logits(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slices' sums, added up in float32, would err several times what torch's pairwise sum over a row errs."""
    monkeypatch.setattr(sweep, "SLICE", 32)
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(257, 8, generator=g), torch.randn(32_003, 8, generator=g)
    labels = torch.randint(0, len(weight), (len(hidden),), generator=g)
    truth = torch.logsumexp(hidden.double() @ weight.double().T, -1)

    def error(path: str) -> float:
        found = linear_logp(hidden, weight, labels, impl=path)
        return (found.lse.double() - truth).square().mean().sqrt().item()

    assert error(impl) <= 1.1 * error("eager")


@pytest.mark.parametrize("impl", ["one_pass", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_a_tiny_kl_to_cached_statistics(impl: str, dtype: torch.dtype) -> None:
    """KL of about 3e-5: the two means of the gradient agree to 16 bit, so they have to meet in float32."""
    g = torch.Generator().manual_seed(1)
    reference = torch.randn(17, 256, generator=g).to(dtype)
    hidden = (reference + 0.008 * torch.randn(17, 256, generator=g)).to(dtype).requires_grad_()
    weight = (torch.randn(2003, 256, generator=g) / math.sqrt(256)).to(dtype)
    labels = torch.randint(0, len(weight), (len(hidden),), generator=g)
    truth = oracle(hidden.detach(), weight, labels, reference)
    assert truth.kl is not None and truth.d_kl is not None and 1e-5 < truth.kl.mean() < 1e-4
    out = linear_logp(hidden, weight, labels, reference=head_statistics(reference, weight, labels), impl=impl)
    assert out.kl is not None
    found = torch.autograd.grad(out.kl.sum(), hidden)[0].double()
    # the result's own rounding, and that of the means' float32 sums against so small a difference
    assert (found - truth.d_kl).norm() <= 4 * torch.finfo(dtype).eps * truth.d_kl.norm()
