"""LeanPO's pairs: what is asked, what is kept, that no hint reaches the training prompt; and once with a real model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scripted_questions import QuestionReader, Talker, context, items

from tempo_fast.config import GenerationConfig, LeanPOPairsConfig, MDPOPairsConfig, PairsConfig, VideoConfig
from tempo_fast.config.pairs import check_pairs
from tempo_fast.errors import InputError
from tempo_fast.evaluation.trust import add_rewards, trust_reward_correlation
from tempo_fast.generation import make_engine
from tempo_fast.pairs.answers import prompt_of
from tempo_fast.pairs.items import question_items
from tempo_fast.pairs.leanpo import HINT_PROMPT, KIND, REFLECT_PROMPT, make_leanpo, quotes_hint
from tempo_fast.pairs.metrics import rouge_l
from tempo_fast.pairs.run import make_pairs
from tempo_fast.schema import PreferenceRecord, QARecord, read_records
from tempo_fast.trees.vision import FeatureCache
from tempo_fast.video.augment import Augmentation, draw_augmentation
from tempo_fast.video.reader import VideoReader


def config(**how):
    return PairsConfig(method="leanpo", r=[16], leanpo=LeanPOPairsConfig(**how))


def turn_of(r):
    """Which of the three requests this is."""
    if r.prompt.startswith(HINT_PROMPT.split("{")[0]):
        return "first"
    return "second" if r.prompt.startswith(REFLECT_PROMPT.split("{")[0]) else "rejected"


def script(**texts):
    said = {"first": "A ring grows.", "second": "A red ring grows slowly.", "rejected": "A square.", **texts}
    return Talker(lambda r: said[turn_of(r)])


def test_what_is_asked_and_what_becomes_of_it():
    engine = script()
    (item,) = items("a.mp4")
    (question,) = item.questions
    part = make_leanpo([item], context(config(), engine))
    asked = {turn_of(r): r for r in engine.asked}
    assert len(engine.asked) == 3 and set(asked) == {"first", "second", "rejected"}
    assert question.answer in asked["first"].prompt and asked["first"].prompt.endswith(prompt_of(question))
    for told in (question.answer, "A ring grows.", prompt_of(question)):
        assert told in asked["second"].prompt
    assert asked["rejected"].prompt == prompt_of(question)  # no hint
    assert not any(r.turns or r.sample for r in engine.asked)
    for turn, top_p in (("first", 0.9), ("second", 0.9), ("rejected", 1.0)):
        assert (asked[turn].temperature, asked[turn].top_p) == (1.0, top_p)
    (whole,), (same,), (sparse,) = (asked[t].plans for t in ("first", "second", "rejected"))
    assert whole == same and len(whole.indices) == 8 and whole.augment is None
    assert sparse.indices in ((0,), (0, 70)) and isinstance(sparse.augment, Augmentation)

    (record,) = part.records
    assert (record.id, record.video, record.r) == ("a.mp4#0/r16", "a.mp4", 16)
    assert record.prompt == prompt_of(question) and question.answer not in record.prompt
    assert record.chosen == "A red ring grows slowly."
    (one,) = record.rejected
    assert (one.text, one.kind, one.r) == ("A square.", KIND, 16) and one.kept == len(sparse.indices) / 8
    assert one.spans and record.spans == one.chosen_spans != []
    p = record.provenance
    assert p["first"] == "A ring grows." and p["reference"] == question.answer and p["video_digest"] == item.digest
    assert p["scores"] == {
        "metric": "rouge_l",
        "chosen": round(rouge_l(record.chosen, question), 4),
        "rejected": [round(rouge_l(one.text, question), 4)],
    }
    assert p["frames"] == {"chosen": 8, "rejected": list(sparse.indices)} and p["augment"] == sparse.augment._asdict()
    json.dumps(p)
    assert part.tally(16, KIND).row()["chosen_points"] == p["scores"]["chosen"]
    assert part.counts["questions"] == 1


@pytest.mark.parametrize(
    ("texts", "how", "reason"),
    [
        ({"second": " "}, {}, "empty"),
        ({"rejected": ""}, {}, "empty"),
        ({"rejected": "..."}, {}, "empty"),
        ({"rejected": "a red ring grows slowly"}, {}, "no_difference"),
        ({"second": "According to the given hints, a ring grows."}, {}, "quotes_hint"),
        ({"first": "As the hints say, a ring grows."}, {"reflection": False}, "quotes_hint"),
        ({"first": "As the hints say, a ring grows."}, {}, None),  # the second is what counts
    ],
)
def test_filters(texts, how, reason):
    part = make_leanpo(items("a.mp4"), context(config(**how), script(**texts)))
    assert part.tally(16, KIND).filtered == ({reason: 1} if reason else {})
    assert len(part.records) == (reason is None)


@pytest.mark.parametrize("word", ["hints", "reflection", "augment"])
def test_switches(word):
    engine = script()
    part = make_leanpo(items("a.mp4"), context(config(**{word: False}), engine))
    (record,) = part.records
    turns = [turn_of(r) for r in engine.asked]
    if word == "hints":
        assert turns == ["rejected", "rejected", "second"]  # the question alone, about the whole and the sparse video
        assert [len(r.plans[0].indices) == 8 for r in engine.asked] == [True, False, True]
    elif word == "reflection":
        assert turns == ["first", "rejected"] and record.chosen == "A ring grows." and "first" not in record.provenance
    else:
        assert turns == ["first", "rejected", "second"]
        assert record.provenance["augment"] is None and engine.asked[1].plans[0].augment is None


@pytest.mark.parametrize(
    ("answer", "quotes"),
    [
        ("Based on the given hints, he runs.", True),
        ("Based on the information provided, he runs.", True),
        ("According to the reference answer, he runs.", True),
        ("From the details you have given, he runs.", True),
        ("As stated in the hints, he runs.", True),
        ("My previous reply was wrong: he runs.", True),
        ("Here is the improved answer: he runs.", True),
        ("He runs. Give the new reply alone, as if it were the first.", True),  # the instruction's own words
        ("He runs to get help and gives them the text.", False),
        ("The man is given information by the guide.", False),
        ("Based on the video, he runs.", False),
        ("She reads the details of the description and takes notes.", False),
        ("The first answer on the board is wrong.", False),
        ("", False),
    ],
)
def test_answers_that_speak_of_hints(answer, quotes):
    assert quotes_hint(answer, QARecord("q", "v", "What does he do?", "He runs.")) == quotes


def test_a_video_about_hints_may_be_spoken_of():
    own = QARecord("q", "v", "What do the hints say?", "According to the hints, the thief is tall.")
    assert not quotes_hint("According to the hints, he is tall.", own)
    assert quotes_hint("According to the given information, he is tall.", own)


def test_frames_and_augmentation_are_drawn_per_video():
    many = items(*(f"{i}.mp4" for i in range(40)), questions=2)
    engine = Talker()
    part = make_leanpo(many, context(config(), engine))
    by_video: dict[str, set] = {}
    for r in engine.asked:
        if turn_of(r) == "rejected":
            by_video.setdefault(r.plans[0].video, set()).add(r.plans[0])
    assert all(len(plans) == 1 for plans in by_video.values())  # both questions see the same
    plans = [plan for (plan,) in by_video.values()]
    assert 8 < sum(len(p.indices) == 1 for p in plans) < 32
    assert len({p.augment for p in plans}) == 40
    assert draw_augmentation(1, 90, 160) not in {p.augment for p in plans}
    assert part.counts["questions"] == 80
    engine = Talker()
    make_leanpo(many, context(config(frames=[2]), engine, seed=1))
    again = [r.plans[0] for r in engine.asked if turn_of(r) == "rejected"]
    assert {len(p.indices) for p in again} == {2} and not {p.augment for p in again} & {p.augment for p in plans}


def test_a_bad_video_is_named_and_the_others_go_on():
    many = items("gone.mp4", "a.mp4", "broken.mp4", questions=2)
    part = make_leanpo(many, context(config(), script()))
    assert {f["video"] for f in part.failed} == {"gone.mp4", "broken.mp4"} and len(part.failed) == 2
    assert [x.video for x in part.records] == ["a.mp4"] * 2
    assert part.tally(16, KIND).filtered == {"video_failed": 4}


def test_company_changes_nothing():
    many = items(*(f"{i}.mp4" for i in range(7)), questions=3)
    together = make_leanpo(many, context(config()))
    alone = [make_leanpo([one], context(config())) for one in many]
    assert together.records == [x for part in alone for x in part.records] and len(together.records) > 15
    assert together.counts == sum((part.counts for part in alone), type(together.counts)())
    assert make_leanpo(many[::-1], context(config())).records == [x for p in alone[::-1] for x in p.records]


def test_buckets_and_runs_change_no_byte(tmp_path):
    many = items(*(f"{i}.mp4" for i in range(9)), questions=2)

    def run(name, size, seed=0):
        own = replace(config(), bucket_videos=size)
        audit = make_pairs(many, Talker(seed=seed), QuestionReader(), own, tmp_path / name, seed=seed)
        return (tmp_path / name / "r16.jsonl").read_bytes(), audit

    (one, audit), (other, _) = run("a", 64), run("b", 2)
    assert one == other and audit["counts"]["questions"] == 18
    assert audit["records"]["16"] + sum(audit["stats"]["16"][KIND]["filtered"].values()) == 18
    assert run("c", 64, seed=1)[0] != one


def test_settings_are_checked():
    check_pairs(config())
    for key, wrong in (("frames", []), ("frames", [0]), ("top_p", 2.0), ("rejected_top_p", 0.0), ("temperature", 0.0)):
        with pytest.raises(InputError, match=rf"pairs\.leanpo\.{key} must be"):
            check_pairs(config(**{key: wrong}))
    with pytest.raises(InputError, match=r"pairs\.leanpo\.metric must be one of"):
        make_leanpo(items("a.mp4"), context(config(metric="bleu"), script()))


# -- the embedded model and real videos -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from tempo_fast.tinyworld.generate import generate_world

    folder = tmp_path_factory.mktemp("world")
    generate_world(folder, seed=11, n_train=3, n_heldout=0, questions_per_video=0)
    rows = []
    for n, line in enumerate((folder / "truth.jsonl").read_text().splitlines()):
        truth = json.loads(line)
        told = " ".join(e["text"] if isinstance(e, dict) else e for e in truth["events"])
        rows.append(
            {"id": f"q{n}", "video": truth["video"], "question": "Describe this video in order.", "answer": told}
        )
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return question_items(path)


@pytest.fixture(scope="module")
def bundle():
    from tempo_fast.models.load import load_bundle

    return load_bundle("tinyworld", "float32", "cpu")


def model_run(bundle, many, own, out):
    video = VideoConfig(backend="pyav", fps=2, min_frames=4, max_frames=32, min_pixels=3136, max_pixels=4704)
    reader = VideoReader(video, bundle.geometry)
    engine = make_engine(GenerationConfig(max_new_tokens=24, batch_size=8), bundle, reader, FeatureCache(), 0)
    audit = make_pairs(many, engine, reader, own, out, seed=5)
    return read_records(out / "r16.jsonl", PreferenceRecord), audit


def test_a_real_model_and_real_videos(world, bundle, tmp_path):
    many = world
    records, audit = model_run(bundle, many, config(), tmp_path / "one")
    assert audit["failed"] == [] and len(records) == len(many) == 3
    for x in records:
        assert x.prompt == "Describe this video in order." and x.chosen and x.rejected[0].text
        assert set(x.provenance["scores"]) == {"metric", "chosen", "rejected"}
        assert 20 <= x.provenance["augment"]["height"] < 112 and x.provenance["frames"]["chosen"] >= 4
    assert model_run(bundle, many[:1], config(), tmp_path / "alone")[0] == records[:1]

    video = VideoReader(VideoConfig(backend="pyav", fps=2, max_frames=8, max_pixels=4704), bundle.geometry)
    told = trust_reward_correlation(add_rewards(bundle, video, FeatureCache(), records), resamples=50)
    assert (told["n"], told["items"]) == (3, 6) and -1 <= told["value"] <= 1

    most = replace(config(), method="mdpo", mdpo=MDPOPairsConfig(min_gap=0.1))
    other, audit = model_run(bundle, many, most, tmp_path / "mdpo")
    assert audit["counts"]["questions"] == 3 and len(other) > 0
    assert all(x.provenance["gap"] >= 0.1 and x.chosen != x.rejected[0].text for x in other)
