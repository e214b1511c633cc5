"""Sampling against transformers' own warpers, and draws against the distribution they should have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.generation.sampling import PrivateSampling, choose, invert, nucleus, penalise


@pytest.mark.parametrize("top_p", [1e-6, 0.05, 0.3, 0.7, 0.9, 0.999])
@pytest.mark.parametrize("width", [1, 2, 7, 333])
def test_top_p_is_transformers_own(top_p, width):
    from transformers import TopPLogitsWarper

    scores = torch.randn(5, width, generator=torch.Generator().manual_seed(width)) * 3
    theirs = TopPLogitsWarper(top_p)(torch.zeros(5, 1), scores)
    assert torch.equal(nucleus(scores, [top_p] * 5), theirs)
    assert torch.isfinite(theirs).any(-1).all()
    # row by row: others in the batch have no say
    mixed = nucleus(scores, [1.0, top_p, 0.5, 1.0, top_p])
    assert torch.equal(mixed[[1, 4]], theirs[[1, 4]]) and torch.equal(mixed[[0, 3]], scores[[0, 3]])


def test_repetition_penalty_is_transformers_own():
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = torch.randn(3, 50)
    ids = torch.randint(0, 50, (3, 20))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(penalise(scores, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone()))


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_softmax(top_p):
    """20,000 draws: every share within 4 standard errors of softmax(scores / T), cut at top_p."""
    scores = torch.tensor([[1.0, -0.5, 0.3, 2.0, -30.0]])
    n, temperature = 20_000, 0.7
    sampling = PrivateSampling(temperature, top_p, 7)
    draws = torch.tensor(choose(scores.expand(n, -1), [sampling] * n))
    share = torch.bincount(draws, minlength=5) / n
    want = nucleus(scores / temperature, [top_p])[0].softmax(-1)
    assert ((share - want).abs() <= 4 * (want * (1 - want) / n).sqrt() + 1e-9).all()
    assert int((want > 0).sum()) == (5 if top_p == 1 else 2)


def test_rows_choose_for_themselves():
    """Greedy and sampled rows side by side draw what they draw alone."""
    scores = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))

    def rows():
        return [None, PrivateSampling(1.3, 0.9, 11), None, PrivateSampling(0.5, 1.0, 12)]

    together = [choose(scores, r) for r in [rows()] for _ in range(20)]
    for i, row in enumerate(rows()):
        alone = [choose(scores[i : i + 1], [row])[0] for _ in range(20)]
        assert alone == [step[i] for step in together]
        assert set(alone) == {int(scores[i].argmax())} if row is None else len(set(alone)) > 1


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12).filter(lambda p: sum(p) > 1e-3),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_has_probability(probabilities, number):
    """Never a token of probability 0, whatever rounds; and the one whose part of the sum the number falls into."""
    p = torch.tensor([probabilities], dtype=torch.float32)
    token = int(invert(p, [number]))
    assert p[0, token] > 0
    total = p.double().cumsum(-1)[0]
    wanted = number * total[-1]
    assert total[token] >= wanted and (token == 0 or total[token - 1] <= wanted)


def test_the_last_number_stays_inside():
    assert invert(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), [1 - 2**-53]).tolist() == [1]
    assert invert(torch.tensor([[0.0, 1.0, 0.0]]), [0.0]).tolist() == [1]
