"""Buckets, shards and stops: however the pairs are reached, they are the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_pairs import CONFIG, ClipReader, Scripted, items_of, pairs_of, video

from tempo_fast.errors import InputError
from tempo_fast.files import digest, file_digest
from tempo_fast.generation import RefusedRequest
from tempo_fast.pairs.method import Item
from tempo_fast.pairs.parts import Bucket, make_buckets
from tempo_fast.pairs.run import PairsJob, make_pairs
from tempo_fast.runtime.shards import Shard
from tempo_fast.schema import PreferenceRecord, read_records
from tempo_fast.video.container import DecodeTimeout

MANY = [video(f"{i:02d}.mp4", 4 + i % 9) for i in range(23)]
SMALL = replace(CONFIG, bucket_videos=3)


def result(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.json*"))}


def job(out: Path, videos=MANY, config=SMALL, engine=None, **how) -> PairsJob:
    return PairsJob(items_of(videos), config, out, engine or Scripted(), ClipReader(), **how)


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=80), st.integers(1, 9))
def test_buckets_hold_everything_once_and_only_by_digest(names, size):
    items = [Item(str(n), digest(n)) for n in names]
    buckets = make_buckets(items, size)
    assert sorted(p for b in buckets for p in b.places) == list(range(len(items)))
    for b in buckets:
        assert [items[p] for p in b.places] == b.items
        assert all(int(i.digest, 16) >> (256 - b.bits) == b.number for i in b.items)
    bits = buckets[0].bits
    assert len(items) <= size * 2**bits and (bits == 0 or len(items) > size * 2 ** (bits - 1))


@settings(deadline=None)
@given(st.integers(0, 8), st.integers(0, 8), st.integers(0, 2**30))
def test_a_bucket_knows_its_kin_of_other_sizes(bits, other, draw):
    """Two buckets are kin when some digest falls into both."""
    a = Bucket(bits, draw % 2**bits, [], [])
    b = Bucket(other, (draw >> 9) % 2**other, [], [])
    shared = min(bits, other)
    assert a.related(b.name) == (a.number >> (bits - shared) == b.number >> (other - shared))
    assert a.related(b.name) == b.related(a.name) and not a.related("notes")


@pytest.mark.parametrize("count", [2, 3, 40])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, count):
    whole = job(tmp_path / "whole")
    whole.run()
    audit = whole.parts.merge()
    shards = [job(tmp_path / "shards") for _ in range(count)]
    for k in random.Random(count).sample(range(count), count):
        assert shards[k].parts.missing() or count > len(whole.parts.buckets)
        shards[k].run(Shard(k, count))
    assert shards[0].parts.missing() == [] and shards[-1].parts.merge() == audit
    assert result(tmp_path / "shards") == result(tmp_path / "whole")
    # and one bucket of all of them, since this engine does not mind its company
    pairs_of(MANY, Scripted(), CONFIG, tmp_path / "one")
    assert result(tmp_path / "one") == result(tmp_path / "whole")


def test_records_stand_in_the_order_of_the_videos_and_the_audit_counts_them(tmp_path):
    records, audit = pairs_of(MANY, Scripted(), SMALL, tmp_path)
    for r, rows in records.items():
        videos = [x.video for x in rows]
        assert videos == sorted(videos) and len(set(videos)) == len(videos)
        assert audit["records"][str(r)] == len(rows)
        assert audit["files"][f"r{r}.jsonl"]["sha256"] == file_digest(tmp_path / f"r{r}.jsonl")
        kinds = Counter(y.kind for x in rows for y in x.rejected)
        for kind, stats in audit["stats"][str(r)].items():
            of_kind = [(x, y) for x in rows for y in x.rejected if y.kind == kind]
            assert stats["made"] == kinds[kind]
            assert stats["made"] + sum(stats["filtered"].values()) == len(MANY)
            mean = sum(len(y.text) / len(x.chosen) for x, y in of_kind) / len(of_kind)
            assert abs(stats["length_ratio"] - mean) < 1e-4


def test_a_missing_bucket_is_not_passed_over(tmp_path):
    one = job(tmp_path)
    one.run(Shard(0, 2))
    with pytest.raises(InputError, match="not there yet"):
        one.parts.merge()
    assert not (tmp_path / "audit.json").exists()


def test_done_buckets_are_not_asked_again_and_changed_ones_are(tmp_path):
    pairs_of(MANY, Scripted(), SMALL, tmp_path)
    before = result(tmp_path)
    again = Scripted()
    pairs_of(MANY, again, SMALL, tmp_path)
    assert again.asked == [] and result(tmp_path) == before
    # another limit asks nothing, but filters anew; another seed draws other orders of the same captions
    for config, seed in ((replace(SMALL, max_length_ratio=9.0), 0), (SMALL, 1)):
        pairs_of(MANY, again, config, tmp_path, seed=seed)
        assert again.asked == []
    assert result(tmp_path) != before
    # a reader that shows other frames makes all of them anew
    reader = ClipReader()
    reader.settings = "other frames"
    one = PairsJob(items_of(MANY), SMALL, tmp_path, again, reader)
    assert len(one.parts.missing()) == len(one.parts.buckets)
    # a part that was damaged is made again
    part = next((tmp_path / "parts").iterdir())
    part.write_bytes(part.read_bytes()[1:])
    pairs_of(MANY, again, SMALL, tmp_path, seed=0)
    assert result(tmp_path) == before


def test_more_videos_split_buckets_and_keep_their_answers(tmp_path):
    few = job(tmp_path, MANY[:12], replace(SMALL, bucket_videos=12))
    few.run()
    few.parts.merge()
    more = Scripted()
    both = job(tmp_path, engine=more)
    assert len(both.parts.buckets) > len(few.parts.buckets) == 1
    both.run()
    both.parts.merge()
    asked = {r.plans[-1].video for r in more.asked}
    assert asked == {v.video for v in MANY[12:]}
    pairs_of(MANY, Scripted(), SMALL, tmp_path / "fresh")
    assert result(tmp_path) == result(tmp_path / "fresh")


def test_the_same_bytes_under_two_names_are_two_videos(tmp_path):
    twin = replace(MANY[0], video="twin.mp4")
    records, _ = pairs_of([*MANY[:2], twin], Scripted(), SMALL, tmp_path)
    assert [x.video for x in records[4]] == ["00.mp4", "01.mp4", "twin.mp4"]
    assert len({x.id for x in records[4]}) == 3


CHILD = """
import json, sys, time
sys.path[:0] = [{tests!r}]
from dataclasses import replace
import scripted_pairs as s
from tempo_fast.generation import cache
from tempo_fast.pairs.run import PairsJob, make_pairs
from tempo_fast.runtime.shards import Shard

class Slow(s.Scripted):
    def generate(self, requests, desc=""):
        time.sleep(0.01)
        return super().generate(requests, desc)

config = replace(s.CONFIG, perturb_on="frames", bucket_videos=3)
videos = [s.video(f"{{i:02d}}.mp4", 4 + i % 9) for i in range(12)]
job = PairsJob(s.items_of(videos), config, __import__("pathlib").Path({out!r}), Slow(), s.ClipReader(), seed=1)
print("ready", flush=True)
job.run(Shard({index}, {count}))
if not job.parts.missing():
    job.parts.merge()
    print("merged", flush=True)
"""


def start(out: Path, index: int = 0, count: int = 1) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[1])
    code = CHILD.format(tests=tests, out=str(out), index=index, count=count)
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy(), stdout=subprocess.PIPE, text=True)


def test_killed_at_random_moments_and_resumed(tmp_path):
    """SIGKILL at ten moments of one run, whichever they are: the finished output equals the undisturbed one."""
    begin = time.monotonic()
    whole = start(tmp_path / "whole")
    assert whole.stdout.readline() == "ready\n"
    begin = time.monotonic()
    assert whole.stdout.readline() == "merged\n" and whole.wait() == 0
    lasts = time.monotonic() - begin
    seed = time.time_ns()
    rng, kills = random.Random(seed), 0
    for _ in range(10):
        child = start(tmp_path / "cut")
        assert child.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, lasts / 5))
        child.kill()
        kills += child.wait() == -signal.SIGKILL
    last = start(tmp_path / "cut")
    assert last.stdout.read() == "ready\nmerged\n" and last.wait() == 0
    assert kills >= 5, f"seed {seed}"
    assert result(tmp_path / "cut") == result(tmp_path / "whole"), f"seed {seed}"
    for folder in ("answers", "parts"):
        ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / k / folder).iterdir()} for k in ("cut", "whole"))
        assert ours == theirs, f"{folder}, seed {seed}"


def test_two_processes_one_killed(tmp_path):
    whole = start(tmp_path / "whole")
    assert whole.communicate()[0] == "ready\nmerged\n"
    pair = [start(tmp_path / "two", k, 2) for k in (0, 1)]
    assert pair[1].stdout.readline() == "ready\n"
    time.sleep(random.uniform(0, 0.1))
    pair[1].kill()
    pair[1].wait()
    assert pair[0].wait() == 0
    assert start(tmp_path / "two", 1, 2).communicate()[0] == "ready\nmerged\n"
    assert result(tmp_path / "two") == result(tmp_path / "whole")
    audit = json.loads((tmp_path / "two" / "audit.json").read_text())
    assert audit["records"]["4"] == len(read_records(tmp_path / "two" / "r4.jsonl", PreferenceRecord)) == 12


def test_sections_of_other_methods_change_nothing(tmp_path):
    pairs_of(MANY[:4], Scripted(), SMALL, tmp_path)
    other = replace(SMALL, mdpo=replace(SMALL.mdpo, samples=7), audit_pairs=3, rrpo=replace(SMALL.rrpo, chosen="model"))
    assert job(tmp_path, MANY[:4], other).parts.missing() == []
    assert job(tmp_path, MANY[:4], replace(SMALL, max_length_ratio=2.0)).parts.missing() != []


def test_other_bytes_of_a_video_are_another_version(tmp_path):
    """A question's video is known by its ends; its time and size say when the rest is another."""
    items = [replace(i, version="10-1") for i in items_of(MANY[:3])]
    make_pairs(items, Scripted(), ClipReader(), SMALL, tmp_path)
    asked = PairsJob(items, SMALL, tmp_path, Scripted(), ClipReader())
    assert asked.parts.missing() == []
    changed = PairsJob([replace(items[0], version="10-2"), *items[1:]], SMALL, tmp_path, Scripted(), ClipReader())
    [bucket] = changed.parts.missing()
    assert items[0].video in {i.video for i in bucket.items}


def test_what_failed_for_want_of_time_is_tried_again(tmp_path):
    """A timeout says nothing of the file; a broken file stays failed, and nobody looks at it twice."""

    class Slow(ClipReader):
        late = True

        def plan(self, path, indices=None):
            if "01" in path and self.late:
                raise DecodeTimeout(f"{path}: took longer than 1 s")
            return super().plan(path, indices)

    videos = [*MANY[:3], video("gone.mp4", 5)]
    reader = Slow()
    first = PairsJob(items_of(videos), SMALL, tmp_path, Scripted(), reader)
    first.run()
    failed = {f["video"]: f.get("again") for f in first.parts.merge()["failed"]}
    assert failed == {"01.mp4": "timeout", "gone.mp4": None}
    reader.late = False
    second = PairsJob(items_of(videos), SMALL, tmp_path, Scripted(), reader)
    second.run()
    assert [f["video"] for f in second.parts.merge()["failed"]] == ["gone.mp4"]
    pairs_of(videos, Scripted(), SMALL, tmp_path / "fresh")
    assert result(tmp_path) == result(tmp_path / "fresh")
    again = Scripted()
    third = PairsJob(items_of(videos), SMALL, tmp_path, again, reader)
    third.run()
    assert again.asked == [] and all(third.parts.is_done(b, settled=True) for b in third.parts.buckets)


def test_refused_requests_fail_their_video_and_refused_words_their_pair(tmp_path):
    """Too long for the model: of a video, or of captions to tell; a model that refuses everything ends the run."""

    class Short(Scripted):
        def generate(self, requests, desc=""):
            texts = [None if self.refuses(r) else self._answer(r) for r in requests]
            if None in texts:
                reasons = {i: "too long" for i, t in enumerate(texts) if t is None}
                raise RefusedRequest(reasons, [t or "" for t in texts])
            return texts

        def refuses(self, r):
            return any("01" in p.video for p in r.plans) or (not r.plans and "Event 6." in r.prompt)

    config = replace(CONFIG, aggregate="model")
    records, audit = pairs_of(MANY[:5], Short(), config, tmp_path)
    assert [f["video"] for f in audit["failed"]] == ["01.mp4"]
    # videos of 7 and more clips have captions that are too long to tell; one of 4 and one of 6 are left
    assert {x.video for rows in records.values() for x in rows} == {"00.mp4", "02.mp4"}

    class Never(Short):
        def refuses(self, r):
            return True

    with pytest.raises(InputError, match="too long"):
        pairs_of(MANY[:5], Never(), config, tmp_path / "never")
