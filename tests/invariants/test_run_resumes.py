"""A real process, stopped by a real signal while it trains: the same command goes on to the same bytes."""

import json
import signal
import time
from pathlib import Path

import pytest

from tempo_fast.files import file_digest

# enough steps that a signal sent after the first one arrives before the last, on a busy machine too
LONG = ("--train.stages", "[{r: 4, epochs: 6}, {r: 2, epochs: 6}]", "--train.sft.epochs", "6")


def finish(process) -> None:
    assert process.wait(120) == 0, process.stderr.read()[-3000:]


def results(out: Path) -> list:
    found: list = [file_digest(out / "train" / "merged" / "model.safetensors")]
    for stage in ("stage1_r4", "stage2_r2", "sft"):
        lines = (out / "train" / stage / "metrics.jsonl").read_text().splitlines()
        found.append([(r["loss"], r["grad_norm"], r["num_tokens"]) for r in map(json.loads, lines)])
        found.append(file_digest(out / "train" / stage / "adapter" / "adapter_model.safetensors"))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {"out": tmp_path_factory.mktemp("undisturbed"), "results": None}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [(signal.SIGINT, 130, "stage2_r2"), (signal.SIGTERM, 75, "stage1_r4"), (signal.SIGKILL, -9, "sft")],
    ids=["ctrl-c", "preempted", "killed"],
)
def test_stopped_and_resumed(tmp_path: Path, start_job, undisturbed, number: int, code: int, stage: str) -> None:
    if undisturbed["results"] is None:
        finish(start_job(undisturbed["out"], *LONG))
        undisturbed["results"] = results(undisturbed["out"])
    process = start_job(tmp_path, *LONG)
    metrics = tmp_path / "train" / stage / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait(60) == code, process.stderr.read()[-3000:]
    said = process.stderr.read()
    assert "Traceback" not in said
    assert number == signal.SIGKILL or f"{stage} after step" in said and "resume" in said
    assert not (tmp_path / "train" / "merged").exists()
    finish(start_job(tmp_path, *LONG))
    assert results(tmp_path) == undisturbed["results"]
