"""Files that hold rows: JSON lines and arrays, zipped, Parquet, Arrow, folders; what is broken in them is named."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.formats import content, quiet, random_records
from tempo_fast.errors import InputError
from tempo_fast.pairs.formats import FORMATS, Problem, arrays, iter_pairs, read_pairs, write_pairs
from tempo_fast.pairs.formats.containers import read_rows
from tempo_fast.pairs.formats.rows import RowError

json_value: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
row = st.dictionaries(st.text(), json_value, max_size=4)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 5)


def rows(path: Path) -> list[Any]:
    return [row for _, _, row in read_rows(path)]


def numbers(path: Path) -> list[int]:
    """Of the rows that are broken."""
    return [number for _, number, row in read_rows(path) if isinstance(row, RowError)]


@settings(deadline=None, max_examples=60)
@given(made=st.lists(row, max_size=5), indent=st.sampled_from([None, 2]), plain=st.booleans(), chunk=st.integers(1, 40))
def test_arrays_are_read_as_json_reads_them(made, indent, plain, chunk):
    """Whatever the rows, the layout, and where the window on the file ends."""
    text = json.dumps(made, indent=indent, ensure_ascii=plain).encode()
    before, arrays.CHUNK = arrays.CHUNK, chunk
    try:
        assert [value for _, value in arrays.read_array(io.BytesIO(text))] == made
    finally:
        arrays.CHUNK = before


ROW = {"prompt": "p", "chosen": "c", "rejected": "r", "videos": [], "n": [{"a": 1}, {"b": 2}], "o": {"rejected": {}}}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "broken",
    [
        '{"prompt": "p", "chosen": ',
        '{"prompt": "p", "chosen": "c" "rejected": 1, "n": [{"chosen"}, {"b": 2}]}',
        '{"prompt": "unclosed, "chosen": "c"}',
        '{"prompt": "p", "chosen": "c"}}',
        '{"prompt": "line\nfeed", "n": [{"a": 1}, {"b": 2}]}',
        '{"prompt": "\x00", "chosen": "c"}',
        '{"prompt": "\\x", "chosen": "c"}',
        "nonsense",
        "12",
        '["a", "list"]',
        '{"prompt": "\xff"}',
        "",
    ],
)
def test_a_broken_element_costs_itself_alone(tmp_path, small_chunks, indent, broken):
    parts = [json.dumps({**ROW, "i": i}, indent=indent) for i in range(6)]
    parts[3] = broken
    path = tmp_path / "x.json"
    path.write_bytes(("[\n" + ",\n".join(parts) + "]").encode("latin-1"))
    assert numbers(path) == [4]
    assert [r["i"] for r in rows(path) if isinstance(r, dict) and "i" in r] == [0, 1, 2, 4, 5]


def test_arrays_without_an_end_and_with_more_after_it(tmp_path, small_chunks):
    path = tmp_path / "x.json"
    for text, found in (
        ('[{"a": 1}, {"a": 2}', [1, 2]), ('[{"a": 1}, {"a": ', [1]), ('[{"a": 1}] {"a": 2}', [1]), ("[", []),
        ('[{"a": 1},]', [1]), ("[] 7", []),
    ):  # fmt: skip
        path.write_text(text)
        *good, last = rows(path)
        assert isinstance(last, RowError), text
        assert [r["a"] for r in good] == found
    path.write_text("[]")
    assert rows(path) == []


def test_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8 \xc2\x85"}\n{"a": "\xff"}\n'
        b'{"a": "\\ud83d"}\n{"a": "\\ud83d\\ude00"}\n'
        b'{"a": 1e999, "b": NaN}\n\0\n[1]\n{"a"\n{"a": ' + b"[" * 100_000 + b'\n{"a": 2}'
    )
    assert numbers(path) == [5, 6, 9, 10, 11, 12]
    good = [r for r in rows(path) if isinstance(r, dict)]
    assert [r["a"] for r in good] == [1, "\u2028 \x85", "😀", float("inf"), 2] and good[3]["b"] is None
    assert "byte 8 of the line" in str(rows(path)[2])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz", "x.parquet", "folder"])
def test_every_format_in_every_container(tmp_path, fmt, name):
    true = content(random_records(20))
    write_pairs(tmp_path / name, random_records(20), fmt, problems=quiet)
    assert content(iter_pairs(tmp_path / name, problems=quiet)) == true
    # what a file is, its bytes say
    if name != "folder":
        (tmp_path / name).rename(tmp_path / "unnamed")
        assert content(iter_pairs(tmp_path / "unnamed", problems=quiet)) == true


def test_equal_records_give_equal_bytes(tmp_path, monkeypatch):
    for name in ("x.jsonl", "x.json.gz", "x.parquet"):
        for now, folder in enumerate(("a", "b")):
            monkeypatch.setattr("time.time", lambda now=now: 1e9 + now)
            (tmp_path / folder).mkdir(exist_ok=True)
            write_pairs(tmp_path / folder / name, random_records(30), "trl", problems=quiet)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names(tmp_path):
    made = list(random_records(2))
    for name in ("x.csv", "x.gz", "x.csv.gz"):
        with pytest.raises(InputError, match=r"the name must end with"):
            write_pairs(tmp_path / name, made)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists; name a new folder"):
        write_pairs(tmp_path / "full", made)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="holds no file of rows"):
        read_pairs(tmp_path / "full")
    with pytest.raises(InputError, match="cannot be read"):
        read_pairs(tmp_path / "nothing.jsonl")
    with pytest.raises(InputError, match="no file has such a name"):
        read_pairs(tmp_path / "*.jsonl")
    write_pairs(f"{tmp_path}/new.d/", made)
    assert read_pairs(tmp_path / "new.d") == made
    for i in range(2):
        write_pairs(tmp_path / f"part{i}.jsonl", made[i : i + 1])
    assert read_pairs(tmp_path / "part*.jsonl") == made


def test_hugging_face_reads_what_is_written_and_we_what_it_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = list(random_records(30))
    write_pairs(tmp_path / "hub", made, "trl", problems=quiet)
    data = datasets.load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), split="train")
    answers = sum(len(x.rejected) for x in made)
    assert len(data) == answers and data[0]["chosen"][0]["content"][0]["text"] == made[0].chosen
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    assert read_pairs(tmp_path / "saved", problems=quiet) == made
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "one split")
    assert read_pairs(tmp_path / "one split", problems=quiet) == made
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="the splits train, test; name the folder of one"):
        read_pairs(tmp_path / "two")
    assert read_pairs(tmp_path / "two" / "test", problems=quiet) == made
    (tmp_path / "named").mkdir()
    for split in ("train", "test"):
        data.to_parquet(tmp_path / "named" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(InputError, match="splits test, train"):
        read_pairs(tmp_path / "named")
    assert read_pairs(tmp_path / "named" / "test-*.parquet", problems=quiet) == made
    # JSON as LLaMA-Factory and ms-swift load it: by column types that are the same in every row
    for fmt in ("llama-factory", "ms-swift"):
        write_pairs(tmp_path / "x.jsonl", made, fmt, problems=quiet)
        data = datasets.Dataset.from_json(str(tmp_path / "x.jsonl"), cache_dir=str(tmp_path / "cache"))
        assert len(data) == answers


def test_trl_takes_the_rows(tmp_path):
    """The functions by which TRL 1.16 looks at a row."""
    trl = pytest.importorskip("trl.data_utils")
    write_pairs(tmp_path / "x.jsonl", random_records(5), "trl", problems=quiet)
    for _, _, found in read_rows(tmp_path / "x.jsonl"):
        assert isinstance(found, dict) and trl.is_conversational(found)
        assert trl.maybe_extract_prompt(found)["prompt"] == found["prompt"]
        messages = trl.prepare_multimodal_messages(found["prompt"])
        assert [p["type"] for p in messages[0]["content"]] == (["video"] if found["videos"] else []) + ["text"]


def test_arrow_of_others(tmp_path):
    """Nulls where rows lack a field, plain Arrow files, bytes that are no text, a file that is cut."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    text = {"type": "text", "text": "Q"}
    wanted: list[dict[str, Any]] = [
        {"prompt": [{"role": "user", "content": [{"type": "video"}, text]}], "videos": ["v.mp4"]},
        {"prompt": [{"role": "user", "content": [text]}], "margin": float("nan")},
    ]
    for one in wanted:
        one |= {k: [{"role": "assistant", "content": [{**text, "text": k}]}] for k in ("chosen", "rejected")}
    schema = pa.Table.from_pylist(wanted[:1]).schema.append(pa.field("margin", pa.float64()))
    table = pa.Table.from_pylist(wanted, schema=schema)
    with pa.OSFile(str(tmp_path / "x"), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table)
    pq.write_table(table, tmp_path / "y")
    for name in "xy":
        got = read_pairs(tmp_path / name)
        assert [(x.video, x.prompt, x.provenance) for x in got] == [("v.mp4", "Q", {}), ("", "Q", {})]
    bad = pa.array([b"good", b"\xff", b"fine"]).cast(pa.binary()).view(pa.string())
    columns = {
        "key": [b"\xff", None, b"k"],
        "video": ["v.mp4"] * 3,
        "prompt": bad,
        "chosen": ["c"] * 3,
        "rejected": ["r"] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "z")
    assert numbers(tmp_path / "z") == [2]
    assert [(x.prompt, x.provenance["extra"]) for x in read_pairs(tmp_path / "z", problems=quiet)] == [
        ("good", [{"key": {"base64": "/w=="}}]), ("fine", [{"key": {"base64": "aw=="}}]),
    ]  # fmt: skip
    write_pairs(tmp_path / "w.parquet", random_records(3000))
    whole = (tmp_path / "w.parquet").read_bytes()
    (tmp_path / "w.parquet").write_bytes(whole[:400_000] + bytes(200_000) + whole[600_000:])
    found: list[Problem] = []
    left = read_pairs(tmp_path / "w.parquet", problems=found.append)
    assert left == list(random_records(3000))[: len(left)] and 0 < len(left) < 3000
    assert [p.line for p in found] == [len(left) + 1] and "damaged from here on" in found[0].reason


def test_without_pyarrow(tmp_path, monkeypatch):
    write_pairs(tmp_path / "x.parquet", random_records(3))
    monkeypatch.setitem(sys.modules, "tempo_fast.pairs.formats.arrow", None)
    for call in (
        lambda: read_pairs(tmp_path / "x.parquet"),
        lambda: write_pairs(tmp_path / "y.parquet", random_records(3)),
    ):
        with pytest.raises(InputError, match=r"pip install tempo-fast\[formats\]"):
            call()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.parquet"]


def test_a_zipped_file_that_is_cut(tmp_path):
    made = list(random_records(300))
    write_pairs(tmp_path / "x.jsonl.gz", made)
    whole = (tmp_path / "x.jsonl.gz").read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    found: list[Problem] = []
    left = read_pairs(tmp_path / "x.jsonl.gz", problems=found.append)
    assert left == made[: len(left)] and 50 < len(left) < 250
    assert "damaged" in found[-1].reason and found[-1].line == len(left) + len(found)
    assert gzip.decompress(whole).count(b"\n") == 300


def test_rows_that_stand_apart_wait_on_disk(tmp_path, monkeypatch):
    """More than SQLite keeps in memory, in random order: the same records, ordered by their first rows."""
    from tempo_fast.pairs.formats import grouping

    monkeypatch.setattr(grouping, "CACHE_KIB", 50)
    made = list(random_records(400))
    write_pairs(tmp_path / "x.jsonl", made, "trl", problems=quiet)
    lines = (tmp_path / "x.jsonl").read_bytes().splitlines(keepends=True)
    random.Random(0).shuffle(lines)
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    got = read_pairs(tmp_path / "x.jsonl", problems=quiet)
    order = list(dict.fromkeys(json.loads(json.loads(line)["tempo_fast"])["id"] for line in lines))
    assert [x.id for x in got] == order

    def unordered(records: Any) -> dict[str, Any]:
        return {x.id: (x.chosen, x.spans, sorted(map(str, x.rejected))) for x in records}

    assert unordered(got) == unordered(made)
