"""Rewards and points: ranks held to scipy's, and a model's mean log-probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.evaluation.scoring import score
from tempo_fast.evaluation.trust import add_rewards, spearman, trust_reward_correlation
from tempo_fast.schema import PreferenceRecord, Rejected
from tempo_fast.trees.vision import FeatureCache


def series(n, most, seed):
    """n whole numbers below ``most``: many ties where that is small."""
    x, out = seed, []
    for _ in range(n):
        x = (1103515245 * x + 12345) % 2**31
        out.append((x >> 8) % most)
    return np.array(out, dtype=np.float64)


# scipy 1.17.1: scipy.stats.spearmanr(a, b).statistic
SCIPY = [
    (20, 1000, 1000, 0.08120300751879699),
    (50, 4, 6, 0.06194308542894795),
    (7, 3, 100, 0.3857583749052298),
    (200, 2, 2, 0.02256755695554319),
]


@pytest.mark.parametrize(("n", "most", "other", "rho"), SCIPY)
def test_spearman_as_scipy(n, most, other, rho):
    assert spearman(series(n, most, 1), series(n, other, 2)) == pytest.approx(rho, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), max_size=12))
def test_spearman_knows_ranks_alone(values):
    a, b = np.array(values, dtype=np.float64).reshape(-1, 2).T
    rho = spearman(a, b)
    assert (rho is None) == (len(set(a)) < 2 or len(set(b)) < 2)
    if rho is not None:
        assert -1 <= rho <= 1
        assert spearman(np.exp(a), 3 * b + 1) == pytest.approx(rho) == pytest.approx(spearman(b, a))
        assert spearman(-a, b) == pytest.approx(-rho)


def record(k, chosen, rejected):
    """Chosen and rejected are (reward, points)."""
    provenance = {
        "rewards": {"chosen": chosen[0], "rejected": [rejected[0]]},
        "scores": {"metric": "rouge_l", "chosen": chosen[1], "rejected": [rejected[1]]},
    }
    rejected_ones = [Rejected("no", "sparse", 16)]
    return PreferenceRecord(f"q{k}", f"{k}.mp4", "?", "yes", rejected_ones, 16, provenance=provenance)


def test_correlation_over_answers_with_an_interval():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 100, (60, 2))
    rewards = points / 50 + rng.normal(0, 0.5, points.shape)
    records = [record(k, (r[0], p[0]), (r[1], p[1])) for k, (r, p) in enumerate(zip(rewards, points, strict=True))]
    got = trust_reward_correlation(records, resamples=300)
    assert got["value"] == pytest.approx(spearman(rewards.ravel(), points.ravel())) and got["value"] > 0.6
    assert got["lo"] < got["value"] < got["hi"] <= 1 and (got["n"], got["items"]) == (60, 120)
    assert trust_reward_correlation(records, resamples=300) == got
    assert trust_reward_correlation(records, resamples=300, seed=1)["lo"] != got["lo"]
    few = trust_reward_correlation(records[:10], resamples=300)
    assert few["hi"] - few["lo"] > got["hi"] - got["lo"]


def test_what_cannot_be_compared_is_left_out():
    known = [record(k, (-k, 10 * k), (-k - 9, 1)) for k in range(4)]
    odd = record(9, (-1, None), (-2, 50))
    bare = PreferenceRecord("x", "x.mp4", "?", "a", [Rejected("b", "drop", 2)], 2)
    got = trust_reward_correlation([*known, bare, odd], resamples=20)
    assert (got["n"], got["items"]) == (5, 9)
    for none in ([], [bare], [record(0, (-1, 50), (-2, 50))]):
        assert trust_reward_correlation(none)["value"] is None


def test_rewards_of_a_model(tiny, reader, make_plan):
    class Reader(type(reader)):
        def plan(self, path):
            return make_plan(path, 4)

    tell = Reader()
    texts = [
        "A red circle moves left.",
        "It appears at last.",
        "A green triangle moves right. Then a blue square grows.",
    ]
    records = [
        PreferenceRecord("a", "v1", "What happens?", texts[0], [Rejected(t, "sample", 16) for t in texts[1:]], 16),
        PreferenceRecord(
            "b", "v2", "What happened?", texts[2], [Rejected(texts[0], "sample", 16)], 16, provenance={"x": 1}
        ),
        PreferenceRecord("c", "v1", "Then?", texts[1], [Rejected(texts[2], "sample", 16)], 16),
    ]
    out = add_rewards(tiny, tell, FeatureCache(), records)
    assert [x.id for x in out] == ["a", "b", "c"] and out[1].provenance["x"] == 1 and not records[0].provenance
    for x in out:
        rewards = x.provenance["rewards"]
        assert rewards["model"] == tiny.digest
        for text, reward in zip(
            [x.chosen, *(y.text for y in x.rejected)], [rewards["chosen"], *rewards["rejected"]], strict=True
        ):
            ((alone,),) = score(tiny, tell, FeatureCache(), [tell.plan(x.video)], [(x.prompt, [text])])
            assert (
                reward == pytest.approx(alone.total / alone.tokens, abs=2e-5) and math.isfinite(reward) and reward < 0
            )
    assert out[0].provenance["rewards"]["rejected"][1] != out[2].provenance["rewards"]["rejected"][0]  # another prompt
