"""A stopped run goes on with another number of ranks, ZeRO stage and engine: the losses of an undisturbed one."""

import json
import signal
import time
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

STAGE = "stage1_r4"
JOB = ("--train.stages", "[{r: 4, epochs: 8}]", "--train.sft.epochs", "0", "--train.save_steps", "2")
TWO_ZERO_3 = ("--train.engine", "deepspeed", "--train.zero_stage", "3", "--train.async_save", "true")
TWO_ZERO_2 = ("--train.engine", "deepspeed", "--train.zero_stage", "2")


def rows(out: Path) -> list[dict]:
    path = out / "train" / STAGE / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def stop_after(process, out: Path, steps: int) -> str:
    """SIGTERM when so many steps are in the metrics; what the process said."""
    deadline = time.monotonic() + 120
    while process.poll() is None and len(rows(out)) < steps and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert f"stopped in {STAGE} after step" in said, said[-3000:]
    return said


def world_of(out: Path) -> int:
    newest = max((out / "train" / STAGE).glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text())
    assert len(state["files"]) == state["world"]
    return state["world"]


@pytest.mark.timeout(400)
def test_two_ranks_one_two(tmp_path: Path, start_job) -> None:
    from safetensors.torch import load_file
    from torch.testing import assert_close

    plain, out = tmp_path / "plain", tmp_path / "moved"
    undisturbed = start_job(plain, *JOB)
    stop_after(start_job(out, *JOB, *TWO_ZERO_3, ranks=2), out, 2)
    assert world_of(out) == 2
    before = len(rows(out))
    said = stop_after(start_job(out, *JOB), out, before + 3)
    assert f"{STAGE}: resuming after step" in said and "written at world size 2, goes on at 1" in said
    assert world_of(out) == 1
    last = start_job(out, *JOB, *TWO_ZERO_2, ranks=2)
    _, said = last.communicate(timeout=200)
    assert last.returncode == 0 and "written at world size 1, goes on at 2" in said, said[-3000:]
    assert undisturbed.wait(200) == 0
    whole, moved = rows(plain), rows(out)
    assert [r["stage_step"] for r in moved] == [r["stage_step"] for r in whole] and len(whole) > before + 4
    for a, b in zip(whole, moved, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["num_tokens"] == a["num_tokens"] and b["learning_rate"] == a["learning_rate"]
    adapter = f"train/{STAGE}/adapter/adapter_model.safetensors"
    first, second = load_file(plain / adapter), load_file(out / adapter)
    for name, weight in first.items():
        # Adam turns a rounding of a near-zero gradient into a step of its own size
        assert_close(second[name], weight, rtol=1e-3, atol=2e-4, msg=name)
