"""The judge of distinguishability: its measures by hand, against brute force, and by property."""

import os
import random
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.pairs.judge import SAME_STORY, events, measures, rouge_l, same_events, words
from tempo_fast.perturb import KINDS, perturb
from tempo_fast.tinyworld.world import draw_events, stream

A, B, C, D = "A red circle moves left.", "A blue ring grows.", "A white cross appears.", "A green square shrinks."


def tell(*sentences: str) -> str:
    return " ".join(sentences)


# F1 of rouge-score 0.1.2 (rougeL, no stemmer)
@pytest.mark.parametrize(
    ("a", "b", "score"),
    [
        ("The cat sat on the mat.", "the cat lay on a mat", 0.666667),
        (tell(A, B), tell(B, A), 0.555556),
        ("It's 3.5 m, end-of-line!", "its 3 5 m end of line", 0.8),
        ("one two three", "four five", 0.0),
        ("a a a b", "a b a b a", 0.666667),
        ("First, a man opens the door; then he leaves.", "A man leaves first. Then he opens the door.", 0.555556),
        ("", "a", 0.0),
    ],
)
def test_rouge_l_is_the_packages(a: str, b: str, score: float) -> None:
    assert rouge_l(a, b) == pytest.approx(score, abs=1e-6) == rouge_l(b, a)


TEXTS = st.lists(st.sampled_from("a b C c. d e, Ä 3 -".split()), max_size=40).map(" ".join)


@given(TEXTS, TEXTS)
def test_rouge_l_is_the_longest_common_subsequence(a: str, b: str) -> None:
    left, right = words(a), words(b)
    table = [[0] * (len(right) + 1) for _ in range(len(left) + 1)]
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    total = len(left) + len(right)
    assert rouge_l(a, b) == (pytest.approx(2 * table[-1][-1] / total) if total else 0.0)


@pytest.mark.parametrize(
    ("chosen", "rejected", "coverage", "steps", "order"),
    [
        (tell(A, B, C), tell(A, B, C), 1, 1, 1),
        # |A B C D| has five steps; of |B A C D| only C D and the end are left
        (tell(A, B, C, D), tell(B, A, C, D), 1, 2 / 5, 2 / 3),
        # the halves swapped: the steps inside them are left, and two of six pairs of events are in order
        (tell(A, B, C, D), tell(C, D, A, B), 1, 2 / 5, -1 / 3),
        (tell(A, B, C, D), tell(D, C, B, A), 1, 0, -1),
        # dropped: the beginning, A B; B D is no step of the chosen text, the end is
        (tell(A, B, C, D), tell(A, B, D), 3 / 4, 3 / 5, 1),
        (tell(A, B, C, D), tell(C), 1 / 4, 0, None),
        # added events count against the pair just as missing ones
        (tell(A, B), tell(A, C, D, B), 1 / 2, 2 / 5, 1),
        (tell(A), tell(B), 0, 0, None),
        # equal events: as often as they are told. |A B A| has the steps |A, AB, BA, A|
        (tell(A, B, A), tell(A, A, B), 1, 2 / 4, 1 / 3),
        (tell(A, A), tell(A), 1 / 2, 2 / 3, None),
        ("a red CIRCLE moves left\nA blue  ring: grows!", tell(A, B), 1, 1, 1),
    ],
)
def test_measures_by_hand(chosen: str, rejected: str, coverage: float, steps: float, order: float | None) -> None:
    found = measures(chosen, rejected)
    assert found["coverage"] == pytest.approx(coverage) and found["steps"] == pytest.approx(steps)
    assert found.get("order_agreement") == (None if order is None else pytest.approx(order))
    assert found["separated"] == float(steps < SAME_STORY)
    assert same_events(chosen, rejected) == (steps == 1)


def test_a_paraphrase_is_the_same_event_and_another_event_is_not() -> None:
    chosen = "A woman opens the red door. She walks to the long table. Two dogs play in the garden. It starts to rain."
    same = "A woman opens a red door. Then she walks over to the long table. Two dogs play in a garden. Rain falls."
    found = measures(chosen, same)
    assert found["coverage"] == 3 / 4 and found["steps"] == 3 / 5  # the beginning and two steps
    assert not same_events(chosen, same)
    moved = "Two dogs play in a garden. A woman opens a red door. Then she walks over to the long table. Rain falls."
    assert measures(chosen, moved)["coverage"] == 3 / 4 and measures(chosen, moved)["separated"] == 1
    assert measures(chosen, "A train leaves. The crowd cheers. Snow covers the hills. A child laughs.")["coverage"] == 0


def test_an_event_that_both_texts_tell_is_no_paraphrase_of_another() -> None:
    """`moves left` and `moves right` are alike; both being told by both texts, neither may stand for the other."""
    left, right = "A red circle moves left.", "A red circle moves right."
    assert measures(tell(left, right), tell(right, left))["steps"] == 0
    assert measures(tell(left, right), tell(left))["coverage"] == 1 / 2


def test_sentences_end_as_in_prose() -> None:
    assert events("It costs 3.5 m. Really?! Yes\n... “No.” ") == ["it costs 3 5 m", "really", "yes", "no"]
    assert events(" \n.!") == []


def test_embeddings_are_a_measure_of_their_own() -> None:
    def embed(texts):
        return [[text.count("r"), text.count("g")] for text in texts]

    plain, more = measures(tell(A, B), tell(B, A)), measures(tell(A, B), tell(B, A), embed)
    assert more == {**plain, "embedding": pytest.approx(1)}
    assert measures("r", "g", embed)["embedding"] == 0
    assert measures("r", "x", embed)["embedding"] == 0  # a row of zeros


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.integers(2, 32), st.sampled_from([16, 8, 4, 2]), st.integers(0, 999))
def test_steps_are_the_adjacencies_that_are_left_with_both_ends(kind: str, n: int, r: int, seed: int) -> None:
    """For texts that tell exactly the clips shown, the judge's steps are what the perturbation says it broke."""
    told = [event.text for event in draw_events(stream(seed), n)]
    order = perturb(kind, n, r, seed)
    assert order is not None
    found = measures(tell(*told), tell(*order.apply(told)))
    shown = [-1, *order.order, n]
    assert found["steps"] == pytest.approx(sum(b == a + 1 for a, b in pairwise(shown)) / (n + 1))
    assert found["coverage"] == pytest.approx(order.kept)
    inner = round((1 - order.broken) * (n - 1))
    ends = (order.order[0] == 0) + (order.order[-1] == n - 1)
    assert found["steps"] == pytest.approx((inner + ends) / (n + 1))


SENTENCES = st.lists(st.sampled_from([A, B, C, D, "A red ring grows.", "Yes!", "3.5", "x y\n"]), min_size=1, max_size=9)


@settings(deadline=None)
@given(SENTENCES, SENTENCES)
def test_measures_are_bounded_and_symmetric_in_what_counts(a: list[str], b: list[str]) -> None:
    one, two = measures(tell(*a), tell(*b)), measures(tell(*b), tell(*a))
    for name in ("rouge_l", "coverage", "steps"):
        assert 0 <= one[name] <= 1
    assert -1 <= one.get("order_agreement", 0) <= 1
    assert one["rouge_l"] == pytest.approx(two["rouge_l"])
    same = measures(tell(*a), tell(*a))
    assert {same[k] for k in ("rouge_l", "coverage", "steps")} == {1.0} and same["separated"] == 0
    assert (one["steps"] == 1) or not same_events(tell(*a), tell(*b))


def test_equal_on_every_run() -> None:
    """Sums of floats over words must not hang on the order of a set."""
    rng = random.Random(4)
    vocabulary = [f"w{i}" for i in range(30)]
    texts = [" ".join(" ".join(rng.choices(vocabulary, k=9)) + "." for _ in range(12)) for _ in range(2)]
    code = f"from tempo_fast.pairs.judge import measures; print(measures({texts[0]!r}, {texts[1]!r}))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(runs) == 1 and "separated" in runs.pop()
