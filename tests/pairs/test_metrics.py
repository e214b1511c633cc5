"""Metrics: words in common held to the packages that others use, time ranges by hand, plug-ins that misbehave."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.pairs.metrics import METRICS, CiderD, correct, metric_of, rouge_l, time_ranges, timed_events, tiou
from tempo_fast.schema import QARecord

# 30 pairs of texts, and what pycocoevalcap 1.2 (``Cider``, all references its corpus), rouge-score 0.1.2 and nltk
# 3.10.4 (``single_meteor_score`` with Porter's stemmer and a WordNet without synonyms) make of them
ROWS = json.loads(Path(__file__).with_name("words_in_common.json").read_text())
REFERENCES = [row["reference"] for row in ROWS]


def qa(answer: str, **how) -> QARecord:
    return QARecord("q1", "v.mp4", "What happens?", answer, **how)


def test_words_in_common_as_others_count_them():
    cider = metric_of("cider_d", "k", REFERENCES)
    for row in ROWS:
        question = qa(row["reference"])
        assert cider(row["answer"], question) == pytest.approx(10 * row["cider_d"], abs=1e-9)
        assert rouge_l(row["answer"], question) == pytest.approx(100 * row["rouge_l"], abs=1e-9)
    assert {0 < row["cider_d"] < 10 for row in ROWS} == {True, False}


def test_meteor_as_nltk():
    pytest.importorskip("nltk")
    meteor = metric_of("meteor", "k")
    for row in ROWS:
        assert meteor(row["answer"], qa(row["reference"])) == pytest.approx(100 * row["meteor"], abs=1e-9)
    assert meteor("The rings are growing.", qa("the ring grows")) > meteor("They are.", qa("the ring grows")) == 0


def test_meteor_says_what_it_needs(monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "nltk"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(
        InputError, match=r"pairs\.mdpo\.metric: meteor needs nltk; pip install 'tempo-fast\[metrics\]'"
    ):
        metric_of("meteor", "pairs.mdpo.metric")


def test_cider_hangs_on_all_references_and_on_nothing_else():
    question, answer = qa(REFERENCES[3]), ROWS[3]["answer"]
    one = CiderD(REFERENCES)
    shuffled = random.Random(0).sample(REFERENCES, len(REFERENCES))
    assert CiderD(shuffled)(answer, question) == one(answer, question) != CiderD(REFERENCES[:9])(answer, question)
    assert one(REFERENCES[3], question) == pytest.approx(100)
    assert one("", question) == 0 == one("unheard words alone here", question)
    for few in ([], ["the same"], ["the same"] * 5):
        with pytest.raises(InputError, match="config: k: cider_d needs the reference answers of two questions"):
            metric_of("cider_d", "k", few)


@pytest.mark.parametrize(
    ("answer", "question", "points"),
    [
        ("B", qa("B", options=["red", "blue"]), 100.0),
        ("It is red.", qa("B", options=["red", "blue"]), 0.0),
        ("I cannot say.", qa("B", options=["red", "blue"]), 0.0),  # no choice is made
        ("B", qa("green", options=["red", "blue"]), None),  # the reference names no option
        ("Yes.", qa("yes"), 100.0),
        ("No.", qa("yes"), 0.0),
        ("", qa("yes"), 0.0),
        ("three", qa("3"), 100.0),
        ("a couch", qa("a sofa"), None),
        ("Something else happens here.", qa("A red ring grows and then a blue square leaves."), None),
    ],
)
def test_correct(answer, question, points):
    assert correct(answer, question) == points


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("It happens from 3.2 to 7 seconds.", [(3.2, 7)]),
        ("3.2s - 7s", [(3.2, 7)]),
        ("between 3 and 7", [(3, 7)]),
        ("three and 3 and 7", []),
        ("[3, 7]", [(3, 7)]),
        ("[[1, 2], [3.5, 4.25]]", [(1, 2), (3.5, 4.25)]),
        ("0:12 - 0:20", [(12, 20)]),
        ("00:01:02.5–00:01:09", [(62.5, 69)]),
        ("12:30 to 12:45. Then 13:00-13:10", [(750, 765), (780, 790)]),
        ("1 minute to 80 s", [(60, 80)]),
        ("2 to 3 minutes", [(120, 180)]),
        ("from second 4 to second 9", [(4, 9)]),
        ("It starts at 5 seconds and ends at around 9 seconds.", [(5, 9)]),
        ("First event, from 00 to 24. Second event, from 25 to 99.", [(0, 24), (25, 99)]),
        ('{"start_time": "3.2", "end_time": "7.5"}', [(3.2, 7.5)]),
        ('{"start": 1, "end": "0:09"} and {"from": 20, "to": 30}', [(1, 9), (20, 30)]),
        ('{"start": null, "end": 3}', []),
        ('<think>from 1 to 2</think> <answer>{"start_time": "3", "end_time": "7"}</answer>', [(3, 7)]),
        ("<answer>1 to 2</answer> no: <answer>3 to 7</answer>", [(3, 7)]),
        ("from 7 to 3", []),
        ("from 5 to 5", []),
        ("version 1.2-3.4.5", []),
        ("", []),
    ],
)
def test_time_ranges(text, ranges):
    assert time_ranges(text) == ranges


@pytest.mark.parametrize(
    ("answer", "reference", "points"),
    [
        ("from 2 to 6", "from 4 to 8", 100 * 2 / 6),
        ("from 2 to 6", "from 2 to 6", 100),
        ("from 0 to 2", "from 4 to 8", 0),
        ("from 4 to 8", "0:04 - 0:08", 100),
        ("soon", "from 4 to 8", 0),
        ("from 8 to 4", "from 4 to 8", 0),
        ("0 to 4, 6 to 8", "2 to 7", 100 * 3 / 8),  # 2..4 and 6..7 of 0..8
        ("0 to 4, 2 to 8", "0 to 8", 100),  # told twice, counted once
        ("from 4 to 8", "at the end", None),
    ],
)
def test_tiou_by_hand(answer, reference, points):
    got = tiou(answer, qa(reference))
    assert got == points if points is None else got == pytest.approx(points)


TIMES = st.integers(0, 500).map(lambda n: n / 4)


@settings(max_examples=200, deadline=None)
@given(a=TIMES, b=TIMES, c=TIMES, d=TIMES)
def test_tiou_of_one_range_each_is_the_coded_formula(a, b, c, d):
    """max(0, min(e) - max(s)) / (max(e) - min(s)): appletea233/Temporal-R1, verl/utils/reward_score/tvg.py."""
    if b <= a or d <= c:
        return
    coded = max(0.0, min(b, d) - max(a, c)) / (max(b, d) - min(a, c))
    assert tiou(f"from {a} to {b} seconds", qa(f"{c} - {d}")) == pytest.approx(100 * coded)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="0123456789:.-, to[]{}\"'abs", max_size=40))
def test_no_text_breaks_the_parser(text):
    assert all(b > a >= 0 for a, b in time_ranges(text))
    assert time_ranges(f"<answer>{text}</answer>") == time_ranges(text)


def test_timed_events():
    """Both ways in which VidChain's chains end: captions with their time behind or before."""
    told = "From 24 to 99, a ring grows. A man runs, from 00 to 23. Nothing else. Second event, from 10 to 5."
    assert [(span, " ".join(text.split())) for span, text in timed_events(told)] == [
        ((0.0, 23.0), "A man runs, ."),
        ((24.0, 99.0), ", a ring grows."),
    ]


def by_all_matchings(truth, told, meteor):
    """The largest sum over one-to-one matchings that keep the order, by trying them all."""
    best = 0.0
    for n in range(1, min(len(truth), len(told)) + 1):
        for rows in itertools.combinations(range(len(truth)), n):
            for columns in itertools.combinations(range(len(told)), n):
                total = 0.0
                for i, j in zip(rows, columns, strict=True):
                    (a, b), caption = truth[i]
                    (c, d), said = told[j]
                    total += max(0.0, min(b, d) - max(a, c)) / (max(b, d) - min(a, c)) * meteor(said, qa(caption))
                best = max(best, total)
    return best


def test_soda_c_by_hand_and_by_all_matchings():
    """F1 of the best sum of tIoU * METEOR: fujiso/SODA, soda_c."""
    pytest.importorskip("nltk")
    soda, meteor = metric_of("soda_c", "k"), metric_of("meteor", "k")
    truth = qa("From 0 to 10, a red ring grows. From 10 to 20, a blue cross moves left.")
    one = meteor("a red ring grows", qa("a red ring grows"))
    assert soda("A red ring grows, from 0 to 10.", truth) == pytest.approx(
        2 * (one / 1) * (one / 2) / (one / 1 + one / 2)
    )
    assert soda("A red ring grows, from 0 to 5.", truth) == pytest.approx(2 / 3 * one / 2)
    assert soda("A red ring grows.", truth) == 0 == soda("", truth)
    assert soda("From 0 to 10, a ring.", qa("no time is told")) is None
    rng = random.Random(3)
    words = "a red blue ring cross grows moves left".split()

    def text():
        events = []
        for _ in range(rng.randint(1, 4)):
            start = rng.randint(0, 80)
            events.append(f"From {start} to {start + rng.randint(1, 30)}, {' '.join(rng.choices(words, k=4))}.")
        return " ".join(events)

    for _ in range(25):
        reference, answer = text(), text()
        events, said = timed_events(reference), timed_events(answer)
        best = by_all_matchings(events, said, meteor)
        assert soda(answer, qa(reference)) == pytest.approx(2 * best / (len(events) + len(said)))


PLUGIN = """
class Of:
    @staticmethod
    def length(answer, question):
        return min(100, len(answer)) if question.answer else None

def nothing(answer, question): return None
def much(answer, question): return 130
def words(answer, question): return "many"
def nan(answer, question): return float("nan")
def broken(answer, question): return answer["x"]
number = 3
"""


def test_a_plug_in(tmp_path, monkeypatch):
    (tmp_path / "my_metrics_of_a_test.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    name = "my_metrics_of_a_test"
    assert metric_of(f"{name}:Of.length", "k")("abc", qa("x")) == 3.0
    assert metric_of(f"{name}:nothing", "k")("abc", qa("x")) is None
    for function, said in (
        ("much", "got 130.0, which is not from 0 to 100"),
        ("nan", "got nan, which is not from 0 to 100"),
        ("words", "got 'many', which is no number"),
        ("broken", "TypeError"),
    ):
        with pytest.raises(InputError, match=f"config: pairs.select.metric '{name}:{function}': question 'q1'.*{said}"):
            metric_of(f"{name}:{function}", "pairs.select.metric")("abc", qa("x"))
    for wrong, said in (
        (f"{name}:number", "is not a function"),
        (f"{name}:absent", "cannot be imported"),
        ("no_such_module:f", "cannot be imported"),
        (":f", "cannot be imported"),
        ("bleu", f"must be one of {', '.join(METRICS)}, or module:function, got 'bleu'"),
    ):
        with pytest.raises(InputError, match=rf"config: pairs\.mdpo\.metric.*{said}"):
            metric_of(wrong, "pairs.mdpo.metric")
