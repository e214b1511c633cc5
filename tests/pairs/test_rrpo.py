"""RRPO's pairs from a scripted model: what it says is a function of the frames it was shown and of the question."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import GenerationConfig, PairsConfig, RRPOPairsConfig, RunConfig, VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_jsonl
from tempo_fast.generation import AnswerCache, RefusedRequest, Request, make_engine
from tempo_fast.pairs.answers import is_correct, prompt_of
from tempo_fast.pairs.asking import ask_by_video
from tempo_fast.pairs.formats import mask, read_pairs, write_pairs
from tempo_fast.pairs.method import Context, Item
from tempo_fast.pairs.phrases import MARK_PROMPT, REWRITE_PROMPT, by_judge, by_rules
from tempo_fast.pairs.prompts import PromptPool
from tempo_fast.pairs.rrpo import make_rrpo
from tempo_fast.pairs.run import make_pairs
from tempo_fast.pairs.spans import token_safe
from tempo_fast.schema import PreferenceRecord, QARecord

FRAMES = 12
CONFIG = PairsConfig(method="rrpo", kinds=["mask_local_shuffle", "mask", "shuffle"], r=[8, 2])


@dataclass(frozen=True)
class FramesPlan:
    video: str
    indices: tuple[int, ...]
    blank: tuple[bool, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.video}:{self.indices}:{self.blank}"


class FramesReader:
    """Frame i of a video is number 10 i; "short" has four frames of which two are the same."""

    settings: dict[str, str] = {}

    def plan(self, path):
        if "gone" in path:
            raise InputError(f"{path}: no such file")
        return FramesPlan(path, (0, 0, 10, 20) if "short" in path else tuple(range(0, 10 * FRAMES, 10)))

    def plan_frames(self, path, order, blank=()):
        clean = self.plan(path).indices
        return FramesPlan(path, tuple(clean[k] for k in order), tuple(blank) if any(blank) else ())


OPTIONS = ["a dog", "a hot dog", "a goose", "two cats"]
OPEN = "A man in a red coat walks along the beach."


def questions(video):
    return (
        QARecord(f"{video}/mcq", video, "Which animal?", "C", OPTIONS),
        QARecord(f"{video}/text", video, "Which animal again?", "(B) a hot dog", OPTIONS),
        QARecord(f"{video}/yes", video, "Does it rain?", "Yes."),
        QARecord(f"{video}/number", video, "How many rings?", "three"),
        QARecord(f"{video}/short", video, "What does he eat?", "soup"),
        QARecord(f"{video}/open", video, "What happens?", OPEN),
    )


def item(name, asked=None):
    return Item(name, digest(["bytes", name]), questions=questions(name) if asked is None else asked)


SAYS = {
    "Which animal?": ["C", "The answer is A.", "(D) two cats", "no idea", "(C)"],
    "Which animal again?": ["(B) a hot dog", "It is a goose.", "C. a goose", "(A) or (D)"],
    "Does it rain?": ["Yes, it rains.", "No, it does not.", "No.", "It may."],
    "How many rings?": ["3", "There are two rings.", "Four.", "some"],
    "What does he eat?": ["Soup.", "bread", "a soup", ""],
    "What happens?": [OPEN, "A man in a blue coat walks along the beach.", "A woman in a red coat swims."],
}


def says(plan, prompt):
    """Clean videos are told right (the first saying), perturbed ones this way or that."""
    of = SAYS[prompt.splitlines()[0]]
    clean = not plan.blank and list(plan.indices) == sorted(plan.indices)
    return of[0] if clean else of[int(digest([plan.key, prompt])[:8], 16) % len(of)]


class Model:
    def __init__(self, say=says):
        self.say, self.asked = say, []

    def __call__(self, requests, desc):
        self.asked += requests
        for r in requests:
            if any("broken" in p.video for p in r.plans):
                raise InputError(f"{r.plans[0].video}: cannot be decoded")
        return [self.say(r.plans[0], r.prompt) for r in requests]


def words(prompt, tag):
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", prompt, re.DOTALL)[1]


class Judge:
    """Right is what shares the reference's first two words; the key phrases are coat colours and verbs."""

    marks = ("red", "blue", "walks", "swims", "man", "woman")

    def __init__(self):
        self.asked = []

    def __call__(self, requests, desc):
        self.asked += requests
        assert all(r.temperature == 0.0 and not r.plans for r in requests)
        return [self.reply(r) for r in requests]

    def reply(self, r):
        if r.prompt == MARK_PROMPT:
            first, second = (words(r.turns[0][0], tag) for tag in ("first", "second"))
            copies = [re.sub(rf"\b({'|'.join(self.marks)})\b", r"<MASK>\1</MASK>", t) for t in (first, second)]
            return f"Here:\n<first>{copies[0]}</first>\n<second>\n{copies[1]}\n</second>"
        if r.prompt == REWRITE_PROMPT:
            return words(r.turns[0][0], "first").replace("red", "blue")
        if "Where do they say different things?" in r.prompt:
            return "The coat is red in one and blue in the other."
        same = words(r.prompt, "reference").split()[:5] == words(r.prompt, "answer").split()[:5]
        return "RIGHT" if same else "WRONG"


def context(config=CONFIG, model=None, judge=None, seed=3):
    ask = model or Model()
    return Context(ask, judge, FramesReader(), config, seed, PromptPool(), {"engine": {"model": "m0"}})


MANY = [item(f"{i}.mp4") for i in range(12)]


def test_wrong_answers_about_perturbed_frames():
    model = Model()
    part = make_rrpo(MANY, context(model=model))
    by_id = {qa.id: qa for i in MANY for qa in i.questions}
    asked = {(r.plans[0], r.prompt) for r in model.asked}
    assert part.records and [r.id for r in part.records] == list(dict.fromkeys(r.id for r in part.records))
    seen = Counter()
    for record in part.records:
        qa = by_id[record.provenance["question"]]
        assert record.id == f"{qa.id}/r{record.r}" and record.video == qa.video
        assert record.chosen == qa.answer and record.prompt == prompt_of(qa)
        assert record.provenance["engine"] == {"model": "m0"} and record.provenance["frames"] == FRAMES
        texts = [x.text for x in record.rejected]
        assert len({t.casefold().strip(".") for t in texts}) == len(texts)
        for x in record.rejected:
            assert is_correct(qa, x.text) is False and x.r == record.r
            # what the answer was about: the frames that order and blank tell
            shown = FramesReader().plan_frames(qa.video, x.order, x.blank)
            assert (shown, record.prompt) in asked and says(shown, record.prompt) == x.text
            assert len(x.order) == FRAMES and 0 < x.broken <= 1
            dark = sum(x.blank)
            assert (FRAMES / 4 <= dark <= FRAMES / 2) if x.kind.startswith("mask") else dark == 0
            assert x.spans and x.chosen_spans
            for text, spans in ((x.text, x.spans), (record.chosen, x.chosen_spans)):
                assert spans == token_safe(text, spans)
            assert all(span in record.spans for span in x.chosen_spans)
            seen[x.kind, record.provenance["question_kind"]] += 1
    assert {kind for kind, _ in seen} == set(CONFIG.kinds) and {q for _, q in seen} == {"mcq", "yes_no", "short"}
    made = Counter()
    for (r, kind), tally in part.tallies.items():
        assert tally.made + sum(tally.filtered.values()) == sum(len(i.questions) for i in MANY), (r, kind)
        assert {"right", "undecided", "empty"} <= set(tally.filtered)
        made[r] += tally.made
    assert made == {r: sum(len(x.rejected) for x in part.records if x.r == r) for r in CONFIG.r}
    assert sum(t.filtered["duplicate"] for t in part.tallies.values()) > 0
    # open answers and short ones that rules cannot tell need a judge: counted, never paired
    assert part.counts["questions_open"] == 12 and part.counts["perturbed_undecided"] > 12 * 6
    assert not any("/open" in r.id or "/short" in r.id for r in part.records)
    assert part.failed == [] and part.problems == []


def test_key_phrases_by_rules():
    part = make_rrpo(MANY, context())
    found = set()
    for record in part.records:
        for x in record.rejected:
            assert record.provenance["spans"][x.kind] == "rules"
            found.add((mask(record.chosen, x.chosen_spans), mask(x.text, x.spans)))
    assert ("<MASK>C</MASK>", "The answer is <MASK>A</MASK>.") in found
    assert ("(<MASK>B</MASK>) a <MASK>hot dog</MASK>", "It is a <MASK>goose</MASK>.") in found or (
        "(<MASK>B) a hot dog</MASK>", "It is a <MASK>goose</MASK>.") in found  # fmt: skip
    assert ("<MASK>Yes</MASK>.", "<MASK>No</MASK>, it does not.") in found
    assert ("<MASK>three</MASK>", "There are <MASK>two rings</MASK>.") in found


def test_the_same_bucket_or_another_gives_the_same_records():
    whole = make_rrpo(MANY, context())
    again = make_rrpo(MANY, context())
    assert whole == again
    by_question: dict[str, list[PreferenceRecord]] = {}
    for record in whole.records:
        by_question.setdefault(record.provenance["question"], []).append(record)
    # each question alone, and videos in another order
    for one in (MANY[0], MANY[7]):
        for qa in one.questions:
            alone = make_rrpo([replace(one, questions=(qa,))], context())
            assert alone.records == by_question.get(qa.id, [])
    back = make_rrpo(MANY[::-1], context())
    assert sorted(back.records, key=lambda r: r.id) == sorted(whole.records, key=lambda r: r.id)
    assert make_rrpo(MANY, context(seed=4)).records != whole.records


def test_files_are_the_same_whatever_the_buckets(tmp_path):
    class Engine:
        seed = 0

        def __init__(self, ask):
            self.ask = ask

        def provenance(self):
            return {"model": "m0"}

        def generate(self, requests, desc=""):
            return self.ask(requests, desc)

    files = []
    for size in (64, 2):
        out = tmp_path / str(size)
        config = replace(CONFIG, bucket_videos=size)
        audit = make_pairs(MANY, Engine(Model()), FramesReader(), config, out, judge=Engine(Judge()), seed=3)
        files.append([(out / f"r{r}.jsonl").read_bytes() for r in CONFIG.r])
        assert len(list((out / "parts").iterdir())) > (size == 2) * 4
    assert files[0] == files[1] and all(files[0])
    assert audit["pairs"] == {"8": sum(s["made"] for s in audit["stats"]["8"].values()), "2": audit["pairs"]["2"]}


def test_the_questions_of_a_video_share_what_is_shown():
    model = Model()
    make_rrpo([item("a.mp4")], context(model=model))
    assert len({r.plans[0] for r in model.asked}) == len(CONFIG.r) * len(CONFIG.kinds)
    assert len(model.asked) == 6 * len(CONFIG.r) * len(CONFIG.kinds)


def test_an_order_that_swaps_equal_frames_is_no_perturbation():
    """A short video is sampled with repeats."""
    one = item("short.mp4", questions("short.mp4")[:1])
    shown = set()
    for seed in range(80):
        model = Model()
        make_rrpo([one], context(replace(CONFIG, kinds=["shuffle"], r=[4]), model, seed=seed))
        shown |= {r.plans[0].indices for r in model.asked}
    assert len(shown) > 8 and (0, 0, 10, 20) not in shown


def test_the_models_own_right_answer_is_chosen():
    def say(plan, prompt):
        clean = not plan.blank and list(plan.indices) == sorted(plan.indices)
        if clean and prompt.startswith("Does it rain?") and plan.video in ("1.mp4", "2.mp4"):
            return "No."
        return says(plan, prompt)

    config = replace(CONFIG, rrpo=RRPOPairsConfig(chosen="model"))
    model = Model(say)
    part = make_rrpo(MANY, context(config, model))
    chosen = {(r.provenance["question"], r.chosen) for r in part.records}
    assert ("0.mp4/text", "(B) a hot dog") in chosen and {c for q, c in chosen if q.endswith("/number")} == {"3"}
    rain = {c for q, c in chosen if q.endswith("/yes")}
    assert rain == {"Yes, it rains."}
    assert not any(q in ("1.mp4/yes", "2.mp4/yes") for q, _ in chosen)
    assert part.counts["clean_wrong"] == 2 and part.counts["clean_undecided"] == 0  # "Soup." is the reference
    assert sum(t.filtered["chosen_not_right"] for t in part.tallies.values()) > 0
    for tally in part.tallies.values():
        assert tally.made + sum(tally.filtered.values()) == 72


def test_a_judge_decides_what_rules_cannot():
    judge = Judge()
    part = make_rrpo(MANY, context(judge=judge))
    judged = [r for r in judge.asked if "You check an answer" in r.prompt]
    assert part.counts["judged"] == len(judged) > 0 and part.counts["judge_unreadable"] == 0
    # rules were not second-guessed, and every answer was judged once
    assert not any("Does it rain?" in r.prompt and words(r.prompt, "answer") == "No." for r in judged)
    assert len({r.prompt for r in judged if "a.mp4" in r.prompt}) == len([r for r in judged if "a.mp4" in r.prompt])
    of_open = [r for r in part.records if r.provenance["question_kind"] == "open"]
    assert of_open and {x.text for r in of_open for x in r.rejected} == set(SAYS["What happens?"][1:])
    for record in of_open:
        for x in record.rejected:
            assert record.provenance["spans"][x.kind] == "judge"
            assert mask(record.chosen, x.chosen_spans) == (
                "A <MASK>man</MASK> in a <MASK>red</MASK> coat <MASK>walks</MASK> along the beach."
            )
            assert mask(x.text, x.spans).count("<MASK>") == 3
    # "bread" is not soup, says the judge; there the words that differ are the key phrase
    assert any(r.id.endswith("/short/r2") and r.rejected[0].text == "bread" for r in part.records)
    assert part.problems == []


def test_replies_that_cannot_be_read_are_neither_right_nor_wrong():
    class Vague(Judge):
        def reply(self, r):
            return "I would say it is wrong, mostly." if "You check" in r.prompt else super().reply(r)

    part = make_rrpo(MANY, context(judge=Vague()))
    plain = make_rrpo(MANY, context())
    assert part.records == plain.records  # as if there were no judge
    assert part.counts["judge_unreadable"] == part.counts["judged"] == len(part.problems) > 0
    assert "not RIGHT, WRONG or UNSURE" in part.problems[0]["what"]
    assert {p["record"] for p in part.problems} <= {qa.id for i in MANY for qa in i.questions}


ONE = [item(f"{i}.mp4", (QARecord(f"{i}/open", f"{i}.mp4", "What happens?", OPEN),)) for i in range(8)]


def test_phrases_that_are_not_in_their_answer_are_reported():
    class Half(Judge):
        """Marks a word that it changes, in the wrong answer alone."""

        def reply(self, r):
            text = super().reply(r)
            if r.prompt != MARK_PROMPT:
                return text
            head, tail = text.split("<second>")
            return f"{head}<second>{tail.replace('blue', 'navy')}"

    part = make_rrpo(ONE, context(judge=Half()))
    blue = [(r, x) for r in part.records for x in r.rejected if "blue" in x.text]
    assert blue
    reported = {p["record"] for p in part.problems if "rejected: 'navy' is not in the answer" in p["what"]}
    for record, x in blue:
        assert record.id in reported
        # the others are kept: all of the chosen one, and what stands before the lost one
        assert x.chosen_spans and mask(x.text, x.spans).startswith("A <MASK>man</MASK> in a blue coat")
    assert not any(x.spans == [] for r in part.records for x in r.rejected)


@pytest.mark.parametrize(
    ("reply", "reason", "told"),
    [
        ("I cannot do that.", "spans_unaligned", "holds no marked copies"),
        ("<first>{first}</first><second>{second}</second>", "spans_unaligned", "marked nothing"),
        ("<first>A <MASK>cat</MASK></first><second><MASK>x</MASK></second>", "spans_unaligned", "'cat' is not in"),
        ("<first>{first} <MASK></first><second>{second}</second>", "spans_unaligned", "is not in the answer"),
    ],
)
def test_without_a_single_phrase_there_is_no_pair(reply, reason, told):
    class Bad(Judge):
        def reply(self, r):
            if r.prompt == MARK_PROMPT:
                tags = {tag: words(r.turns[0][0], tag) for tag in ("first", "second")}
                return reply.format(**tags)
            return super().reply(r)

    part = make_rrpo(ONE, context(judge=Bad()))
    assert part.records == [] and sum(t.filtered[reason] for t in part.tallies.values()) > 4
    assert told in part.problems[0]["what"] and part.problems[0]["record"].endswith(("/r8", "/r2"))


def test_answers_that_say_the_same_are_no_pair():
    class Same(Judge):
        def reply(self, r):
            return "None." if "Where do they say" in r.prompt else super().reply(r)

    judge = Same()
    part = make_rrpo(ONE, context(judge=judge))
    assert part.records == [] and sum(t.filtered["no_difference"] for t in part.tallies.values()) > 4
    assert not any(r.turns for r in judge.asked)


def test_the_rejected_answer_can_be_the_chosen_one_written_again():
    config = replace(CONFIG, rrpo=RRPOPairsConfig(rejected="rewritten"))
    with pytest.raises(InputError, match=r"pairs\.rrpo\.rejected.*judge\.endpoint"):
        make_rrpo(ONE, context(config))
    judge = Judge()
    part = make_rrpo(ONE, context(config, judge=judge))
    assert part.records
    for record in part.records:
        (x,) = record.rejected  # two wrong answers became one text
        assert x.text == OPEN.replace("red", "blue")
        assert mask(record.chosen, x.chosen_spans) == OPEN.replace("red", "<MASK>red</MASK>")
        assert mask(x.text, x.spans) == OPEN.replace("red", "<MASK>blue</MASK>")
        own = record.provenance.get("own_words", {})
        assert own.get(x.kind, x.text) in SAYS["What happens?"][1:]
    assert any("own_words" in r.provenance for r in part.records)

    class Chatty(Judge):
        def reply(self, r):
            return "I am sorry." if r.prompt == REWRITE_PROMPT else super().reply(r)

    part = make_rrpo(ONE, context(config, judge=Chatty()))
    assert part.records == [] and "did not write the chosen answer again" in part.problems[0]["what"]


def test_videos_that_break_leave_the_others():
    items = [item("a.mp4"), item("gone.mp4"), item("broken.mp4"), item("b.mp4")]
    part = make_rrpo(items, context())
    assert {r.video for r in part.records} == {"a.mp4", "b.mp4"}
    reasons = {f["video"]: f["reason"] for f in part.failed}
    assert reasons == {"gone.mp4": "gone.mp4: no such file", "broken.mp4": "broken.mp4: cannot be decoded"}
    assert all(t.filtered["video_failed"] == 12 for t in part.tallies.values())
    assert part.records == [r for i in (0, 3) for r in make_rrpo([items[i]], context()).records]

    class Down(Model):
        def __call__(self, requests, desc):
            raise InputError("generation.endpoint: cannot be reached")

    with pytest.raises(InputError, match="cannot be reached"):
        make_rrpo(items, context(model=Down()))


class Choosy:
    """An engine that refuses some requests, answers the others, and breaks on files."""

    def __init__(self):
        self.asked = []

    def provenance(self):
        return {"model": "m0"}

    def generate(self, requests, desc=""):
        self.asked += requests
        for r in requests:
            if "broken" in r.plans[0].video:
                raise InputError(f"{r.plans[0].video}: cannot be decoded")
        bad = {
            k: "generation.endpoint: refuses (HTTP 400)" for k, r in enumerate(requests) if "long" in r.plans[0].video
        }
        texts = ["" if k in bad else says(r.plans[0], r.prompt) for k, r in enumerate(requests)]
        if bad:
            raise RefusedRequest(bad, texts)
        return texts


@pytest.mark.parametrize("broken", [[], ["broken.mp4"]])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_a_refused_request_fails_its_video_alone(tmp_path, broken, chunk):
    names = ["a.mp4", "long.mp4", *broken, "b.mp4", "also_long.mp4"]
    files = []
    for _ in range(2):
        engine = Choosy()
        with AnswerCache(tmp_path / "answers.jsonl", engine, chunk) as cache:
            part = make_rrpo([item(n) for n in names], context(model=cache.answers))
        files.append((tmp_path / "answers.jsonl").read_bytes())
        assert {f["video"] for f in part.failed} == {"long.mp4", "also_long.mp4", *broken}
        assert len(part.failed) == 2 + len(broken) and all(f["reason"] for f in part.failed)
        assert part.records == make_rrpo([item("a.mp4"), item("b.mp4")], context()).records != []
    assert files[0] == files[1]


def test_groups_of_a_video_that_failed_have_no_answers():
    """Several groups about one video: one that is refused fails it, and it is put down once."""
    plans = [FramesReader().plan(n) for n in ("a.mp4", "b.mp4", "a.mp4", "c.mp4", "d.mp4")]
    groups = [[Request((p,), f"Does it rain?\n{k}")] * 2 for k, p in enumerate(plans)]

    def ask(requests, desc):
        bad = {k: "too long" for k, r in enumerate(requests) if r.prompt.endswith("2")}
        if bad:
            raise RefusedRequest(bad, ["x"] * len(requests))
        return ["x"] * len(requests)

    failed = [{"video": "d.mp4", "reason": "before"}]
    told = ask_by_video(ask, [p.video for p in plans], [*groups[:3], None, groups[4]], "", failed)
    assert told == [None, ["x", "x"], None, None, None]
    assert failed == [{"video": "d.mp4", "reason": "before"}, {"video": "a.mp4", "reason": "too long"}]


def test_a_reference_that_names_no_option_is_reported():
    bad = QARecord("q7", "a.mp4", "Which animal?", "a bird", OPTIONS)
    part = make_rrpo([item("a.mp4", (bad, *questions("a.mp4")))], context())
    assert part.problems == [{"record": "q7", "what": "field 'answer' names no option: 'a bird'"}]
    assert all(t.filtered["no_reference"] == 1 for t in part.tallies.values())
    assert part.records and not any(r.id.startswith("q7") for r in part.records)


@pytest.mark.parametrize("judge", [None, Judge()])
def test_records_survive_the_released_format(tmp_path, judge):
    part = make_rrpo(MANY, context(judge=judge))
    path = tmp_path / "rrpo.jsonl"
    write_pairs(path, part.records, "rrpo")
    back = read_pairs(path, "rrpo")
    assert sorted(back, key=lambda r: r.id) == sorted(part.records, key=lambda r: r.id)
    # the tags alone hold the spans: what others read
    for _, row in read_jsonl(path):
        row.pop("tempo_fast")
        (tmp_path / "plain.jsonl").open("a").write(json.dumps(row) + "\n")
    spans = Counter()
    for record in read_pairs(tmp_path / "plain.jsonl", "rrpo"):
        for x in record.rejected:
            spans[record.video, record.chosen, str(x.chosen_spans), x.text, str(x.spans)] += 1
    expected = Counter(
        (r.video, r.chosen, str(x.chosen_spans), x.text, str(x.spans)) for r in part.records for x in r.rejected
    )
    assert spans == expected


WORDS = "A man walks. It's 3.5 m! 👍🏽 red, (blue) don't 红色".split()
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=2, max_size=8)


@given(SENTENCES.map(" ".join), SENTENCES.map(" ".join), st.data())
@settings(max_examples=100)
def test_a_judge_that_marks_words_marks_them_exactly(chosen, rejected, data):
    places = []
    for text in (chosen, rejected):
        cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
        ranges = [[a, b] for a, b in zip(cuts[::2], cuts[1::2], strict=False) if text[a:b].strip()]
        places.append(ranges)
    copies = [mask(t, p) for t, p in zip((chosen, rejected), places, strict=True)]
    replies = iter([["It differs."], [f"<first>{copies[0]}</first>\n<second>{copies[1]}</second>"]])
    (got,) = by_judge([(QARecord("q", "v", "What?", chosen), chosen, rejected)], lambda requests, desc: next(replies))
    assert got.chosen_spans == token_safe(chosen, places[0]) and got.spans == token_safe(rejected, places[1])
    assert bool(got.reason) == (not any(places))
    assert bool(got.problems) == bool(got.reason)


@given(st.lists(st.sampled_from("red dog two the B. yes no (C) left".split()), max_size=6).map(" ".join), st.data())
def test_rules_mark_both_sides_or_none(text, data):
    qa = data.draw(st.sampled_from(questions("a.mp4")))
    found = by_rules(qa, qa.answer, text)
    if found is not None:
        assert found.chosen_spans or found.spans
        assert found.spans == token_safe(text, found.spans) and not found.reason
    elif is_correct(qa, text) is False:
        pytest.fail(f"{text!r} is wrong by rules, whose phrase is not found")


def test_frames_of_all_kinds_are_allowed():
    RunConfig(pairs=replace(CONFIG, kinds=["mask_local_shuffle", "speed", "drop"], r=[16, 8, 4, 2])).validate()
    with pytest.raises(InputError, match=r"pairs\.kinds"):
        RunConfig(pairs=replace(CONFIG, kinds=["splice"])).validate()


# -- real videos, the real model ------------------------------------------------------------------------------------


def world_questions(folder):
    """Those that the tiny model has a chance with; it was taught to answer without options, which yes and no are."""
    for _, row in read_jsonl(folder / "questions.jsonl"):
        if row["type"] in ("order_yes_no", "direction"):
            options = row["options"] if row["type"] == "order_yes_no" else []
            answer = row["options"][row["answer"]]
            yield QARecord(row["id"], str(folder / row["video"]), row["question"], answer, options, row["type"])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from tempo_fast.tinyworld.generate import generate_world

    out = tmp_path_factory.mktemp("world")
    generate_world(out, seed=4, n_train=2, n_heldout=0, questions_per_video=7)
    return out


def real(world, tmp_path):
    from tempo_fast.models.load import load_bundle
    from tempo_fast.video.probe import probe
    from tempo_fast.video.reader import VideoReader

    bundle = load_bundle("tinyworld", "float32", "cpu")
    reader = VideoReader(VideoConfig(backend="pyav", fps=2.0, max_frames=16), bundle.geometry)
    engine = make_engine(GenerationConfig(max_new_tokens=16, batch_size=16), bundle, reader, None, 0)
    cache = AnswerCache(Path(tmp_path) / "answers.jsonl", engine)
    asked: dict[str, list[QARecord]] = {}
    for qa in world_questions(world):
        asked.setdefault(qa.video, []).append(qa)
    items = [Item(video, probe(video).digest, questions=tuple(qas)) for video, qas in asked.items()]
    config = replace(CONFIG, r=[4], kinds=["mask_local_shuffle", "shuffle"])
    context = Context(cache.answers, None, reader, config, 0, PromptPool(), {"engine": engine.provenance()})
    return bundle, reader, make_rrpo(items, context)


def test_end_to_end_with_the_tiny_model(world, tmp_path):
    from tempo_fast.training.data import preference_items

    bundle, reader, part = real(world, tmp_path)
    assert part.failed == [] and part.problems == []
    assert {r.provenance["question_kind"] for r in part.records} == {"mcq", "short"}
    items = preference_items(bundle, reader, part.records).items
    for record, built in zip(part.records, items, strict=True):
        assert len(built.tree.branches) == 1 + len(record.rejected)
        assert built.tree.unaligned == []  # every span has its tokens
        for branch, marks in zip(built.tree.branches[1:], built.tree.pair_spans, strict=True):
            assert any(branch.spans) and any(marks)
    _, _, again = real(world, tmp_path)
    assert again.records == part.records
