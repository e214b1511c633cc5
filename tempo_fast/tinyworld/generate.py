"""Writes a tinyworld: MP4 files, and beside them what is true in them, questions, and exchanges to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tempo_fast.files import digest, file_digest, write_json, write_jsonl
from tempo_fast.prompts import VIDEO_PROMPTS
from tempo_fast.tinyworld import render
from tempo_fast.tinyworld.questions import TYPES, draw_question
from tempo_fast.tinyworld.world import SPLITS, Film, film_of, stream

VERSION = 1
MANIFEST = "world.json"
TABLES = ("truth.jsonl", "questions.jsonl", "sft.jsonl")


def generate_world(
    out_dir: str | Path,
    seed: int = 0,
    n_train: int = 40,
    n_heldout: int = 16,
    *,
    questions_per_video: int = 7,
    sft_captions_per_video: int = 2,
    sft_questions_per_video: int = 4,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> dict[str, Any]:
    """Make the world in `out_dir` and return its manifest; a finished world of the same parameters is left as it is.

    Every video depends on (seed, split, index) alone, so a larger world holds the smaller one. `progress` wraps the
    list of videos (`tqdm`, for instance).
    """
    out = Path(out_dir)
    parameters = {
        "version": VERSION,
        "seed": seed,
        "n_train": n_train,
        "n_heldout": n_heldout,
        "questions_per_video": questions_per_video,
        "sft_captions_per_video": sft_captions_per_video,
        "sft_questions_per_video": sft_questions_per_video,
    }
    done = _finished(out, parameters)
    if done is not None:
        return done
    (out / "videos").mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    digests: dict[str, str] = {}
    jobs = [("train", i) for i in range(n_train)] + [("heldout", i) for i in range(n_heldout)]
    for split, index in progress(jobs) if progress else jobs:
        film = film_of(seed, split, index)
        video = f"videos/{split}_{index:04d}.mp4"
        pts = render.encode(film, out / video, seed=int(stream(seed, SPLITS[split], index, 1).integers(2**31)))
        digests[video] = file_digest(out / video)
        tables["truth.jsonl"].append(truth_of(film, video, split, pts))
        rng = stream(seed, SPLITS[split], index, 2)
        for k in range(questions_per_video):
            question = draw_question(rng, film, TYPES[k % len(TYPES)])
            if question is None:
                continue
            tables["questions.jsonl"].append(
                {
                    "id": f"{split}_{index:04d}_q{k}",
                    "video": video,
                    "split": split,
                    "type": question.type,
                    "question": question.question,
                    "options": list(question.options),
                    "answer": question.answer,
                }
            )
        if split == "train":
            tables["sft.jsonl"] += _exchanges(
                film, video, f"{split}_{index:04d}", stream(seed, SPLITS[split], index, 3),
                sft_captions_per_video, sft_questions_per_video,
            )  # fmt: skip
    for name, rows in tables.items():
        write_jsonl(out / name, rows)
        digests[name] = file_digest(out / name)
    manifest = {"parameters": parameters, "digest": digest(digests), "files": digests}
    write_json(out / MANIFEST, manifest)
    return manifest


def truth_of(film: Film, video: str, split: str, pts: list[int]) -> dict[str, Any]:
    """The line of `truth.jsonl`: frames are half-open ranges, seconds are presentation times."""
    last = pts[-1] + render.TICKS // 12
    times = [round(p / render.TICKS, 4) for p in [*pts, last]]
    return {
        "video": video,
        "split": split,
        "variant": film.variant,
        "description": film.description,
        "events": [
            {
                "text": clip.event.text,
                "color": clip.event.colour,
                "shape": clip.event.shape,
                "action": clip.event.action,
                "scene": clip.scene,
                "start_frame": start,
                "end_frame": end,
                "start_s": times[start],
                "end_s": times[end],
            }
            for clip, (start, end) in zip(film.clips, film.clip_spans, strict=True)
        ],
        "shots": [list(span) for span in film.shot_spans],
    }


def _exchanges(film: Film, video: str, name: str, rng, n_captions: int, n_questions: int) -> list[dict[str, Any]]:
    rows = []
    for k, p in enumerate(rng.permutation(len(VIDEO_PROMPTS))[:n_captions]):
        rows.append({"id": f"{name}_c{k}", "prompt": VIDEO_PROMPTS[int(p)], "response": film.description})
    for k, kind in enumerate(rng.permutation(TYPES)[:n_questions]):
        question = draw_question(rng, film, str(kind))
        if question is not None:
            answer = question.options[question.answer]
            rows.append({"id": f"{name}_a{k}", "prompt": question.question, "response": answer})
    return [{"id": row["id"], "video": video, "prompt": row["prompt"], "response": row["response"]} for row in rows]


def _finished(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        same = manifest["parameters"] == parameters
        # sizes are not kept: a missing file is what an interrupted copy leaves
        return manifest if same and all((out / name).is_file() for name in manifest["files"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
