"""A synthetic run folder with real videos, so that the page can be built without training anything."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from tempo_fast.config import RunConfig
from tempo_fast.configio import save_config
from tempo_fast.files import file_digest, write_json, write_jsonl
from tempo_fast.perturb import KINDS, perturb
from tempo_fast.schema import Clip, Clips, PreferenceRecord, Rejected

RS = (16, 8, 4, 2)


def write_video(path: Path, shots: int, shot_frames: int, size: tuple[int, int], seed: int) -> None:
    """A short MP4 of plain shots with a moving square."""
    import av
    import numpy as np

    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], "yuv420p"
        for _ in range(shots):
            back, front = rng.integers(20, 235, 3), rng.integers(20, 235, 3)
            for f in range(shot_frames):
                picture = np.full((size[1], size[0], 3), back, np.uint8)
                x = 8 + f * (size[0] - 40) // shot_frames
                picture[size[1] // 3 : size[1] // 3 + 24, x : x + 24] = front
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def make_run(root: Path, *, videos: int = 4, steps: int = 9, seed: int = 0) -> RunConfig:
    """Write every file of a finished run below ``root``; figures are drawn, schemas are the real ones."""
    rng = random.Random(seed)
    config = RunConfig(output_dir=str(root))
    config.report.pairs = 1
    (root / "world").mkdir(parents=True, exist_ok=True)
    words = ["A red circle moves left.", "A blue ring grows.", "A white cross appears.", "A green square moves up."]
    clips: list[Clips] = []
    for v in range(videos):
        n, path = 16 + v * 3, root / "world" / f"train_{v:04d}.mp4"
        write_video(path, n, 6, (112, 168) if v % 2 else (112, 112), v)
        spans = [Clip(i * 6, i * 6 + 6, i * 0.5, i * 0.5 + 0.5, i % 9, [i * 6 + 2, i * 6 + 4]) for i in range(n)]
        shots = [[i * 6, i * 6 + 6] for i in range(n)]
        clips.append(Clips(str(path), file_digest(path), n * 6, n * 0.5, shots, [i % 9 for i in range(n)], spans))
    write_jsonl(root / "curate" / "clips.jsonl", clips)
    stats: dict[str, Any] = {}
    pairs = 0
    for r in RS:
        rows = []
        for c in clips:
            events = [rng.choice(words) for _ in c.clips]
            rejected = []
            for kind in KINDS:
                order = perturb(kind, len(events), r, 1, labels=list(range(len(events))))
                assert order is not None
                rejected.append(
                    Rejected(
                        " ".join(order.apply(events)), kind, r, list(order.order), order.broken, order.kept, [[0, 5]]
                    )
                )
            pairs += len(rejected)
            rows.append(
                PreferenceRecord(
                    f"{Path(c.video).stem}/r{r}",
                    c.video,
                    "Describe this video in order.",
                    " ".join(events),
                    rejected,
                    r,
                )
            )
        write_jsonl(root / "pairs" / f"r{r}.jsonl", rows)
        stats[str(r)] = {
            kind: {
                "made": len(rows),
                "filtered": {"identity": 2, "length_ratio": 1} if kind == "shuffle" else {},
                "length_ratio": 0.4 if kind == "drop" else 1.0,
                "similarity": 0.5,
                "broken": 0.9,
                "kept": 1.0,
            }
            for kind in KINDS
        }
    write_json(
        root / "pairs" / "audit.json",
        {"videos": videos, "failed": [], "stats": stats, "coincide": [{"r": [16, 8], "videos": 1, "of": videos}]},
    )
    stages = []
    for k, r in enumerate(RS):
        name, rows = f"stage{k + 1}_r{r}", []
        for s in range(steps):
            t = (k * steps + s + 1) / (4 * steps)
            row = {
                "step": s + 1,
                "stage": name,
                "stage_step": s + 1,
                "loss": 1.4 * math.exp(-2 * t) + rng.uniform(0, 0.1),
                "rewards/margins": 0.9 * t + rng.gauss(0, 0.1),
                "rewards/accuracies": min(1.0, 0.5 + 0.4 * t + rng.gauss(0, 0.04)),
                "kl/chosen": 2 * t + rng.uniform(0, 0.2),
                "kl/rejected": 3 * t + rng.uniform(0, 0.2),
                "logps/chosen": -60 + 20 * t,
                "logps/rejected": -62 - 5 * t,
                "perf/tokens_per_s": 5300.0,
                "perf/decode_wait_frac": 0.04,
            }
            row |= {f"rewards/accuracies/{kind}": min(1.0, 0.5 + 0.4 * t + rng.gauss(0, 0.08)) for kind in KINDS}
            rows.append(row)
        write_jsonl(root / "train" / name / "metrics.jsonl", rows)
        stages.append(
            {
                "name": name,
                "r": r,
                "steps": steps,
                "pairs": videos * 3,
                "loss_first": rows[0]["loss"],
                "loss_last": rows[-1]["loss"],
                "margin": rows[-1]["rewards/margins"],
                "accuracy": rows[-1]["rewards/accuracies"],
                "seconds": 21.5,
                "reference": {"hits": 0 if k == 0 else videos, "misses": videos * (4 if k == 0 else 3)},
            }
        )
    for k, name in enumerate(("sft", "control")):
        rows = [
            {"stage_step": s + 1, "loss": 1.1 * math.exp(-s / 6) + 0.3 * k + rng.uniform(0, 0.05)} for s in range(12)
        ]
        write_jsonl(root / "train" / name / "metrics.jsonl", rows)
    extra = {
        "steps": 12,
        "pairs": 96,
        "loss_first": 1.2,
        "loss_last": 0.3,
        "margin": None,
        "accuracy": None,
        "seconds": 33.0,
    }

    def stat(value: float) -> dict[str, Any]:
        return {"value": value, "lo": max(-1.0, value - 0.07), "hi": min(1.0, value + 0.06), "n": 24, "items": 96}

    evals = []
    for i, name in enumerate(["base", *(s["name"] for s in stages), "sft", "control"]):
        t = 0.25 if name == "control" else i / 5
        evals.append(
            {
                "name": name,
                "pairwise_all": stat(0.55 + 0.35 * t),
                "pairwise": {k: {str(r): stat(0.5 + 0.4 * t * r / (r + 4)) for r in RS} for k in KINDS},
                "questions": {
                    "all": stat(0.4 + 0.2 * t),
                    **{
                        q: stat(0.35 + 0.3 * t)
                        for q in ("before", "after", "first", "last", "order_yes_no", "direction", "count")
                    },
                },
                "captions": {"events": stat(0.3 + 0.2 * t), "objects": stat(0.8), "order_tau": stat(0.05 + 0.6 * t)},
                "seconds": 12.0,
            }
        )
    write_json(root / "eval" / "eval.json", {"rows": evals})
    write_json(
        root / "summary.json",
        {
            "version": "0.1.0",
            "config_digest": "ab" * 32,
            "model": {"path": "tinyworld", "weights": "cd" * 32, "dtype": "float32"},
            "counts": {
                "videos": videos + 3,
                "usable": videos,
                "filtered": 1,
                "quarantined": 2,
                "records": videos * 4,
                "pairs": pairs,
            },
            "stages": stages,
            "sft": {"name": "sft", **extra},
            "control": {"name": "control", **extra},
            "eval": evals,
            "timings_s": {
                "world": 21.0,
                "curate": 14.2,
                "pairs": 61.0,
                "reference": 8.4,
                "train": 152.7,
                "eval": 88.1,
                "total": 345.4,
            },
            "quarantined": [
                {
                    "video": "data/broken_<one>.mp4",
                    "reason": "data/broken_<one>.mp4: the file ends before its index (moov) begins",
                },
                {"video": "data/notes.mp4", "reason": "not a video"},
            ],
            "filtered": [{"video": "data/one_shot.mp4", "reason": "1 shot, fewer than 4"}],
        },
    )
    save_config(config, root / "config.yaml")
    return config


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> tuple[Path, RunConfig]:
    root = tmp_path_factory.mktemp("run")
    return root, make_run(root)
