"""TEMPLE's pairs from a scripted world."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_pairs import CONFIG, VIDEOS, ClipReader, Scripted, pairs_of, say, video

from tempo_fast.config import PairsConfig, RunConfig
from tempo_fast.errors import InputError
from tempo_fast.pairs.aggregate import clean_caption, join_captions
from tempo_fast.pairs.captions import Captioner, windows_of
from tempo_fast.pairs.filters import coinciding, reject_reason
from tempo_fast.pairs.spans import differing_spans
from tempo_fast.perturb import EDITS
from tempo_fast.prompts import CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT
from tempo_fast.schema import PreferenceRecord, read_records


def test_windows_and_captions():
    assert windows_of([3, 0, 2]) == [(3,), (3, 0), (0, 2)]
    engine = Scripted()
    captioner = Captioner(ClipReader(), CONFIG, lambda requests, desc: engine.generate(requests), [])
    got = captioner.captions([(v, range(len(v.clips))) for v in VIDEOS], "captions")
    assert got == [[say(i) for i in range(len(v.clips))] for v in VIDEOS]
    shown = [[p.clips[0] for p in r.plans] for r in engine.asked[:6]]
    assert shown == [[0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert [r.prompt for r in engine.asked[:2]] == [CLIP_PROMPT, WINDOW_PROMPT]
    # keyframes: both frames of a clip are inside it
    assert engine.asked[1].plans[0].clips == (0, 0)


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("In clip 1, x.\nA red ring grows.", "A red ring grows."),
        ("x\n\nBy clip 1, clip 2 is y. Clip 2 ends.\n \n", "By the previous clip, this clip is y. This clip ends."),
        ("clip 12 and eclipse 1", "clip 12 and eclipse 1"),
        ("  \n ", ""),
    ],
)  # fmt: skip
def test_clean_caption(answer, caption):
    assert clean_caption(answer) == caption


def test_join():
    assert join_captions(["One.", " two ", "", 'Three!"']) == 'One. two. Three!"'


@pytest.mark.parametrize(("on", "answer"), [("captions", "windows"), ("frames", "windows"), ("frames", "video")])
def test_records(tmp_path, on, answer):
    config = replace(CONFIG, perturb_on=on, frames_answer=answer)
    records, audit = pairs_of(VIDEOS, Scripted(), config, tmp_path, seed=3)
    assert sorted(records) == [2, 4, 8, 16]
    prompts = {}
    for r, rows in records.items():
        assert rows == read_records(tmp_path / f"r{r}.jsonl", PreferenceRecord)
        for x in rows:
            n = next(len(v.clips) for v in VIDEOS if v.video == x.video)
            assert x.r == r and x.chosen == " ".join(say(i) for i in range(n))
            assert prompts.setdefault(x.video, x.prompt) == x.prompt  # one instruction for all kinds and stages
            texts = [y.text for y in x.rejected]
            assert len(set(texts)) == len(texts) and x.chosen not in texts
            assert [y.kind for y in x.rejected] == [k for k in config.kinds if k in {y.kind for y in x.rejected}]
            for y in x.rejected:
                assert y.text == " ".join(say(i) for i in y.order)
                assert y.r == r and 0 < y.broken <= 1
                assert y.kept == len(y.order) / n
                assert y.spans or y.kind == "drop"
                assert (y.chosen_spans, y.spans) == differing_spans(x.chosen, y.text)
                assert all(span in x.spans for span in y.chosen_spans)
            assert x.spans and all(0 <= s < e <= len(x.chosen) for s, e in x.spans)
            assert x.provenance["engine"]["model"] == "m0" and x.provenance["seed"] == 3
    assert audit == json.loads((tmp_path / "audit.json").read_text())
    for r in (16, 8, 4, 2):
        stats = audit["stats"][str(r)]
        assert audit["pairs"][str(r)] == sum(s["made"] for s in stats.values())
        for kind, s in stats.items():
            assert s["made"] + sum(s["filtered"].values()) == len(VIDEOS)
            if kind == "drop":
                assert s["length_ratio"] < 1 and s["kept"] < 1
            else:
                assert s["kept"] == 1
    # hand-worked: 17 clips differ at r = 16 and 8 (groups of 1 and 2), 6 and 4 clips do not
    assert {"r": [16, 8], "videos": 2, "of": 3} in audit["coincide"]
    # even n at r = 2: two groups, so that the only shuffle is the reverse
    assert audit["stats"]["2"]["reverse"]["filtered"]["duplicate"] == 2  # the videos of 4 and of 6 clips


def test_frames_mode_captions_the_perturbed_windows(tmp_path):
    engine = Scripted()
    config = replace(CONFIG, perturb_on="frames", kinds=["reverse"], r=[16], clip_input="frames")
    pairs_of([VIDEOS[0]], engine, config, tmp_path)
    shown = [tuple(p.clips[0] for p in r.plans) for r in engine.asked]
    assert shown == [(0,), *((i, i + 1) for i in range(5)), (5,), *((i, i - 1) for i in range(5, 0, -1))]


@pytest.mark.parametrize("instruction", ["per_video", "per_pair"])
def test_video_answers_are_made_the_same_way_on_both_sides(tmp_path, instruction):
    """One request each for the whole video and the perturbed one, same instruction; no captions of clips."""

    class Whole(Scripted):
        def _answer(self, r):
            return f"{r.prompt} {super()._answer(r)}"

    engine = Whole()
    config = replace(CONFIG, perturb_on="frames", frames_answer="video", instruction=instruction)
    many = [video(f"{i}.mp4", 6 + i) for i in range(4)]
    records, _ = pairs_of(many, engine, config, tmp_path)
    assert sum(map(len, records.values())) >= 12
    whole = {v.video: tuple(range(len(v.clips))) for v in many}
    asked = {(r.prompt, r.plans[0].video, r.plans[0].clips) for r in engine.asked}
    assert {r.prompt for r in engine.asked} <= set(VIDEO_PROMPTS) and all(len(r.plans) == 1 for r in engine.asked)
    for rows in records.values():
        for x in rows:
            assert (x.prompt, x.video, whole[x.video]) in asked
            for text, order in [(x.chosen, whole[x.video]), *((y.text, y.order) for y in x.rejected)]:
                assert text == f"{x.prompt} " + " ".join(say(i) for i in order)
    clean = [r for r in engine.asked if r.plans[0].clips == whole[r.plans[0].video]]
    assert len(clean) == len({(r.prompt, r.plans[0].video) for r in clean})  # asked once for all kinds and stages
    assert (len(clean) == len(many)) == (instruction == "per_video")


def test_whole_videos_are_edited_in_every_way_but_a_splice(tmp_path):
    """The caption of the edited video says what was shown, and the record how it came about."""
    kinds = [k for k in EDITS if k != "splice"]
    config = replace(CONFIG, perturb_on="frames", frames_answer="video", kinds=kinds, max_length_ratio=9.0)
    RunConfig(pairs=config).validate()
    many = [video(f"{i}.mp4", 6 + i) for i in range(6)]
    records, audit = pairs_of(many, Scripted(), config, tmp_path)
    seen = Counter()
    for x in (x for rows in records.values() for record in rows for x in record.rejected):
        assert not x.blank or len(x.blank) == len(x.order)
        shown = [-1 if black else i for i, black in zip(x.order, x.blank or [False] * len(x.order), strict=True)]
        assert x.text == " ".join(say(i) for i in shown)
        assert bool(x.blank) == x.kind.startswith("mask") and x.broken > 0
        seen[x.kind] += 1
    assert set(seen) == set(kinds)
    assert set(audit["stats"]["16"]) == set(kinds)


@pytest.mark.parametrize("change", [{"kinds": ["splice"]}, {"frames_answer": "windows"}, {"perturb_on": "captions"}])
def test_edits_need_whole_videos_and_one_video(change):
    config = PairsConfig(**{"perturb_on": "frames", "frames_answer": "video", "kinds": ["mask", "drop"], **change})
    with pytest.raises(InputError, match="pairs.kinds must be of drop, shuffle, reverse"):
        RunConfig(pairs=config).validate()


def test_a_video_of_which_nothing_is_said_is_left_out(tmp_path):
    class Mute(Scripted):
        def _answer(self, r):
            return "" if r.plans[0].video == "b.mp4" else super()._answer(r)

    whole = replace(CONFIG, perturb_on="frames", frames_answer="video")
    for name, config in {"windows": CONFIG, "video": whole}.items():
        records, audit = pairs_of(VIDEOS, Mute(), config, tmp_path / name)
        assert {x.video for rows in records.values() for x in rows} == {"a.mp4", "c.mp4"}
        (failed,) = audit["failed"]
        assert failed["video"] == "b.mp4" and "no caption" in failed["reason"]


def test_texts_that_differ_in_white_space_alone_are_no_pair(tmp_path):
    """Every pair carries spans: where no sentence differs there is nothing to prefer."""

    class Spaces(Scripted):
        def _answer(self, r):
            self.count = getattr(self, "count", 0) + 1
            clean = sum(len(v.clips) for v in VIDEOS)
            return "The same." if self.count <= clean else "The  same."

    config = replace(CONFIG, perturb_on="frames", kinds=["shuffle"])
    with pytest.raises(InputError, match="no pair is left"):
        pairs_of(VIDEOS, Spaces(), config, tmp_path)
    stats = json.loads((tmp_path / "audit.json").read_text())["stats"]
    assert all(row["shuffle"]["filtered"] == {"equal_to_chosen": 3} for row in stats.values())


WORDS = st.lists(st.sampled_from(["A b.", "c", "D?", "e.\n", " f", "3.5", '"g."']), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(WORDS.map(" ".join), min_size=2, max_size=9), on=st.sampled_from(["captions", "frames"]))
def test_every_pair_carries_spans(tmp_path_factory, texts, on):
    class Says(Scripted):
        def _answer(self, r):
            self.count = getattr(self, "count", 0) + 1
            return texts[self.count % len(texts)]

    config = replace(CONFIG, perturb_on=on, r=[8, 2], max_length_ratio=99.0)
    try:
        records, _ = pairs_of(VIDEOS[:1], Says(), config, tmp_path_factory.mktemp("spans"))
    except InputError:
        return
    for x in [x for rows in records.values() for x in rows]:
        assert all(x.spans_for(y) or y.spans for y in x.rejected)


def test_per_pair_draws_an_instruction_for_each(tmp_path):
    many = [video(f"{i}.mp4", 8) for i in range(10)]
    config = replace(CONFIG, instruction="per_pair")
    records, _ = pairs_of(many, Scripted(), config, tmp_path)
    assert all(len(x.rejected) == 1 for rows in records.values() for x in rows)
    ids = [x.id for rows in records.values() for x in rows]
    assert len(set(ids)) == len(ids)
    assert len({x.prompt for rows in records.values() for x in rows if x.video == "0.mp4"}) > 1


def test_aggregated_by_the_model(tmp_path):
    engine = Scripted()
    records, _ = pairs_of(VIDEOS[:1], engine, replace(CONFIG, aggregate="model"), tmp_path)
    assert records[16][0].chosen == "Told: " + " ".join(say(i) for i in range(6))
    assert records[16][0].rejected[0].text.startswith("Told: ")


def test_identity_is_by_caption_or_by_scene(tmp_path):
    class Same(Scripted):
        def _answer(self, r):
            return "The same."

    with pytest.raises(InputError, match="no pair is left"):
        pairs_of(VIDEOS, Same(), replace(CONFIG, kinds=["shuffle", "reverse"]), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answers", "audit.json", "parts"]  # no file without records
    stats = json.loads((tmp_path / "audit.json").read_text())["stats"]
    assert all(s["filtered"] == {"identity": 3} for row in stats.values() for s in row.values())
    # frames: scenes a b c b a reversed are the same
    config = replace(CONFIG, perturb_on="frames", kinds=["reverse", "drop"], r=[16])
    _, audit = pairs_of([video("p.mp4", 5, [0, 1, 2, 1, 0])], Scripted(), config, tmp_path / "f")
    assert audit["stats"]["16"]["reverse"]["filtered"] == {"identity": 1}


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind", "reason"),
    [
        ("aaaa", "aa", "drop", None),
        ("aa", "bb", "drop", "drop_not_shorter"),
        ("aa", "bbb", "drop", "drop_not_shorter"),
        ("aa", "xaax", "shuffle", "chosen_in_rejected"),
        ("aa", "aa", "shuffle", "equal_to_chosen"),
        ("aaaa", "bbbbbb", "shuffle", None),
        ("aaaa", "bbbbbbb", "reverse", "length_ratio"),
        ("aaaaaaa", "bbbb", "reverse", "length_ratio"),
        ("aaaa", "  ", "reverse", "empty"),
    ],
)
def test_official_filters(chosen, rejected, kind, reason):
    assert reject_reason(chosen, rejected, kind, 1.5) == reason


def test_coinciding_stages():
    assert coinciding([15, 8, 4], [16, 8]) == [{"r": [16, 8], "videos": 3, "of": 3}]
    assert coinciding([16, 24, 32], [16, 8]) == []


def test_a_bad_video_is_named_and_the_others_go_on(tmp_path):
    videos = [VIDEOS[0], video("broken.mp4", 5), video("gone.mp4", 5), VIDEOS[2]]
    records, audit = pairs_of(videos, Scripted(), CONFIG, tmp_path)
    assert {f["video"] for f in audit["failed"]} == {"broken.mp4", "gone.mp4"}
    assert "decoded" in next(f["reason"] for f in audit["failed"] if f["video"] == "broken.mp4")
    assert {x.video for x in records[4]} == {"a.mp4", "c.mp4"}
    with pytest.raises(InputError, match="no pair is left"):
        pairs_of(videos[1:3], Scripted(), CONFIG, tmp_path / "none")
    with pytest.raises(InputError, match="no video to make pairs from"):
        pairs_of([], Scripted(), CONFIG, tmp_path)


def test_engine_trouble_is_not_a_videos_trouble(tmp_path):
    class Down(Scripted):
        def generate(self, requests, desc=""):
            raise InputError("generation.endpoint: cannot be reached")

    with pytest.raises(InputError, match="endpoint"):
        pairs_of(VIDEOS, Down(), CONFIG, tmp_path)


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"video": "a.mp4", "prompt": "Own?"}, {"video": "", "prompt": "For all."}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records, _ = pairs_of(VIDEOS, Scripted(), CONFIG, tmp_path / "o", prompts=str(path))
    assert {x.video: x.prompt for x in records[4]} == {"a.mp4": "Own?", "b.mp4": "For all.", "c.mp4": "For all."}
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"video": "b.mp4"}))
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: field 'prompt'"):
        pairs_of(VIDEOS, Scripted(), CONFIG, tmp_path / "o", prompts=str(path))


def test_seed_decides_everything(tmp_path):
    def run(name, seed):
        pairs_of(VIDEOS, Scripted(), CONFIG, tmp_path / name, seed=seed)
        return (tmp_path / name / "r4.jsonl").read_bytes()

    assert run("a", 1) == run("b", 1) != run("c", 2)
