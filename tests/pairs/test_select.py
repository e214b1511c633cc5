"""Selection by variance: which questions stay, and that nothing else has a say in it."""

from __future__ import annotations

import statistics
import sys
import types
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_questions import Talker, context, items

from tempo_fast.config import PairsConfig, RunConfig, SelectConfig, StageConfig, TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.pairs.select import draw_samples, select


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """``told:points`` gives what the answer says of itself: "70 words" is 70 points, "? words" none."""
    module = types.ModuleType("told")
    module.points = lambda answer, question: None if answer.startswith("?") else float(answer.split()[0])
    monkeypatch.setitem(sys.modules, "told", module)


STAGES = TrainConfig(stages=[StageConfig(r=4)])


def config(**how):
    return PairsConfig(method="mdpo", r=[4], select=SelectConfig(**{"samples": 4, "metric": "told:points", **how}))


def script(points):
    """An engine whose k-th sample about a video gets the k-th of its points."""
    return Talker(lambda r: f"{points[r.plans[0].video][r.sample]} words")


POINTS = {
    "varies.mp4": [0, 100, 0, 0],
    "right.mp4": [100, 100, 100, 100],
    "wrong.mp4": [0, 0, 0, 0],
    "some.mp4": ["?", 0, "?", 100],
    "one.mp4": ["?", 0, "?", "?"],
    "little.mp4": [50, 52, 50, 52],
}


def test_questions_that_vary_are_kept():
    kept, part = select(items(*POINTS), context(config(), script(POINTS)))
    assert [i.video for i in kept] == ["varies.mp4", "some.mp4", "little.mp4"]
    assert part.counts == {"select_kept": 3, "select_alike": 2, "select_unscored": 1}
    assert not part.records and not part.failed


def test_the_threshold_is_strict():
    """little.mp4: four samples at 50 and 52 have a standard deviation of 1."""
    for least, stays in ((0.99, True), (1.0, False)):
        kept, _ = select(items("little.mp4"), context(config(min_std=least), script(POINTS)))
        assert bool(kept) == stays


def test_a_video_keeps_the_questions_that_vary():
    def say(r):
        number = int(r.prompt.split("part ")[1][0])
        return f"{100 * (number in (1, 3) and r.sample == 0)} words"

    (only,), part = select(items("a.mp4", questions=5), context(config(), Talker(say)))
    assert [q.id for q in only.questions] == ["a.mp4#1", "a.mp4#3"]
    assert only == replace(items("a.mp4", questions=5)[0], questions=only.questions)
    assert part.counts["select_alike"] == 3


def test_what_is_asked():
    engine = Talker(lambda r: "1 x")
    select(items("a.mp4", questions=2), context(config(samples=3, temperature=0.6), engine))
    assert [r.sample for r in engine.asked] == [0, 1, 2, 0, 1, 2]
    assert {r.temperature for r in engine.asked} == {0.6} and {r.top_p for r in engine.asked} == {None}
    assert all(len(r.plans) == 1 and len(r.plans[0].indices) == 8 and not r.turns for r in engine.asked)
    assert len({r.prompt for r in engine.asked}) == 2


def test_a_bad_video_is_named_and_the_others_go_on():
    points = {**POINTS, "gone.mp4": [0] * 4, "broken.mp4": [0] * 4}
    kept, part = select(items("gone.mp4", "varies.mp4", "broken.mp4"), context(config(), script(points)))
    assert [i.video for i in kept] == ["varies.mp4"]
    assert {f["video"] for f in part.failed} == {"gone.mp4", "broken.mp4"}
    assert part.counts["select_failed"] == 2

    class Down(Talker):
        def generate(self, requests, desc=""):
            raise InputError("generation.endpoint: cannot be reached")

    with pytest.raises(InputError, match="endpoint"):
        select(items("varies.mp4"), context(config(), Down()))


def test_company_and_order_change_nothing():
    many = items(*(f"{i}.mp4" for i in range(12)), questions=3)
    own = config(samples=3, metric="rouge_l", min_std=10.0)
    together, part = select(many, context(own))
    alone = [i for one in many for i in select([one], context(own))[0]]
    assert together == alone and 3 < part.counts["select_kept"] < 33
    turned, _ = select(many[::-1], context(own))
    assert turned == together[::-1]
    other, _ = select(many, context(own, Talker(seed=1)))
    assert other != together


@settings(max_examples=60, deadline=None)
@given(points=st.lists(st.integers(0, 100), min_size=2, max_size=8), least=st.integers(0, 40))
def test_kept_is_above_the_deviation(points, least):
    own = config(samples=len(points), min_std=float(least))
    kept, _ = select(items("a.mp4"), context(own, script({"a.mp4": points})))
    assert bool(kept) == (statistics.pstdev(points) > least)


def test_samples_keep_their_order():
    own = config(samples=4)
    (one,) = draw_samples(items("some.mp4"), context(own, script(POINTS)), own.select, "pairs.select", [])
    assert one.texts == ["? words", "0 words", "? words", "100 words"] and one.points == [None, 0, None, 100]


def test_a_wrong_metric_names_its_key():
    with pytest.raises(InputError, match=r"config: pairs\.select\.metric must be one of"):
        select(items("a.mp4"), context(config(metric="bleu")))
    RunConfig(pairs=config(samples=2), train=STAGES).validate()
    for change, key in (({"samples": 1}, "samples"), ({"min_std": -1.0}, "min_std"), ({"temperature": 0.0}, "temp")):
        with pytest.raises(InputError, match=rf"pairs\.select\.{key}"):
            RunConfig(pairs=config(**change), train=STAGES).validate()
