"""Nothing is lost on the way through any two formats, memory does not grow with the file, broken rows cost themselves.

The full sizes are ``python -m bench formats``; these are the same functions on fewer records.
"""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import pytest

from bench import formats as bench
from bench.formats import KINDS, NEEDED, SPOILED, broken, chains, content, many_records, memory, random_records
from tempo_fast.files import read_json
from tempo_fast.pairs.formats import FORMATS, read_pairs, write_pairs

BOUND_MIB = 6


def test_every_ordered_pair_of_formats(tmp_path):
    rows, lost = chains(40, tmp_path)
    assert lost == []
    assert [row["kind"] for row in rows] == list(KINDS) and {fmt for fmt, _ in KINDS.values()} == set(FORMATS)


def test_records_hold_what_the_bar_asks_for():
    """The random records are as nasty as they are said to be, and the digest sees a change of one character."""
    made = list(random_records(300))
    texts = [t for x in made for t in (x.prompt, x.chosen, *(y.text for y in x.rejected))]
    for piece in ("<video>", "<MASK>", "\n", '"', "🎬", "مرحبا", "\u2028", "\\"):
        assert sum(piece in t for t in texts) > 100
    assert {len(x.rejected) for x in made} == {1, 2, 3}
    assert sum(bool(x.spans) for x in made) > 100 and sum("extra" in x.provenance for x in made) > 50
    assert sum(any(y.spans for y in x.rejected) for x in made) > 100 and sum(not x.video for x in made) > 10
    again = list(random_records(300))
    assert content(made) == content(again) and len(made) == 300
    again[299].rejected[0] = dataclasses.replace(again[299].rejected[0], kept=0.123)
    assert content(made) != content(again)


def test_a_format_that_loses_something_is_seen(tmp_path, monkeypatch):
    def careless(path, records, fmt="native", **kwargs):
        write_pairs(
            path,
            ((dataclasses.replace(x, prompt=x.prompt.strip()) if fmt == "trl" else x) for x in records),
            fmt,
            **kwargs,
        )

    monkeypatch.setattr(bench, "write_pairs", careless)
    assert chains(60, tmp_path, ["native", "trl"])[1] == ["native -> trl", "trl -> native", "trl -> trl"]


@pytest.mark.parametrize("kind", ["trl", "llama-factory", "hf"])
def test_memory_does_not_grow(kind):
    """Lines, an array and Parquet, to the format and back through the join of rows: five times the records."""
    assert memory(kind, 5000) - memory(kind, 1000) < BOUND_MIB


def test_a_list_of_all_records_would_be_seen(tmp_path):
    """The bound is far below what the records themselves take."""
    write_pairs(tmp_path / "x.jsonl", many_records(400))
    tracemalloc.start()
    held = read_pairs(tmp_path / "x.jsonl")
    size = tracemalloc.get_traced_memory()[0] / 2**20
    tracemalloc.stop()
    assert len(held) == 400 and 10 * size > 2 * BOUND_MIB


def test_the_command(tmp_path, capsys):
    words = [
        "--records",
        "30",
        "--memory",
        "100",
        "400",
        "--kinds",
        "native",
        "trl",
        "--json",
        str(tmp_path / "x.json"),
    ]
    assert bench.main(words) == 0
    found = read_json(tmp_path / "x.json")
    assert found["lost"] == [] and [row["kind"] for row in found["rows"]] == ["native", "trl"]
    assert all(row["named"] and row["others"] for row in found["broken"])
    assert "4 chains of 30 records, 0 lose something" in capsys.readouterr().out
    assert bench.main([*words[:5], "--kinds", "trl", "--bound", "-99"]) == 1


@pytest.mark.parametrize("kind", NEEDED)
def test_one_broken_row_in_a_hundred(tmp_path: Path, kind: str):
    found = broken(kind, 1200, tmp_path)
    assert found["named"] and found["others"], found
    assert found["spoiled"] >= 12 > len(SPOILED) and set(NEEDED) == set(FORMATS)
