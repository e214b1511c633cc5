"""Every way of attending a packed row against the whole softmax in float64.

Sizes: prompts and branches of one token, lengths beside multiples of the kernels' blocks of 32, 64, 128 and 512, one
and several trees, one to four branches; grouped heads, a head size that is no power of two.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_checks import packed_of, varlen_backward, varlen_forward, whole_softmax
from torch import Tensor

from tempo_fast.trees.attention_causal import causal_attention
from tempo_fast.trees.attention_flash import FlashKernel
from tempo_fast.trees.attention_flex import FlexAttention, block_mask
from tempo_fast.trees.attention_masked import MaskedAttention
from tempo_fast.trees.attention_merged import CpuKernel, MergedAttention, calls_of

LAYOUTS = [
    [(1, [1])],
    [(1, [1, 1]), (3, [2])],
    [(5, [3, 1, 4]), (1, [2, 7]), (9, [1])],
    [(64, [32, 33]), (31, [1, 65, 2, 30])],
    [(129, [40] * 4), (127, [128, 1]), (1, [257])],
    [(700, [40, 90]), (513, [11])],
]
WAYS = {
    "cpu": lambda extents: MergedAttention(extents, CpuKernel()),
    "masked": lambda extents: MaskedAttention(extents, torch.device("cpu")),
    "varlen": lambda extents: MergedAttention(extents, FlashKernel(varlen_forward, varlen_backward)),
}


def tensors(n: int, heads: int, groups: int, d: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """query [1, heads, n, d], key and value [1, heads / groups, n, d] as the projections lay them out."""
    g = torch.Generator().manual_seed(seed)
    shapes = [heads, heads // groups, heads // groups]
    return tuple(torch.randn(1, n, h, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2) for h in shapes)


def with_gradients(attend: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = attend(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out)).sum(), inputs)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_output_and_gradients_are_those_of_the_whole_softmax(way: str, layout: Any) -> None:
    packed = packed_of(layout)
    for heads, groups, d, scale in [(4, 2, 12, 0.7), (2, 1, 64, 0.125), (7, 7, 8, 1.5)]:
        inputs = tensors(packed.n_tokens, heads, groups, d, torch.float64)
        attend = WAYS[way](packed.extents)
        found = with_gradients(lambda q, k, v: attend(q, k, v, scale), inputs)  # noqa: B023
        truth = with_gradients(lambda q, k, v: whole_softmax(q, k, v, packed.allowed(), scale), inputs)  # noqa: B023
        assert found[0].shape == (1, packed.n_tokens, heads, d) and found[0].is_contiguous()
        for ours, theirs in zip(found, truth, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("way", ["cpu", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_one_masked_call(way: str, dtype: torch.dtype) -> None:
    """Errors against float64 at most twice those of torch's attention under a dense mask in the same dtype."""
    packed = packed_of([(129, [40] * 4), (127, [128, 1])])
    inputs = tensors(packed.n_tokens, 4, 2, 64, dtype)
    attend, allowed = WAYS[way](packed.extents), packed.allowed()

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        run = torch.nn.functional.scaled_dot_product_attention
        return run(q, k, v, attn_mask=allowed[:, None], scale=0.125).transpose(1, 2)

    exact = tuple(x.double() for x in inputs)
    truth = with_gradients(lambda q, k, v: whole_softmax(q, k, v, allowed, 0.125), exact)
    found, theirs = with_gradients(lambda q, k, v: attend(q, k, v, 0.125), inputs), with_gradients(dense, inputs)
    for ours, other, true in zip(found, theirs, truth, strict=True):
        assert (ours - true).norm() <= 2 * (other - true).norm()
        assert (ours - true).abs().max() <= 3 * (other - true).abs().max()


def test_an_answer_does_not_depend_on_what_stands_beside_it() -> None:
    """Not even in rounding: outputs are equal to the bit alone, among siblings, among other trees."""
    prompt, answer, sibling, other = (tensors(n, 4, 2, 16, torch.bfloat16, seed=n) for n in (70, 40, 33, 90))

    def outputs(layout: Any, *pieces: tuple[Tensor, ...]) -> Tensor:
        packed = packed_of(layout)
        return MergedAttention(packed.extents, CpuKernel())(*(torch.cat(x, 2) for x in zip(*pieces, strict=True)), 0.3)

    alone = outputs([(70, [40])], prompt, answer)
    among = outputs([(50, [40]), (70, [33, 40])], other, prompt, sibling, answer)
    assert torch.equal(alone[:, :70], among[:, 90:160]) and torch.equal(alone[:, 70:], among[:, 193:])


def test_calls_cover_each_pair_of_tokens_that_is_allowed_once() -> None:
    packed = packed_of(LAYOUTS[2])
    seen = torch.zeros(packed.n_tokens, packed.n_tokens, dtype=torch.int32)
    own, cross = calls_of(packed.extents)
    for call in own:
        seen[call.q0 : call.q1, call.k0 : call.k1] += torch.ones(call.q1 - call.q0, call.q1 - call.q0).tril().int()
    for call in cross:
        seen[call.q0 : call.q1, call.k0 : call.k1] += 1
    assert torch.equal(seen, packed.allowed()[0].int())


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_attend_causally(groups: int) -> None:
    inputs = tuple(torch.cat([x, x.flip(2)]) for x in tensors(37, 4, groups, 8, torch.float64))
    allowed = torch.ones(2, 37, 37, dtype=torch.bool).tril()
    found = with_gradients(lambda q, k, v: causal_attention(q, k, v, 0.4), inputs)
    truth = with_gradients(lambda q, k, v: whole_softmax(q, k, v, allowed, 0.4), inputs)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize("layout", [*LAYOUTS, [(16, [8, 8]), (8, [24])], [(128, [128, 256])]], ids=str)
def test_the_block_mask_is_the_one_torch_makes_of_the_rule(layout: Any, block: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    packed = packed_of(layout)
    allowed, n = packed.allowed()[0], packed.n_tokens
    made = block_mask(packed.extents, block=block)
    theirs = create_block_mask(lambda b, h, q, k: allowed[q, k], None, None, n, n, device="cpu", BLOCK_SIZE=block)
    every = torch.arange(n)
    assert torch.equal(made.mask_mod(None, None, every[:, None], every), allowed)
    assert made.seq_lengths == theirs.seq_lengths == (n, n) and made.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        ours, others = getattr(made, f"{kind}_num_blocks"), getattr(theirs, f"{kind}_num_blocks")
        assert torch.equal(ours, others), kind
        for row, count in enumerate(ours[0, 0]):
            a, b = (getattr(x, f"{kind}_indices")[0, 0, row, :count] for x in (made, theirs))
            assert torch.equal(a, b), (kind, row)


def test_flex_attention_compiled() -> None:
    """Its forward; torch has no backward of it on a CPU."""
    packed = packed_of([(129, [40] * 4), (1, [257])])
    inputs = tensors(packed.n_tokens, 4, 2, 16, torch.float32)
    with torch.no_grad():
        found = FlexAttention(packed.extents, torch.device("cpu"))(*inputs, 0.25)
    truth = whole_softmax(*(x.double() for x in inputs), packed.allowed(), 0.25)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
