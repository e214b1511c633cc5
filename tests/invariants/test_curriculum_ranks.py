"""Mixed, replayed and adaptive stages with SFT between: two ranks under ZeRO-3 decide and train as one process does."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_fast.files import read_jsonl, write_jsonl

pytest.importorskip("deepspeed")

STAGES = "[{r: 4, epochs: 2}, {r: [2, 4], mix: [2, 1]}, {r: 2, replay: 0.4, reference: previous_stage, epochs: 2}]"
FLAGS = [
    "--train.stages", STAGES, "--train.adaptive.every", "2", "--train.adaptive.holdout", "0.4",
    "--train.adaptive.threshold", "2", "--train.adaptive.patience", "3", "--train.adaptive.max_steps", "14",
    "--train.sft.when", "interleaved", "--train.sft.ratio", "0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def job_data(job_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The films of the small job, and nine records without a video, so that some are held out."""
    out = tmp_path_factory.mktemp("more")
    for r in (4, 2):
        rows = [row for _, row in read_jsonl(job_data / "pairs" / f"r{r}.jsonl")]
        for i in range(9):
            rejected = [{"text": f"Then a square {k} grows {r}.", "kind": "shuffle", "r": r} for k in range(1 + i % 3)]
            rows.append(
                {"id": f"t{i}", "video": "", "prompt": f"Tell {i}.", "chosen": f"It appears {i}.", "r": r}
                | {"rejected": rejected}
            )
        write_jsonl(out / "pairs" / f"r{r}.jsonl", rows)
    (out / "videos").symlink_to(job_data / "videos")
    (out / "sft.jsonl").write_text((job_data / "sft.jsonl").read_text())
    return out


def decisions(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "train" / "decisions.jsonl")]


@pytest.mark.timeout(400)
def test_two_ranks_decide_as_one(tmp_path: Path, start_job: Callable) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    zero = ("--train.engine", "deepspeed", "--train.zero_stage", "3")
    alone, pair = start_job(one, *FLAGS), start_job(two, *FLAGS, *zero, ranks=2)
    # the pair is stopped once, in a stage that looks
    patience = time.monotonic() + 200
    while not (two / "train" / "decisions.jsonl").is_file() and time.monotonic() < patience and pair.poll() is None:
        time.sleep(0.05)
    pair.send_signal(signal.SIGTERM)
    assert pair.wait(200) != 0
    for process in (alone, start_job(two, *FLAGS, *zero, ranks=2)):
        assert process.wait(300) == 0, process.stderr.read()[-3000:]
    here, there = decisions(one), decisions(two)
    assert len(here) >= 6 and [r["decision"] for r in here].count("advance") == 3
    for a, b in zip(here, there, strict=True):
        assert a == b, "which pairs are right, the interval and the reason"
    summary = json.loads((one / "summary.json").read_text())
    names = ["stage1_r4", "stage2_r2_4", "stage3_r2"]
    assert [s["name"] for s in summary["stages"]] == names
    assert [row for s in summary["stages"] for row in s["decisions"]] == here
    assert summary["stages"][2]["data"]["replayed"]["pairs"] > 0 and summary["stages"][0]["sft_steps"] > 0
    for name in names:
        a, b = ([row for _, row in read_jsonl(f / "train" / name / "metrics.jsonl")] for f in (one, two))
        assert [r["num_tokens"] for r in a] == [r["num_tokens"] for r in b]
        for x, y in zip(a, b, strict=True):
            key = "loss" if "loss" in x else "sft/loss"
            assert y[key] == pytest.approx(x[key], rel=1e-5)
