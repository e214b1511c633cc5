"""The generator: films keep the rules they promise, files are readable and repeat byte for byte."""

import json
from collections import Counter
from itertools import groupby

import av
import numpy as np
import pytest

from tempo_fast.tinyworld import generate, render
from tempo_fast.tinyworld.questions import TYPES, draw_question
from tempo_fast.tinyworld.world import (
    MAX_SHOTS,
    MIN_CUT,
    SCENES,
    SPLITS,
    cut_strength,
    draw_film,
    film_of,
    light_mask,
    stream,
)

FILMS = [(split, i) for split in SPLITS for i in range(60)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    return out, generate.generate_world(out, seed=3, n_train=5, n_heldout=2)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("split", "index"), FILMS)
def test_film_keeps_its_rules(split, index):
    film = film_of(0, split, index)
    n = len(film.clips)
    assert (16 <= n <= 24) if index % 4 != 3 else (5 <= n <= 12)
    assert len(film.shot_spans) <= MAX_SHOTS
    scenes = [clip.scene for clip in film.clips]
    assert len(list(groupby(scenes))) == n  # neighbours never share a scene
    assert max(Counter(scenes).values()) <= min(3, n // 3)
    assert len({(c.event.colour, c.event.shape) for c in film.clips}) == n
    for clip in film.clips:
        assert len(clip.shots) in (1, 2)
        assert all(12 <= shot.n_frames <= 24 for shot in clip.shots)


@pytest.mark.parametrize(("split", "index"), FILMS)
def test_every_shot_has_four_sampled_frames(split, index):
    film = film_of(0, split, index)
    n = int(film.n_frames / 12 * 4) // 2 * 2
    sampled = np.linspace(0, film.n_frames - 1, n).round()
    for start, end in film.shot_spans:
        assert ((sampled >= start) & (sampled < end)).sum() >= 4


def test_scenes_recur_somewhere():
    recurring = sum(len({c.scene for c in film_of(0, s, i).clips}) < len(film_of(0, s, i).clips) for s, i in FILMS)
    assert recurring > len(FILMS) // 2


def test_cuts_are_hard_and_scenes_differ():
    strength = cut_strength()
    film = draw_film(stream(1), 24)
    shots = [(clip.scene, shot.view) for clip in film.clips for shot in clip.shots]
    for (s, v), (t, w) in zip(shots, shots[1:], strict=False):
        assert strength[2 * s + v, 2 * t + w] >= MIN_CUT
    histograms = []
    for k in range(len(SCENES)):
        picture = render.background(k, 0, 112, 112)
        swapped = render.background(k, 1, 112, 112)
        keys, swapped_keys = (p.reshape(-1, 3).astype(int) // 32 @ (64, 8, 1) for p in (picture, swapped))
        a, b = (np.bincount(key, minlength=512) / key.size for key in (keys, swapped_keys))
        assert np.minimum(a, b).sum() > 0.95
        histograms.append(a)
    for i in range(len(SCENES)):
        for j in range(i):
            assert np.minimum(histograms[i], histograms[j]).sum() < 0.6


def test_views_swap_the_tones():
    for scene in SCENES:
        assert (light_mask(scene.pattern, 0, 112, 112) ^ light_mask(scene.pattern, 1, 112, 112)).all()


def test_larger_world_holds_the_smaller(world, tmp_path):
    out, manifest = world
    other = generate.generate_world(tmp_path / "again", seed=3, n_train=3, n_heldout=1)
    for name in other["files"]:
        if name.startswith("videos/"):
            assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
            assert manifest["files"][name] == other["files"][name]


def test_finished_world_is_left_alone(world):
    out, manifest = world
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert generate.generate_world(out, seed=3, n_train=5, n_heldout=2) == manifest
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}


def test_missing_video_is_made_again(tmp_path):
    manifest = generate.generate_world(tmp_path, seed=3, n_train=1, n_heldout=0)
    (tmp_path / "videos/train_0000.mp4").unlink()
    assert generate.generate_world(tmp_path, seed=3, n_train=1, n_heldout=0) == manifest
    assert (tmp_path / "videos/train_0000.mp4").is_file()


@pytest.mark.parametrize("variant", ["plain", "portrait", "vfr", "audio"])
def test_each_variant_decodes_to_what_was_drawn(variant, tmp_path):
    film = draw_film(stream(8), 6, variant)
    pts = render.encode(film, tmp_path / "film.mp4", seed=4)
    with av.open(str(tmp_path / "film.mp4")) as container:
        assert bool(container.streams.audio) == (variant == "audio")
        decoded = list(container.decode(video=0))
    assert len(decoded) == film.n_frames == len(pts)
    assert decoded[0].height == (168 if variant == "portrait" else 112)
    steps = {round((b.time - a.time) * 600) for a, b in zip(decoded, decoded[1:], strict=False)}
    assert (len(steps) > 1) == (variant == "vfr")
    assert np.allclose([frame.time for frame in decoded], np.array(pts) / 600, atol=2e-3)
    drawn = render.frames(film, range(film.n_frames)).astype(float)
    seen = np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]).astype(float)
    assert abs(drawn - seen).mean() < 12


def test_tables_agree_with_the_films(world):
    out, _ = world
    truth = rows(out / "truth.jsonl")
    assert [t["split"] for t in truth] == ["train"] * 5 + ["heldout"] * 2
    for line in truth:
        assert (out / line["video"]).is_file()
        assert line["description"] == " ".join(e["text"] for e in line["events"])
        spans = [(e["start_frame"], e["end_frame"]) for e in line["events"]]
        assert [s for s, _ in spans[1:]] == [e for _, e in spans[:-1]]
        assert line["shots"][0][0] == 0 and line["shots"][-1][1] == spans[-1][1]
        assert all(e["start_s"] < e["end_s"] for e in line["events"])
    videos = {t["video"]: t for t in truth}
    for line in rows(out / "questions.jsonl"):
        assert line["video"] in videos and 0 <= line["answer"] < len(line["options"])
        assert len(set(line["options"])) == len(line["options"])
    sft = rows(out / "sft.jsonl")
    assert {videos[line["video"]]["split"] for line in sft} == {"train"}
    assert any(line["response"] == videos[line["video"]]["description"] for line in sft)
    assert len({line["id"] for line in sft}) == len(sft)


@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_right(kind):
    rng = stream(12)
    for _ in range(40):
        film = draw_film(rng, int(rng.integers(3, 12)))
        question = draw_question(rng, film, kind)
        if question is None:
            assert kind == "direction"
            continue
        events = [clip.event for clip in film.clips]
        texts = [e.text for e in events]
        said = question.options[question.answer]
        where = [(question.question.find(e.subject), i) for i, e in enumerate(events)]
        named = sorted((place, i) for place, i in where if place >= 0)
        asked = [i for _, i in named]
        if kind == "before":
            assert texts.index(said) == asked[0] - 1
        elif kind == "after":
            assert texts.index(said) == asked[0] + 1
        elif kind in ("first", "last"):
            assert texts.index(said) == (0 if kind == "first" else len(texts) - 1)
        elif kind == "order_yes_no":
            assert (said == "Yes.") == (asked[0] < asked[1])
        elif kind == "direction":
            assert f"moves {said[:-1].lower()}." in texts[asked[0]]
        else:
            words = question.question.removeprefix("How many objects ").rstrip("?")
            third = words.replace("move ", "moves ") if words.startswith("move") else f"{words}s"
            n = sum(text.endswith(f" {third}.") for text in texts)
            assert said == ("Zero.", "One.", "Two.", "Three.", "Four.", "Five.", "Six.", "Seven.", "Eight.")[n]
