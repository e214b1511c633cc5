"""The evaluation row: twins, measures, questions, captions, bad videos; and the lmms-eval command."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from tempo_fast.config import EvalConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.evaluation import evaluate, lmms_eval_command
from tempo_fast.evaluation.probes import pairwise, questions, twins, win
from tempo_fast.evaluation.scoring import Score
from tempo_fast.perturb import KINDS
from tempo_fast.runs import _lmms_eval
from tempo_fast.schema import Question, Truth
from tempo_fast.trees.vision import FeatureCache

EVENTS = [f"A {c} {s} grows." for c in ("red", "blue", "white") for s in ("ring", "cross", "circle")]


def truth(name, n):
    return Truth(name, " ".join(EVENTS[:n]), EVENTS[:n])


@pytest.mark.parametrize("n", [0, 1, 2, 5, 9])
def test_twins(n):
    rs = [16, 8, 4, 2]
    t = twins(truth("v", n), rs, 0, "key")
    assert t.answers[0] == " ".join(EVENTS[:n])
    assert len(set(t.answers)) == len(t.answers)
    assert 0 not in t.index.values()
    for (kind, _r), place in t.index.items():
        words = sorted(t.answers[place].split(". "))
        assert (len(t.answers[place]) < len(t.answers[0])) == (kind == "drop")
        assert kind == "drop" or words != t.answers[0].split(". ")
    if n >= 2:
        assert len(t.index) == 12
    else:
        assert t.index == {}
    assert twins(truth("w", n), rs, 0, "key") == t  # the name plays no part
    if n == 9:
        assert twins(truth("v", n), rs, 0, "other") != t


def test_the_true_answer_is_written_like_its_twins():
    """A description and events that say the same make the same probe, however the description is spaced."""
    sentences = EVENTS[:5]
    told = Truth("v", "  " + "\n".join(sentences))
    assert twins(told, [4, 2], 0, "k") == twins(Truth("v", "In prose.", sentences), [4, 2], 0, "k")
    assert twins(told, [4, 2], 0, "k").answers[0] == " ".join(sentences)


def test_equal_events_make_no_twins():
    assert twins(Truth("v", "", ["It grows."] * 5), [16, 2], 0, "k").index.keys() <= {("drop", 16), ("drop", 2)}


def scores(true, values):
    return [Score(true, 10), *(Score(v, n) for v, n in values)]


def test_pairwise_measures():
    t = twins(truth("v", 9), [4], 0, "k")
    places = [t.index[k, 4] for k in KINDS]
    assert places == [1, 2, 3]
    # drop: larger sum, smaller mean; shuffle: larger sum and mean; reverse: equal
    s = scores(-10.0, [(-6.0, 5), (-9.0, 10), (-10.0, 10)])
    row = pairwise([(t, s), (t, s)], [4], 100, 0)
    value = {k: row["pairwise"][k]["4"]["value"] for k in KINDS}
    assert value == {"drop": 1.0, "shuffle": 0.0, "reverse": 0.5}
    assert {k: row["pairwise_other"][k]["4"]["value"] for k in KINDS} == {"drop": 0.0, "shuffle": 0.0, "reverse": 0.5}
    assert row["pairwise_all"]["value"] == pytest.approx(0.5)
    assert (row["pairwise_all"]["n"], row["pairwise_all"]["items"]) == (2, 6)
    assert (win(1, 0), win(0, 1), win(1, 1)) == (1, 0, 0.5)


def test_question_measures():
    q = [Question(str(i), "v", "?", ["a", "b"], 0, t) for i, t in enumerate(["first", "count", "first"])]
    short_wrong = [Score(-4.0, 8), Score(-3.0, 3)]  # the sum prefers the short one, the mean the long one
    right = [Score(-1.0, 2), Score(-3.0, 2)]
    row = questions([("v", q[0], short_wrong), ("v", q[1], right), ("w", q[2], right)], 50, 0)
    assert row["questions"]["all"]["value"] == pytest.approx(2 / 3)
    assert row["questions"]["first"]["value"] == 0.5 and row["questions"]["count"]["value"] == 1
    assert row["questions_mean"]["all"]["value"] == 1
    assert (row["questions"]["all"]["n"], row["questions"]["all"]["items"]) == (2, 3)


@dataclass
class Planner:
    """Plans by name, for the fake videos; ``bad`` ones cannot be read."""

    reader: object
    make: object

    def plan(self, video):
        if "bad" in video:
            raise InputError(f"{video}: is truncated")
        return self.make(video, 4 + len(video))

    def pixels(self, plan):
        return self.reader.pixels(plan)


class Teller:
    """Tells every event of its video, the first two swapped."""

    def __init__(self, by_key):
        self.by_key, self.asked = by_key, []

    def generate(self, requests, desc=""):
        self.asked += requests
        events = [self.by_key[r.plans[0].key] for r in requests]
        return [" ".join([e[1], e[0], *e[2:]]) for e in events]


def world(reader, make_plan):
    planner = Planner(reader, make_plan)
    truths = [truth("a", 5), truth("bb", 7), truth("bad", 4), truth("cccc", 4)]
    asked = [
        Question("1", "a", "What happens first?", EVENTS[:4], 0, "first"),
        Question("2", "a", "Does it?", ["Yes.", "No."], 1, "order_yes_no"),
        Question("3", "bb", "What happens first?", EVENTS[2:6], 2, "first"),
        Question("4", "bad", "?", ["Yes.", "No."], 0, "first"),
        Question("5", "extra", "How many?", ["One.", "Two."], 0, "count"),
    ]
    return planner, truths, asked


def test_row(tiny, reader, make_plan):
    planner, truths, asked = world(reader, make_plan)
    engine = Teller({planner.plan(t.video).key: t.events for t in truths if "bad" not in t.video})
    features = FeatureCache()
    row = evaluate(tiny, planner, features, EvalConfig(r=[4, 2], bootstrap=50), truths, asked, engine, 1)
    again = evaluate(tiny, planner, features, EvalConfig(r=[4, 2], bootstrap=50), truths, asked, engine, 1)
    assert {**row, "seconds": 0} == {**again, "seconds": 0}
    json.dumps(row, allow_nan=False)
    assert row["videos"] == 4 and row["skipped"] == [{"video": "bad", "reason": "bad: is truncated"}]
    assert set(row["pairwise"]) == set(KINDS) and set(row["pairwise"]["drop"]) == {"4", "2"}
    assert row["pairwise"]["shuffle"]["4"]["n"] == 3
    assert row["pairwise_all"]["items"] == sum(s["items"] for k in row["pairwise"].values() for s in k.values())
    assert set(row["questions"]) == {"all", "first", "order_yes_no", "count"}
    assert row["questions"]["all"]["n"] == 3 and row["questions"]["all"]["items"] == 4
    assert row["captions"]["events"]["value"] == row["captions"]["objects"]["value"] == 1
    tau = [1 - 2 / math.comb(n, 2) for n in (5, 7, 4)]
    assert row["captions"]["order_tau"]["value"] == pytest.approx(sum(tau) / 3)
    assert len(reader.calls) == 4  # every video encoded once for all probes and both rows
    assert len(engine.asked) == 6


def test_without_captions_truths_or_questions(tiny, reader, make_plan):
    planner, truths, asked = world(reader, make_plan)
    only = evaluate(tiny, planner, FeatureCache(), EvalConfig(bootstrap=9), [], asked[:2], None, 0)
    assert set(only) == {"questions", "questions_mean", "videos", "skipped", "seconds"}
    config = EvalConfig(r=[2], bootstrap=9, captions=False, max_videos=2)
    some = evaluate(tiny, planner, FeatureCache(), config, truths, [], Teller({}), 0)
    assert "captions" not in some and some["videos"] == 2 and some["pairwise_all"]["n"] == 2
    capped = evaluate(tiny, planner, FeatureCache(), config, truths, asked, Teller({}), 0)
    assert capped["videos"] == 2 and capped["questions"]["all"]["items"] == 3  # those of a and bb
    with pytest.raises(InputError, match="none of 1 videos can be read; bad: is truncated"):
        evaluate(tiny, planner, FeatureCache(), config, [truth("bad", 3)], [], None, 0)
    wrong = [Question("7", "a", "?", ["Yes.", "No."], 2, "first")]
    with pytest.raises(InputError, match="question 7: field 'answer'"):
        evaluate(tiny, planner, FeatureCache(), config, [], wrong, None, 0)


def test_a_video_that_breaks_when_decoded_is_left_out_of_everything(tiny, reader, make_plan):
    planner, truths, asked = world(reader, make_plan)
    read = planner.pixels

    def pixels(plan):
        if plan.name == "bb":
            raise InputError("bb: cannot be decoded")
        return read(plan)

    planner.pixels = pixels
    engine = Teller({planner.plan(t.video).key: t.events for t in truths if "bad" not in t.video})
    row = evaluate(tiny, planner, FeatureCache(), EvalConfig(r=[2], bootstrap=9), truths, asked, engine, 0)
    assert [s["video"] for s in row["skipped"]] == ["bb", "bad"]
    assert row["captions"]["events"]["n"] == 2 and row["questions"]["first"]["n"] == 1


def test_lmms_eval_command():
    video = VideoConfig(fps=1.5, max_frames=64, min_pixels=3136, max_pixels=602112, total_pixels=9_000_000)
    words = shlex.split(lmms_eval_command("runs/a b/merged", video, model_type="qwen2_5_vl", processes=8))
    arguments = dict(w.split("=") for w in words[words.index("--model_args") + 1].split(","))
    assert arguments == {
        "pretrained": "runs/a b/merged",
        "fps": "1.5",
        "max_num_frames": "64",
        "min_pixels": "3136",
        "max_pixels": str(2 * 9_000_000 // 64),
    }
    assert words[words.index("--model") + 1] == "qwen2_5_vl" and "--num_processes=8" in words
    note, command = lmms_eval_command("m", video, tasks=["tempcompass"]).splitlines()
    assert note.startswith("#") and "1.5" in note and "fps=" not in command and "--tasks tempcompass" in command
    assert "--model qwen3_vl " in lmms_eval_command("m", video, model_type="qwen3_vl")
    with pytest.raises(InputError, match="llava"):
        lmms_eval_command("m", video, model_type="llava")


def test_a_run_whose_model_has_no_lmms_eval_wrapper_says_so():
    """A run that is all done must not end on it."""
    model = SimpleNamespace(config=SimpleNamespace(model_type="internvl"))
    run: Any = SimpleNamespace(config=SimpleNamespace(video=VideoConfig()), light=model)
    assert _lmms_eval(run, "merged").startswith("# ") and "internvl" in _lmms_eval(run, "merged")
    assert _lmms_eval(run, "") == ""
