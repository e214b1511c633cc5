"""Records through every format and back; rows as their formats document them; bad rows named by line and field."""

from __future__ import annotations

import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.formats import PIECES
from tempo_fast.errors import InputError
from tempo_fast.pairs.formats import FORMATS, Problem, iter_pairs, read_pairs, write_pairs
from tempo_fast.pairs.formats.layouts import LAYOUTS
from tempo_fast.pairs.formats.llama_factory import dataset_info
from tempo_fast.pairs.formats.reading import detect
from tempo_fast.pairs.formats.rows import OTHER_MEDIA, OWN
from tempo_fast.pairs.spans import differing_spans, union
from tempo_fast.schema import PreferenceRecord, Rejected

FOREIGN = [f for f in FORMATS if f != "native"]
letters = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
text = (letters | st.lists(st.sampled_from(PIECES), min_size=1).map("".join)).filter(lambda s: s.strip())
COLUMNS = sorted({*OTHER_MEDIA, OWN, *(c for layout in LAYOUTS.values() for c in [*layout.columns, *layout.schema])})
value = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text


def record(i=0, chosen="A red circle moves left. It grows. Ends.", texts=("It grows. Ends.", "Ends. It grows.")):
    rejected = [
        Rejected(t, kind, 8, [1, 2], 0.5, 0.25, *differing_spans(chosen, t)[::-1])
        for t, kind in zip(texts, ("drop", "shuffle", "reverse"), strict=False)
    ]
    spans = union(x.chosen_spans for x in rejected)
    return PreferenceRecord(f"v{i}/r8", f"dir/v {i}.mp4", "Tell it.", chosen, rejected, 8, spans, {"seed": i, "x": "é"})


def put(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def one(tmp_path: Path, row: dict[str, Any], fmt: str = "auto", **kwargs: Any) -> PreferenceRecord:
    (got,) = read_pairs(put(tmp_path / "one.jsonl", row), fmt, **kwargs)
    return got


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("detected", [True, False])
def test_round_trip(tmp_path, fmt, detected):
    records = [record(0), record(1, texts=("Other.", "More.", "Ünicode “x”.")), record(2, texts=("A.",))]
    for video, first in product(("v.mp4", ""), ("<video>", "<image>", " ")):
        tags = first + "\n<video> <image>\n<MASK>x</MASK> </MASK> "
        answers = [Rejected(tags + "no", "drop", 8, spans=[[2, 5]], chosen_spans=[[0, 4], [4, 9]])]
        records.append(PreferenceRecord(f"{first}/{video}", video, tags, tags + "yes", answers, 8, [[0, 9]]))
    path = tmp_path / "x.jsonl"
    write_pairs(path, records, fmt)
    assert read_pairs(path, "auto" if detected else fmt) == records


@st.composite
def any_record(draw: st.DrawFn) -> PreferenceRecord:
    def spans(of: str) -> list[list[int]]:
        ends = sorted(draw(st.sets(st.integers(0, len(of)), max_size=4)))
        return [list(p) for p in zip(ends[::2], ends[1::2], strict=False)]

    chosen = draw(text)
    answers = [
        Rejected(
            t, draw(text), draw(st.integers(0, 99)), draw(st.lists(st.integers(0, 9), max_size=3)),
            draw(st.floats(0, 1)), draw(st.floats(0, 1)), spans(t), spans(chosen),
            draw(st.lists(st.booleans(), max_size=2)),
        )
        for t in draw(st.lists(text, min_size=1, max_size=3))
    ]  # fmt: skip
    provenance = draw(st.dictionaries(text, value | st.dictionaries(text, st.lists(value, max_size=2)), max_size=3))
    if draw(st.booleans()):
        columns = st.dictionaries(text | st.sampled_from(COLUMNS), value, max_size=3)
        provenance["extra"] = draw(st.lists(columns, min_size=len(answers), max_size=3))
    name, video, prompt, r = draw(text), draw(st.just("") | text), draw(text), draw(st.integers())
    return PreferenceRecord(name, video, prompt, chosen, answers, r, spans(chosen), provenance)


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=25, deadline=None)
@given(made=any_record())
def test_round_trip_of_any_record(tmp_path_factory, fmt, made):
    """Whatever the texts hold: tags of the formats, their own brackets, blanks at both ends."""
    path = tmp_path_factory.mktemp("f") / "x.jsonl"
    write_pairs(path, [made], fmt, problems=lambda _: None)
    assert read_pairs(path, problems=pytest.fail) == [made]


@pytest.mark.parametrize("fmt", FOREIGN)
def test_rows_of_others_become_trees(tmp_path, fmt):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record(0), record(1)], fmt)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["tempo_fast"]
    got = read_pairs(put(path, *rows), r=4)
    assert [len(x.rejected) for x in got] == [2, 2]
    assert [(x.video, x.prompt, x.chosen, x.r) for x in got] == [
        (x.video, x.prompt, x.chosen, 4) for x in (record(0), record(1))
    ]
    assert [y.text for x in got for y in x.rejected] == [y.text for x in (record(0), record(1)) for y in x.rejected]
    if fmt == "rrpo":
        assert [x.spans for x in got] == [record(0).spans] * 2
        assert [y.spans for y in got[0].rejected] == [y.spans for y in record(0).rejected]
        assert [y.chosen_spans for y in got[0].rejected] == [y.chosen_spans for y in record(0).rejected]
        assert got[0].rejected[0].chosen_spans != got[0].rejected[1].chosen_spans  # each row marks for its own pair


@pytest.mark.parametrize("fmt", FOREIGN)
def test_rows_that_stand_apart(tmp_path, fmt):
    """Joined wherever they stand, or as neighbours only; no answer is lost either way."""
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record(i) for i in range(3)], fmt)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[::2] + lines[1::2]))
    assert list(iter_pairs(path)) == [record(i) for i in range(3)]
    near = list(iter_pairs(path, group="adjacent"))
    assert [x.id for x in near] == [record(i).id for i in range(3)] * 2
    assert [x.rejected[0] for x in near] == [record(i).rejected[j] for j in range(2) for i in range(3)]
    with pytest.raises(InputError, match="all or adjacent"):
        next(iter_pairs(path, group="some"))


def test_equal_ids_of_different_trees_stay_apart(tmp_path):
    """Files put together may number their records alike; an answer must not come under another chosen one."""
    a, b = record(0), record(0, chosen="Something else happens. It ends.")
    path = tmp_path / "x.jsonl"
    write_pairs(path, [a, b], "ms-swift")
    assert read_pairs(path) == [a, b]


# each format as its documentation has it


def test_trl_rows(tmp_path):
    """huggingface/trl: docs/source/dataset_formats.md, explicit and implicit prompt, standard and conversational."""
    user, good, bad = (
        {"role": role, "content": content}
        for role, content in (("user", "What happens?"), ("assistant", "This."), ("assistant", "That."))
    )
    parts = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
    inline = {**parts, "content": [{"type": "video", "video": "a.mp4"}, parts["content"][1]]}
    bad_parts = {**bad, "content": [{"type": "text", "text": "That."}]}
    for row in (
        {"prompt": [user], "chosen": [good], "rejected": [bad], "videos": ["a.mp4"]},
        {"prompt": [parts], "chosen": [good], "rejected": [bad], "videos": ["a.mp4"]},
        {"prompt": [inline], "chosen": [good], "rejected": [bad_parts]},
        {"prompt": [inline], "chosen": [good], "rejected": [bad], "videos": ["a.mp4"]},
        {"chosen": [user, good], "rejected": [user, bad], "videos": [{"path": "a.mp4", "bytes": None}]},
        {"chosen": [inline, good], "rejected": [inline, bad]},
        {"prompt": "What happens?", "chosen": [user, good], "rejected": [user, bad], "videos": ["a.mp4"]},
        {"prompt": "What happens?", "chosen": "This.", "rejected": "That.", "videos": ["a.mp4"]},
        {"prompt": "<video>\nWhat happens?", "chosen": "This.", "rejected": "That.", "videos": "a.mp4"},
    ):  # fmt: skip
        got = one(tmp_path, row)
        assert (got.video, got.prompt, got.chosen, got.rejected[0].text) == ("a.mp4", "What happens?", "This.", "That.")
        assert detect(row) == "trl"
    other = {**user, "content": "What else?"}
    for row, word in (
        ({"chosen": [user, good], "rejected": [other, bad]}, "rejected"),
        ({"prompt": "Other", "chosen": [user, good], "rejected": [user, bad]}, "chosen"),
        ({"prompt": [user], "chosen": [user, good], "rejected": [user, bad]}, "chosen"),
        ({"chosen": [user, good, other, good], "rejected": [user, good, other, bad]}, "chosen"),
        ({"prompt": [user], "chosen": [user], "rejected": [bad]}, "chosen"),
        ({"prompt": [{**user, "content": [{"type": "image"}]}], "chosen": [good], "rejected": [bad]}, "content"),
        ({"chosen": "This.", "rejected": "That."}, "prompt"),
    ):
        with pytest.raises(InputError, match=f"field '{word}'"):
            one(tmp_path, row)


def test_ms_swift_rows(tmp_path):
    """modelscope/ms-swift: docs/source_en/Customization/Custom-dataset.md, the examples of DPO with media."""
    messages = [
        {"role": "user", "content": "<video>What is this?"},
        {"role": "assistant", "content": "This is a kitten."},
    ]
    other = [messages[0], {"role": "assistant", "content": "This is a puppy."}]
    for rejected in (
        {"rejected_response": "This is a puppy."},
        {"rejected_response": [other[1]]},
        {"rejected_messages": other, "rejected_videos": ["k.mp4"]},
    ):
        got = one(tmp_path, {"messages": messages, "videos": ["k.mp4"], **rejected})
        assert (got.video, got.prompt) == ("k.mp4", "What is this?")
        assert (got.chosen, got.rejected[0].text) == ("This is a kitten.", "This is a puppy.")
    system = {"role": "system", "content": "You are helpful."}
    found: list[Problem] = []
    row = {"messages": [system, *messages], "videos": ["k.mp4"], "rejected_response": "A puppy.", "margin": 3.5}
    got = one(tmp_path, row, problems=found.append)
    assert got.provenance["extra"] == [{"margin": 3.5, "system": "You are helpful."}]
    assert [(p.field, p.kept) for p in found] == [("messages", True)]
    for change, word in (
        ({"rejected_messages": [system, *other]}, "rejected_messages"),
        ({"rejected_messages": other, "rejected_videos": ["p.mp4"]}, "rejected_videos"),
        ({"rejected_videos": ["p.mp4"]}, "rejected_videos"),
        ({"messages": messages * 2}, "messages"),
        ({"messages": messages[:1]}, "messages"),
        ({"videos": [["1.png", "2.png"]]}, "videos"),
        ({"videos": ["k.mp4", "l.mp4"]}, "videos"),
        ({"images": ["k.png"]}, "images"),
        ({"videos": []}, "messages"),  # a tag, and no video for it
    ):
        with pytest.raises(InputError, match=f"field '{word}'"):
            one(tmp_path, {"messages": messages, "videos": ["k.mp4"], "rejected_response": "A puppy.", **change})


def test_llama_factory_rows(tmp_path):
    """hiyouga/LLaMA-Factory: data/README.md, preference data in the sharegpt and alpaca forms, videos and tags."""
    sharegpt = {
        "conversations": [{"from": "human", "value": "<video>Why is it funny?"}],
        "chosen": {"from": "gpt", "value": "A baby reads."},
        "rejected": {"from": "gpt", "value": "It is not."},
    }
    openai = {
        "messages": [{"role": "user", "content": "<video>Why is it funny?"}],
        "chosen": {"role": "assistant", "content": "A baby reads."},
        "rejected": {"role": "assistant", "content": "It is not."},
    }
    alpaca = {"instruction": "<video>Why is", "input": "it funny?", "chosen": "A baby reads.", "rejected": "It is not."}
    for row in (sharegpt, openai, alpaca):
        got = one(tmp_path, {**row, "videos": ["1.mp4"], "system": "Be brief."})
        assert (got.video, got.prompt.split()) == ("1.mp4", ["Why", "is", "it", "funny?"])
        assert (got.chosen, got.rejected[0].text) == ("A baby reads.", "It is not.")
        assert got.provenance == {"extra": [{"system": "Be brief."}]}
    for row, word in (
        ({**sharegpt, "conversations": sharegpt["conversations"] * 3}, "conversations"),
        ({**sharegpt, "chosen": {"from": "human", "value": "x"}}, "chosen"),
        ({**sharegpt, "rejected": None}, "rejected"),
        ({**alpaca, "history": [["a", "b"]]}, "history"),
    ):
        with pytest.raises(InputError, match=f"field '{word}'"):
            one(tmp_path, {**row, "videos": ["1.mp4"]})
    assert dataset_info(tmp_path / "mine.json") == {
        "mine": {
            "file_name": "mine.json", "formatting": "sharegpt", "ranking": True,
            "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "videos": "videos"},
        }
    }  # fmt: skip


def test_llava_hound_rows(tmp_path):
    """RifleZhang/LLaVA-Hound-DPO: run_dpo.py reads video, prompt, chosen, rejected; the data has answer and scores."""
    row = {
        "id": "v_0-Scene-001_2", "video": "webvid/123", "prompt": "<video>\nIs there snow?", "answer": "Yes.",
        "chosen": "There is.", "chosen_score": 5, "rejected": "No.", "rejected_score": 1.5,
    }  # fmt: skip
    got = one(tmp_path, row)
    assert (got.video, got.prompt, got.chosen) == ("webvid/123", "Is there snow?", "There is.")
    extra = {"id": "v_0-Scene-001_2", "answer": "Yes.", "chosen_score": 5, "rejected_score": 1.5}
    assert got.provenance == {"extra": [extra]}
    # scores stand in the rows of every format, and survive all of them
    for fmt in FORMATS:
        path = tmp_path / f"{fmt}.jsonl"
        write_pairs(path, [got], fmt)
        assert read_pairs(path) == [got]
        if fmt != "native":
            assert json.loads(path.read_text())["chosen_score"] == 5
    back = json.loads((tmp_path / "llava-hound.jsonl").read_text())
    del back["tempo_fast"]
    assert back == row


def test_rrpo_rows(tmp_path):
    """pritamqu/RRPO: docs/DATA.md, and the media_path that train_llavavideo.py reads."""
    row = {
        "question": "<image>\nThis is a sample question.",
        "answer": "This is a correct or preferred answer.",
        "pred": "This is an incorrect or non-preferred answer.",
        "answer_masked": "This is a <MASK> correct </MASK> or <MASK> preferred </MASK> answer.",
        "pred_masked": "This is an <MASK> incorrect </MASK> or <MASK> non-preferred </MASK> answer.",
        "src": "data-source", "sample_id": 0, "video": "video.mp4",
    }  # fmt: skip
    got = one(tmp_path, row)
    assert (got.video, got.prompt, got.chosen) == ("video.mp4", "This is a sample question.", row["answer"])
    assert [got.chosen[s:e] for s, e in got.spans] == ["correct", "preferred"]
    rejected = got.rejected[0]
    assert [rejected.text[s:e] for s, e in rejected.spans] == ["incorrect", "non-preferred"]
    assert rejected.chosen_spans == got.spans
    assert got.provenance == {"extra": [{"src": "data-source", "sample_id": 0}]}
    got = one(tmp_path, {**row, "media_path": "/data/video.mp4"})
    assert got.video == "/data/video.mp4" and got.provenance["extra"][0]["video"] == "video.mp4"
    path = tmp_path / "x.jsonl"
    write_pairs(path, [got], "rrpo")
    back = json.loads(path.read_text())
    assert (back["question"], back["media_path"], back["sample_id"]) == (row["question"], "/data/video.mp4", 0)


def test_spans_edited_in_a_file_of_ours(tmp_path):
    """A judge may mark anew what we wrote; its tags win over our column, on the rows that it changed."""
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()], "rrpo")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["answer_masked"] = "A red circle <MASK>moves left</MASK>. It grows. Ends."
    (got,) = read_pairs(put(path, *rows))
    assert got.rejected[0].chosen_spans == [[13, 23]] and got.rejected[1] == record().rejected[1]
    assert got.rejected[0].spans == record().rejected[0].spans
    assert got.spans == union([[[13, 23]], record().rejected[1].chosen_spans])


def test_unaligned_mask_is_reported(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()], "rrpo")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["answer_masked"] = "<MASK>no such words</MASK>"
    found: list[Problem] = []
    (got,) = read_pairs(put(path, *rows), problems=found.append)
    assert len(got.rejected) == 2
    assert [(p.line, p.field, p.kept) for p in found] == [(2, "answer_masked", True)]
    assert "no such words" in str(found[0])
    with caplog.at_level(logging.WARNING):
        read_pairs(path)
    assert "x.jsonl:2: field 'answer_masked' marks 'no such words'" in caplog.text


def test_a_tag_inside_the_text(tmp_path):
    """The video's place is lost, and that is said; a tag in a text that is written is said too."""
    row = {"prompt": "In <video> who wins?", "chosen": "A.", "rejected": "B.", "video": "v.mp4"}
    found: list[Problem] = []
    assert one(tmp_path, row, problems=found.append).prompt == "In  who wins?"
    assert [(p.line, p.field, p.kept) for p in found] == [(1, "prompt", True)]
    found.clear()
    made = record()
    made.chosen += " <video>"
    made.rejected[1].text = "<MASK> is a word"
    for fmt, fields in (("trl", []), ("ms-swift", ["chosen"]), ("rrpo", ["rejected"]), ("native", [])):
        write_pairs(tmp_path / "x.jsonl", [made], fmt, problems=found.append)
        assert [p.field for p in found] == fields
        found.clear()


# bad rows


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, v in inner for p in places(v, (*path, key))]


@pytest.mark.parametrize("fmt", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_anything_anywhere_is_a_problem_or_fine(tmp_path_factory, fmt, data):
    """One value of a row replaced or taken away, our column's too: no other error, and the row after it survives."""
    path = tmp_path_factory.mktemp("f") / "x.jsonl"
    write_pairs(path, [record(0, texts=("It grows.",)), record(1, texts=("Ends.",))], fmt)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    if fmt != "native":
        first["tempo_fast"] = json.loads(first["tempo_fast"])
    *way, last = data.draw(st.sampled_from(places(first)))
    spot: Any = first
    for key in way:
        spot = spot[key]
    if data.draw(st.booleans()):
        spot[last] = data.draw(value | st.lists(value, max_size=2) | st.dictionaries(text, value, max_size=2))
    else:
        del spot[last]
    found: list[Problem] = []
    got = read_pairs(put(path, first, second), fmt, problems=found.append)
    assert got[-1] == record(1, texts=("Ends.",))
    assert len(got) == 2 or [(p.line, p.kept) for p in found] == [(1, False)]


@pytest.mark.parametrize(
    ("fmt", "field", "inside"),
    [
        ("native", "chosen", None),
        ("native", "rejected", None),
        ("native", "r", None),
        ("trl", "chosen", None),
        ("trl", "prompt", None),
        ("ms-swift", "rejected_response", None),
        ("ms-swift", "messages", None),
        ("ms-swift", "content", "messages"),
        ("llama-factory", "conversations", None),
        ("llama-factory", "value", "chosen"),
        ("llava-hound", "prompt", None),
        ("rrpo", "answer", None),
        ("rrpo", "pred_masked", None),
    ],
)
def test_missing_field_is_named(tmp_path, fmt, field, inside):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [record(0), record(1)], fmt)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bad = rows[1] if not inside else rows[1][inside] if inside == "chosen" else rows[1][inside][1]
    del bad[field]
    put(path, *rows)
    with pytest.raises(InputError, match=rf"pairs\.jsonl:2: .*'{field}'"):
        read_pairs(path, fmt)
    found: list[Problem] = []
    left = read_pairs(path, fmt, problems=found.append)
    assert [(p.line, p.field, p.kept) for p in found] == [(2, field, False)]
    assert sum(len(x.rejected) for x in left) == (2 if fmt == "native" else 3)


def test_wrong_types_and_empty_files(tmp_path):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()], "ms-swift")
    row = json.loads(path.read_text().splitlines()[0])
    for change, word in (
        ({"videos": ["a", "b"]}, "videos"),
        ({"videos": [3]}, "videos"),
        ({"rejected_response": 3}, "rejected_response"),
        ({"rejected_response": "  "}, "rejected_response"),
        ({"rejected_response": "a\0b"}, "rejected_response"),
        ({"tempo_fast": {"rejected": {"nonsense": 1}}}, "tempo_fast"),
        ({"tempo_fast": "{"}, "tempo_fast"),
        ({"tempo_fast": {"id": "a", "record": {"spans": [[0, 999]]}}}, "tempo_fast"),
    ):
        with pytest.raises(InputError, match=rf"x\.jsonl:1: field '{word}'"):
            read_pairs(put(path, {**row, **change}))
    path.write_text("")
    with pytest.raises(InputError, match="no record"):
        read_pairs(path)
    with pytest.raises(InputError, match="unknown format"):
        write_pairs(path, [record()], "parquet")
    with pytest.raises(InputError, match="unknown format"):
        read_pairs(path, "hf")
    with pytest.raises(InputError, match=r"x\.jsonl:1: no row of a format that is known .* it has a, b"):
        read_pairs(put(path, {"b": 1, "a": 2}))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"r": "8"}, "r"),
        ({"r": True}, "r"),
        ({"spans": [[0, 99]]}, "spans"),
        ({"spans": [[2, 1]]}, "spans"),
        ({"spans": [[-1, 2]]}, "spans"),
        ({"spans": [[0, 1, 2]]}, "spans"),
        ({"spans": [[0.0, 1]]}, "spans"),
        ({"spans": "x"}, "spans"),
        ({"provenance": []}, "provenance"),
        ({"rejected": []}, "rejected"),
        ({"rejected": ["x"]}, "rejected"),
        ({"rejected": [{"text": "x", "kind": "drop"}]}, "r"),
        ({"rejected": [{"text": "x", "kind": "drop", "r": 4, "colour": 1}]}, "colour"),
        ({"rejected": [{"text": "x", "kind": "drop", "r": 4, "blank": [1]}]}, "blank"),
        ({"rejected": [{"text": "x", "kind": "drop", "r": 4, "spans": [[0, 2]]}]}, "spans"),
        ({"video": "a\0.mp4"}, "video"),
        ({"video": None}, "video"),
        ({"id": ""}, "id"),
        ({"prompt": " \n"}, "prompt"),
    ],
)
def test_native_rows_are_checked_whole(tmp_path, change, field):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()])
    row = {**json.loads(path.read_text()), **change}
    with pytest.raises(InputError, match=rf"x\.jsonl:1: .*field '{field}'"):
        read_pairs(put(path, row), "native")


def test_native_rows_keep_what_they_have_more(tmp_path):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()])
    row = {**json.loads(path.read_text()), "score": 0.5, "nothing": None, "missing": float("nan")}
    (got,) = read_pairs(put(path, row))
    assert got.provenance == {**record().provenance, "extra": [{"score": 0.5}] * 2}
