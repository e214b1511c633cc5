"""Answers on disk: asked once, torn lines cut, whole chunks asked again."""

from __future__ import annotations

import json

import pytest

from tempo_fast.errors import InputError
from tempo_fast.generation import AnswerCache, Request


class Counting:
    def __init__(self, model="m"):
        self.model, self.calls = model, []

    def provenance(self):
        return {"model": self.model}

    def generate(self, requests, desc=""):
        self.calls.append([r.prompt for r in requests])
        return [f"{self.model}: {r.prompt}" for r in requests]


def ask(path, engine, prompts, chunk=3):
    return AnswerCache(path, engine, chunk).answers([Request((), p) for p in prompts])


def test_asked_once_and_kept(tmp_path):
    path, engine = tmp_path / "d" / "a.jsonl", Counting()
    prompts = ["a", "b", "a", "c", "d", "é"]
    want = [f"m: {p}" for p in prompts]
    assert ask(path, engine, prompts) == want
    assert engine.calls == [["a", "b", "c"], ["d", "é"]]
    before = path.read_bytes()
    assert ask(path, engine, prompts) == want and len(engine.calls) == 2
    assert path.read_bytes() == before
    # another model does not get these answers
    other = Counting("n")
    assert ask(path, other, ["a"]) == ["n: a"]


@pytest.mark.parametrize("keep", [0, 1, 40, 139, 200])
def test_cut_anywhere_the_file_ends_up_the_same(tmp_path, keep):
    path, prompts = tmp_path / "a.jsonl", [str(i) for i in range(8)]
    ask(path, Counting(), prompts)
    whole = path.read_bytes()
    assert len(whole) > keep
    path.write_bytes(whole[:keep])
    assert ask(path, Counting(), prompts) == [f"m: {p}" for p in prompts]
    assert path.read_bytes() == whole


def test_a_chunk_with_a_gap_is_asked_as_a_whole(tmp_path):
    path, prompts, engine = tmp_path / "a.jsonl", ["a", "b", "c", "d"], Counting()
    ask(path, engine, prompts)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    engine.calls.clear()
    ask(path, engine, prompts)
    assert engine.calls == [["a", "b", "c"], ["d"]]


def test_damage_in_the_middle_and_folders_that_cannot_be_written(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("nonsense\n" + json.dumps({"key": "k", "text": "t"}) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:1"):
        AnswerCache(path, Counting())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        ask(tmp_path / "file" / "a.jsonl", Counting(), ["a"])
