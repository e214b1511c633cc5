"""Reading records: what is wrong is named by file, line and field."""

import json
from pathlib import Path

import pytest

from tempo_fast.errors import InputError
from tempo_fast.files import write_jsonl
from tempo_fast.schema import (
    PreferenceRecord,
    Question,
    Rejected,
    SFTRecord,
    Truth,
    events_of,
    read_records,
    resolve_videos,
)

RECORD = PreferenceRecord("a", "v.mp4", "Describe.", "A b.", [Rejected("B a.", "reverse", 2, [1, 0], 1.0)], 2)


def test_round_trip(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [RECORD, RECORD])
    assert read_records(tmp_path / "x.jsonl", PreferenceRecord) == [RECORD, RECORD]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"chosen": None}, "chosen"),
        ({"chosen": ""}, "chosen"),
        ({"rejected": []}, "rejected"),
        ({"prompt": 3}, "prompt"),
        ({"rejected": "text"}, "rejected"),
    ],
)
def test_bad_field_is_named(tmp_path: Path, change: dict, field: str) -> None:
    write_jsonl(tmp_path / "x.jsonl", [RECORD])
    row = json.loads((tmp_path / "x.jsonl").read_text()) | change
    (tmp_path / "x.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(InputError, match=rf"x\.jsonl:2: field '{field}'"):
        read_records(tmp_path / "x.jsonl", PreferenceRecord)


def test_missing_field_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"id": "a", "video": "", "prompt": "p"}')
    with pytest.raises(InputError, match=r"x\.jsonl:1: field 'response' is missing"):
        read_records(tmp_path / "x.jsonl", SFTRecord)


@pytest.mark.parametrize("text", ["{", "[1]", '{"id": 1}\n}'])
def test_broken_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"x\.jsonl:\d: "):
        read_records(tmp_path / "x.jsonl", Question)


def test_missing_file() -> None:
    with pytest.raises(InputError, match="nowhere.jsonl: cannot be read"):
        read_records("nowhere.jsonl", Question)


def test_truth_takes_events_as_objects(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"video": "v", "description": "A. B.", "events": [{"text": "A."}, "B."], "more": 1}'
    )
    assert read_records(tmp_path / "t.jsonl", Truth) == [Truth("v", "A. B.", ["A.", "B."])]


def test_a_truth_without_events_has_the_sentences_of_its_description(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"video": "v", "description": "A. B."}\n{"video": "w", "description": "C.", "events": []}\n')
    assert [t.events for t in read_records(path, Truth)] == [["A.", "B."], ["C."]]
    path.write_text('{"video": "v", "events": ["A."]}\n{"video": "w", "description": " ", "events": []}\n')
    with pytest.raises(InputError, match=r"t.jsonl:2: fields 'events' and 'description' are both empty"):
        read_records(path, Truth)


def test_events_of() -> None:
    assert events_of("A b. C d.\nE.") == ["A b.", "C d.", "E."]
    assert events_of("  ") == []


def test_resolve_videos(tmp_path: Path) -> None:
    rows = [SFTRecord("a", "v/x.mp4", "p", "r"), SFTRecord("b", "", "p", "r"), SFTRecord("c", "/abs.mp4", "p", "r")]
    resolve_videos(rows, tmp_path)
    assert [r.video for r in rows] == [str((tmp_path / "v/x.mp4").resolve()), "", "/abs.mp4"]
