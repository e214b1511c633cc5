"""M-DPO's pairs: the better of several samples against the worse, by hand and against VidChain's rule."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_questions import Talker, context, items

from tempo_fast.config import MDPOPairsConfig, PairsConfig
from tempo_fast.errors import InputError
from tempo_fast.pairs.mdpo import KIND, make_mdpo
from tempo_fast.pairs.metrics import rouge_l
from tempo_fast.pairs.run import make_pairs


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """``told:points`` gives what the answer says of itself: "70 words" is 70 points, "? words" none."""
    module = types.ModuleType("told")
    module.points = lambda answer, question: None if answer[:1] in ("?", "") else float(answer.split()[0])
    monkeypatch.setitem(sys.modules, "told", module)


def config(**how):
    return PairsConfig(method="mdpo", r=[16], mdpo=MDPOPairsConfig(**{"metric": "told:points", **how}))


def made(texts, **how):
    """The part of one question whose samples are ``texts``."""
    own = config(samples=len(texts), **how)
    return make_mdpo(items("a.mp4"), context(own, Talker(lambda r: texts[r.sample])))


@pytest.mark.parametrize(
    ("texts", "pair", "reason"),
    [
        (["40 a", "90 b", "10 c"], (1, 2), ""),
        (["10 a", "90 b", "90 c", "10 d"], (1, 0), ""),  # of equals the first
        (["10 a", "20 b"], (1, 0), ""),  # ten apart is enough
        (["10 a", "19.9 b"], None, "small_gap"),
        (["50 a", "50 b"], None, "small_gap"),
        (["? a", "50 b"], None, "unscored"),
        (["? a", "50 b", "70 c"], (2, 1), ""),
        (["", "50 b"], None, "unscored"),  # nothing said is no rejected answer
        (["?!", "50 b"], None, "unscored"),
        (["90 a.", "90 a"], None, "small_gap"),
    ],
)
def test_best_against_worst(texts, pair, reason):
    part = made(texts)
    tally = part.tally(16, KIND)
    if reason:
        assert not part.records and tally.filtered[reason] == 1 and tally.made == 0
        return
    (record,) = part.records
    assert (record.chosen, record.rejected[0].text) == tuple(texts[k] for k in pair)
    assert record.id == "a.mp4#0/r16" and record.r == 16 and record.video == "a.mp4"
    assert record.prompt.startswith("What happens in part 0?")
    assert tally.made == 1 and not +tally.filtered
    points = [float(t.split()[0]) if t[:1] not in ("?", "") else None for t in texts]
    scores = record.provenance["scores"]
    assert scores == {
        "metric": "told:points",
        "chosen": points[pair[0]],
        "rejected": [points[pair[1]]],
        "samples": points,
    }
    assert record.provenance["gap"] == points[pair[0]] - points[pair[1]] == tally.row()["gap"]
    (one,) = record.rejected
    assert one.spans and one.chosen_spans and record.spans == one.chosen_spans


def test_no_gap_is_no_pair_even_at_zero():
    assert not made(["50 a", "50 b"], min_gap=0.0).records
    assert made(["50 a", "51 b"], min_gap=0.0).records


def test_equal_words_are_no_pair(monkeypatch):
    monkeypatch.setattr(sys.modules["told"], "points", lambda answer, question: 90.0 if answer.isupper() else 10.0)
    part = made(["A RING.", "a ring"])
    assert not part.records and part.tally(16, KIND).filtered == {"no_difference": 1}
    (record,) = made(["A RING.", "a ring", "a square"]).records
    assert record.rejected[0].text == "a square"


def test_every_two_far_apart_are_pairs():
    """VidChain: three samples, three pairs; here a record for each chosen one, worst first."""
    part = made(["40 a", "90 b", "10 c"], pairs="all")
    first, second = part.records
    assert (first.id, first.chosen, [x.text for x in first.rejected]) == ("a.mp4#0/r16/s1", "90 b", ["10 c", "40 a"])
    assert (second.id, second.chosen, [x.text for x in second.rejected]) == ("a.mp4#0/r16/s0", "40 a", ["10 c"])
    assert first.provenance["scores"]["rejected"] == [10, 40] and first.provenance["gap"] == 80
    assert part.tally(16, KIND).made == 3
    # said twice, learned once
    again = made(["90 b", "90 b", "10 c", "10 c"], pairs="all")
    assert [(x.chosen, [y.text for y in x.rejected]) for x in again.records] == [("90 b", ["10 c"])]


@settings(max_examples=60, deadline=None)
@given(points=st.lists(st.integers(0, 100), min_size=2, max_size=6), gap=st.sampled_from([0, 5, 10, 40]))
def test_all_pairs_are_those_of_the_authors(points, gap):
    """``calc/conv.py``: (i, j) with scores[i] - scores[j] >= threshold; ours leaves out equal scores and texts."""
    texts = [f"{p} sample{k}" for k, p in enumerate(points)]
    ours = {(x.chosen, y.text) for x in made(texts, min_gap=float(gap), pairs="all").records for y in x.rejected}
    theirs = {
        (texts[i], texts[j])
        for i, j in itertools.permutations(range(len(points)), 2)
        if points[i] - points[j] >= max(gap, 1)
    }
    assert ours == theirs
    best = made(texts, min_gap=float(gap)).records
    assert len(best) == bool(theirs)
    if best:
        assert best[0].provenance["gap"] == max(points) - min(points)


def test_scores_are_of_the_metric():
    part = make_mdpo(items("a.mp4", "b.mp4", questions=4), context(config(metric="rouge_l", min_gap=1.0)))
    assert len(part.records) > 4
    questions = {q.id: q for i in items("a.mp4", "b.mp4", questions=4) for q in i.questions}
    for x in part.records:
        q = questions[x.provenance["question"]]
        scores = x.provenance["scores"]
        assert scores["chosen"] == round(rouge_l(x.chosen, q), 4) == max(scores["samples"])
        assert scores["rejected"] == [round(rouge_l(x.rejected[0].text, q), 4)] and scores["metric"] == "rouge_l"
        assert x.provenance["reference"] == q.answer


def test_document_frequencies_are_of_all_references():
    many = items(*(f"{i}.mp4" for i in range(6)), questions=2)
    references = [q.answer for i in many for q in i.questions]
    own = config(metric="cider_d", min_gap=0.5)
    whole = make_mdpo(many, context(own, references=references)).records
    alone = [x for one in many for x in make_mdpo([one], context(own, references=references)).records]
    assert whole == alone and len(whole) > 2
    with pytest.raises(InputError, match=r"pairs\.mdpo\.metric: cider_d needs"):
        make_mdpo(many, context(own))


def test_bad_videos_and_counts():
    texts = ["40 a", "", "? c"]
    part = make_mdpo(
        items("gone.mp4", "a.mp4", "broken.mp4", questions=2), context(config(), Talker(lambda r: texts[r.sample]))
    )
    assert {f["video"] for f in part.failed} == {"gone.mp4", "broken.mp4"}
    assert part.tally(16, KIND).filtered == {"video_failed": 4, "unscored": 2}
    assert part.counts == {"questions": 2, "samples_empty": 2, "samples_unscored": 4}


@pytest.mark.parametrize("pairs", ["best_worst", "all"])
def test_buckets_and_runs_change_no_byte(tmp_path, pairs):
    many = items(*(f"{i}.mp4" for i in range(9)), questions=3)

    def run(name, size, seed=0, select=0):
        own = config(metric="rouge_l", min_gap=3.0, pairs=pairs)
        own.bucket_videos, own.select.samples, own.select.metric = size, select, "rouge_l"
        from scripted_questions import QuestionReader

        audit = make_pairs(many, Talker(seed=seed), QuestionReader(), own, tmp_path / name, seed=seed)
        return (tmp_path / name / "r16.jsonl").read_bytes(), audit

    (one, audit), (other, _) = run("a", 64), run("b", 2)
    assert one == other and one.count(b"\n") == audit["records"]["16"] > 5
    assert audit["stats"]["16"][KIND]["made"] == audit["pairs"]["16"]
    assert run("c", 64, seed=1)[0] != one
    kept, audit = run("d", 2, select=3)
    assert set(kept.splitlines()) <= set(one.splitlines())  # samples of equal temperature would be the same ones
    assert audit["counts"]["select_kept"] >= audit["records"]["16"] // 3
