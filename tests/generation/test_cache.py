"""Answers on disk: asked once, torn lines cut, whole chunks asked again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_the_file_says_who_answered_and_how(tmp_path):
    """One line for each engine and seed before its answers; what a request sets itself beside its answer."""
    path, engine = tmp_path / "a.jsonl", Counting()
    engine.seed = 7
    with AnswerCache(path, engine) as cache:
        cache.answers([Request((), "a"), Request((), "a", temperature=0.9, sample=2)])
        cache.answers([Request((), "b")])
    other = Counting("n")
    with AnswerCache(path, other) as cache:
        cache.answers([Request((), "a")])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    heads = [row for row in rows if "provenance" in row]
    assert [(h["provenance"], h["seed"]) for h in heads] == [({"model": "m"}, 7), ({"model": "n"}, 0)]
    assert [row.get("own") for row in rows] == [None, None, {"sample": 2, "temperature": 0.9}, None, None, None]
    assert [row["engine"][:12] for row in rows] == [heads[i]["engine"][:12] for i in (0, 0, 0, 0, 1, 1)]


def test_a_seed_counts_where_a_request_samples(tmp_path):
    """The engine is greedy, so that its provenance has no seed: only requests that sample are asked again."""
    path = tmp_path / "a.jsonl"
    for seed, asked in ((1, ["greedy", "drawn"]), (2, ["drawn"]), (1, [])):
        engine = Counting()
        engine.seed = seed
        with AnswerCache(path, engine, chunk=1) as cache:
            cache.answers([Request((), "greedy"), Request((), "drawn", temperature=0.5)])
        assert [p for call in engine.calls for p in call] == asked


def test_other_files_are_looked_into_and_left_alone(tmp_path):
    ask(tmp_path / "one.jsonl", Counting(), ["a", "b"])
    ask(tmp_path / "two.jsonl", Counting(), ["c"])
    ask(tmp_path / "strange.jsonl", Counting("n"), ["d"])
    with open(tmp_path / "two.jsonl", "ab") as f:
        f.write(b'{"key": "' + b"0" * 64 + b'", "te')  # another process is writing
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    engine, mine = Counting(), tmp_path / "mine.jsonl"
    also = [tmp_path / f"{name}.jsonl" for name in ("one", "two", "strange")]
    for _ in range(2):
        with AnswerCache(mine, engine, 2, also=also) as cache:
            assert cache.answers([Request((), p) for p in "abcdefg"]) == [f"m: {p}" for p in "abcdefg"]
    assert engine.calls == [["d", "e"], ["f", "g"]]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != mine} == before
    # chunks are the same when some of them are there already
    mine.write_bytes(b"".join(mine.read_bytes().splitlines(keepends=True)[:4]))
    with AnswerCache(mine, engine, 2, also=also) as cache:
        cache.answers([Request((), p) for p in "abcdefg"])
    assert engine.calls[2:] == [["f", "g"]]
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read"):
        AnswerCache(mine, engine, also=[tmp_path / "none.jsonl"]).answers([Request((), "z")])


HOLDING = """
import sys, time
from tempo_fast.generation import AnswerCache
cache = AnswerCache(sys.argv[1], None)
print("open", flush=True)
time.sleep(60)
"""


def test_one_process_at_a_time(tmp_path):
    """A lock that dies with its process, however it dies."""
    path = tmp_path / "a.jsonl"
    child = subprocess.Popen([sys.executable, "-c", HOLDING, str(path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match=r"a\.jsonl: another process is writing answers to it"):
            AnswerCache(path, Counting())
    finally:
        child.kill()
        child.wait()
    assert ask(path, Counting(), ["a"]) == ["m: a"]
    with AnswerCache(path, Counting()), pytest.raises(InputError, match="another process"):
        AnswerCache(path, Counting())


# Loads a model once; for each line it reads it forks a child that answers into the file named there and says so.
GENERATING = """
import os, random, sys
import tiny_qwen
from tempo_fast.config import GenerationConfig
from tempo_fast.generation import AnswerCache, Request, make_engine
from tempo_fast.models.load import load_bundle

bundle = load_bundle(sys.argv[1], "float32", "cpu")
rng = random.Random(1)
plans = [tiny_qwen.FakePlan(str(i), 2 + i % 5) for i in range(7)]
requests = [
    Request((rng.choice(plans),), rng.choice(["Say it.", "So?"]), rng.choice([2, 5, 25]), sample=i,
            temperature=rng.choice([0.0, 1.0]))
    for i in range(28)
]
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child:
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    config = GenerationConfig(batch_size=4, max_new_tokens=40, repetition_penalty=1.1)
    engine = make_engine(config, bundle, tiny_qwen.FakeReader(), None, 3)
    AnswerCache(line.strip(), engine, chunk=7).answers(requests)
    os._exit(0)
"""


def test_killed_at_random_moments_the_file_is_the_same(tiny_path, tmp_path):
    """SIGKILL of a process that generates, again and again on one file until it is finished, at 12 moments at least."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / p) for p in (".", "kernels", "tests"))}
    parent = subprocess.Popen(
        [sys.executable, "-c", GENERATING, tiny_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert parent.stdin is not None and parent.stdout is not None

    def generate(path, until=None):
        """Its exit code; it is killed after ``until`` seconds if it lives that long."""
        parent.stdin.write(f"{path}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())
        if until is not None:
            time.sleep(until)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(parent.stdout.readline())

    try:
        assert parent.stdout.readline() == "ready\n"
        start = time.monotonic()
        assert generate(tmp_path / "whole.jsonl") == 0
        took = time.monotonic() - start
        want = (tmp_path / "whole.jsonl").read_bytes()
        assert want.count(b"\n") == 29
        rng, killed, torn, files = random.Random(5), 0, set(), 0
        while killed < 12:
            files += 1
            path = tmp_path / f"{files}.jsonl"
            while (code := generate(path, rng.uniform(0, took))) != 0:
                assert code == -signal.SIGKILL
                killed += 1
                torn.add(path.stat().st_size if path.exists() else 0)
            assert path.read_bytes() == want
        assert len(torn) > 2  # it was killed in different states
    finally:
        parent.kill()
        parent.wait()
