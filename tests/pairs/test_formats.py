"""Records through every format and back; bad rows named by file, line and field."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.pairs.formats import FORMATS, mask, read_pairs, unmask, write_pairs
from tempo_fast.pairs.spans import differing_spans, union
from tempo_fast.schema import PreferenceRecord, Rejected

text = st.text(st.characters(codec="utf-8", exclude_characters="<>\r"), min_size=1).filter(lambda s: s.strip())


def record(i=0, chosen="A red circle moves left. It grows. Ends.", texts=("It grows. Ends.", "Ends. It grows.")):
    rejected = [
        Rejected(t, kind, 8, [1, 2], 0.5, 0.25, *differing_spans(chosen, t)[::-1])
        for t, kind in zip(texts, ("drop", "shuffle", "reverse"), strict=False)
    ]
    spans = union(x.chosen_spans for x in rejected)
    return PreferenceRecord(f"v{i}/r8", f"dir/v {i}.mp4", "Tell it.", chosen, rejected, 8, spans, {"seed": i, "x": "é"})


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("detect", [True, False])
def test_round_trip(tmp_path, fmt, detect):
    records = [record(0), record(1, texts=("Other.", "More.", "Ünicode “x”.")), record(2, texts=("A.",))]
    path = tmp_path / "x.jsonl"
    write_pairs(path, records, fmt)
    assert read_pairs(path, "auto" if detect else fmt) == records


@given(chosen=text, rejected=text, prompt=text)
def test_round_trip_of_any_text(tmp_path_factory, chosen, rejected, prompt):
    prompt = prompt.strip()
    path = tmp_path_factory.mktemp("f") / "x.jsonl"
    records = [PreferenceRecord("a", "v.mp4", prompt, chosen, [Rejected(rejected, "drop", 4)], 4)]
    for fmt in FORMATS:
        write_pairs(path, records, fmt)
        assert read_pairs(path) == records


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f != "native"])
def test_rows_of_others_become_trees(tmp_path, fmt):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record(0), record(1)], fmt)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["tempo_fast"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = read_pairs(path, r=4)
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


def test_trl_row_as_trl_documents_it(tmp_path):
    path = tmp_path / "x.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "What happens?"}],
        "chosen": [{"role": "assistant", "content": "This."}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "That."}]}],
        "videos": ["a.mp4"],
    }
    path.write_text(json.dumps(row))
    (got,) = read_pairs(path)
    assert (got.video, got.prompt, got.chosen, got.rejected[0].text) == ("a.mp4", "What happens?", "This.", "That.")


@pytest.mark.parametrize(
    ("fmt", "field", "inside"),
    [
        ("native", "chosen", None),
        ("native", "rejected", None),
        ("trl", "chosen", None),
        ("trl", "prompt", None),
        ("ms-swift", "rejected_response", None),
        ("ms-swift", "messages", None),
        ("ms-swift", "content", "messages"),
        ("rrpo", "answer", None),
        ("rrpo", "pred_masked", None),
    ],
)
def test_missing_field_is_named(tmp_path, fmt, field, inside):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [record(0), record(1)], fmt)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bad = rows[1][inside][1] if inside else rows[1]
    del bad[field]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match=rf"pairs\.jsonl:2: .*'{field}'"):
        read_pairs(path, fmt)


def test_wrong_types_and_empty_files(tmp_path):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()], "ms-swift")
    row = json.loads(path.read_text().splitlines()[0])
    for change, word in (
        ({"videos": ["a", "b"]}, "videos"),
        ({"videos": "a.mp4"}, "videos"),
        ({"rejected_response": 3}, "rejected_response"),
        ({"rejected_response": "  "}, "rejected_response"),
        ({"tempo_fast": {"rejected": {"nonsense": 1}}}, "tempo_fast"),
    ):
        path.write_text(json.dumps({**row, **change}))
        with pytest.raises(InputError, match=rf"x\.jsonl:1: field '{word}'"):
            read_pairs(path)
    path.write_text("")
    with pytest.raises(InputError, match="no record"):
        read_pairs(path)
    with pytest.raises(InputError, match="unknown format"):
        write_pairs(path, [record()], "parquet")


def test_masks():
    answer = "A dog runs. A dog runs. It barks."
    assert mask(answer, [[12, 23]]) == "A dog runs. <MASK>A dog runs.</MASK> It barks."
    # the second of two equal phrases, with the white space of the released files inside the tags
    assert unmask(answer, "A dog runs. <MASK> A dog runs. </MASK> It barks.") == ([[12, 23]], [])
    assert unmask(answer, "<MASK>A cat</MASK> runs. <MASK>It barks</MASK>.")[1] == ["A cat", "It barks"]
    assert unmask("", "<MASK></MASK>") == ([], [""])


@given(st.lists(st.sampled_from(["a b.", "c.", "d e f.", "a."]), min_size=1, max_size=7), st.data())
def test_mask_and_unmask(parts, data):
    answer = " ".join(parts)
    bounds, at = [], 0
    for p in parts:
        bounds.append([at, at + len(p)])
        at += len(p) + 1
    spans = [b for b in bounds if data.draw(st.booleans())]
    assert unmask(answer, mask(answer, spans)) == (spans, [])


def test_unaligned_mask_is_reported(tmp_path):
    path = tmp_path / "x.jsonl"
    write_pairs(path, [record()], "rrpo")
    row = json.loads(path.read_text().splitlines()[0])
    row["answer_masked"] = "<MASK>no such words</MASK>"
    path.write_text(json.dumps(row))
    problems: list[str] = []
    read_pairs(path, problems=problems)
    assert len(problems) == 1 and "x.jsonl:1" in problems[0] and "answer_masked" in problems[0]
