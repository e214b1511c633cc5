"""Pairs of videos whose events are known: no rejected answer tells what its chosen one tells, by the truth, also where
scenes and events come again.

First with an engine that sees what is shown and says the truth, on a hundred films that need no file; then from real
files through the steps of the command, by the shipped model, which makes mistakes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_pairs import CONFIG, Scripted, pairs_of, video

from bench import pairs as bench
from tempo_fast.files import read_json
from tempo_fast.pairs.judge import events, same_events
from tempo_fast.prompts import CLIP_PROMPT, VIDEO_PROMPTS, WINDOW_PROMPT
from tempo_fast.schema import Clips, read_records
from tempo_fast.tinyworld.world import Film, draw_film, stream

RS = (16, 8, 4, 2)


def films() -> dict[str, Film]:
    """29 plain films of 4 to 32 clips, and 15 of each style in which something comes again."""
    found = {f"plain_{i}": draw_film(stream(71, i), 4 + i) for i in range(29)}
    for style in bench.STYLES:
        found |= {f"{style}_{i}": bench.film_again(72, i, style) for i in range(15)}
    return found


class Sees(Scripted):
    """Says what happens in the clips it is shown."""

    def __init__(self, films: dict[str, Film]) -> None:
        super().__init__("sees")
        self.films = films

    def _answer(self, r: Any) -> str:
        shown = [[self.films[p.video].clips[i].event.text for i in p.clips] for p in r.plans]
        if r.prompt in (CLIP_PROMPT, WINDOW_PROMPT):
            return shown[-1][0]
        assert r.prompt in VIDEO_PROMPTS
        return " ".join(shown[0])


@pytest.fixture(scope="module")
def plans() -> dict[str, Film]:
    return films()


@pytest.mark.parametrize("mode", bench.MODES)
def test_no_kept_pair_is_an_identity_by_the_truth(mode: str, plans: dict[str, Film], tmp_path: Path) -> None:
    config = replace(CONFIG, **bench.MODES[mode])
    curated = [video(name, len(f.clips), [c.scene for c in f.clips]) for name, f in plans.items()]
    made, audit = pairs_of(curated, Sees(plans), config, tmp_path)
    kept: Counter[str] = Counter()
    for rows in made.values():
        for record in rows:
            truth = [c.event.text for c in plans[record.video].clips]
            assert record.chosen == " ".join(truth)
            for x in record.rejected:
                told = [truth[i] for i in x.order]
                assert told != truth and x.text == " ".join(told)
                assert not same_events(record.chosen, x.text)
                kept[record.video.split("_")[0]] += 1
    assert set(kept) == {"plain", *bench.STYLES}
    # a block played twice has no change at r = 2 whose groups are the blocks; one played back has no full reverse
    filtered: Counter[str] = Counter()
    for row in audit["stats"].values():
        for reasons in row.values():
            filtered.update(reasons["filtered"])
    assert filtered["identity"] >= 15 and set(filtered) <= {"identity", "duplicate", "equal_to_chosen"}
    if mode != "captions":  # scenes are moved about, events not: found by the texts
        assert filtered["equal_to_chosen"] > 0


# -- real files and the model that is shipped -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The benchmark on six short films, of which every other one repeats events: its folder and its rows."""
    before = torch.get_num_threads()
    work = tmp_path_factory.mktemp("pairs")
    options = "--videos 6 --again 2 --longest 12 --seed 31 --modes windows --r 16 2 --threads 1"
    try:
        assert bench.main([*options.split(), "--work", str(work), "--json", str(work / "rows.json")]) == 0
    finally:
        torch.set_num_threads(before)
    return work, read_json(work / "rows.json")["rows"]


def only(rows: list[dict[str, Any]], case: str, **of: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if row["case"] == case and all(row[k] == v for k, v in of.items())]
    return found


def test_shots_are_found_where_scenes_recur(measured: Any) -> None:
    shots = only(measured[1], "shots")
    assert shots["value"] >= 0.98 and shots["n"] >= 40 and shots["more"]["usable"] == shots["videos"] == 6


def test_every_rejected_answer_differs_and_the_chosen_ones_are_in_order(measured: Any) -> None:
    work, rows = measured
    truths = bench.make_world(work / "world", 31, 6, again=2, longest=12)
    clips = {c.video: c for c in read_records(work / "curated" / "curate" / "clips.jsonl", Clips)}
    made = bench.load(bench.configure(work / "windows" / "pairs", work, "tinyworld", {"r": [16, 2]}))
    pairs = same_shown = 0
    for record in made.records:
        shown = bench.true_events(clips[record.video], truths[record.video])
        assert shown == [e["text"] for e in truths[record.video]["events"]]
        for x in record.rejected:
            pairs += 1
            assert events(record.chosen) != events(x.text)
            if [shown[i] for i in x.order] == shown:  # the model has told one event in two ways
                same_shown += 1
                assert len({*events(record.chosen), *events(x.text)}) > len(set(shown))
    kept = only(rows, "kept")
    assert (kept["n"], kept["equal"], kept["more"]["same_shown"]) == (pairs, 0, same_shown)
    assert pairs > 24 and same_shown <= 0.05 * pairs
    assert only(rows, "in_order")["value"] >= 0.8 and only(rows, "told")["value"] >= 0.8


def test_the_judge_tells_heavy_perturbations_apart_more_often(measured: Any) -> None:
    heavy, light = (only(measured[1], "separated", r=r, kind="all") for r in (16, 2))
    assert heavy["lo"] > light["hi"] and only(measured[1], "more_often")["lo"] > 0
