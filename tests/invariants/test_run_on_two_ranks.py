"""The command under torchrun on two processes gives the losses and the adapter of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")


def rows(folder: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "train" / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(300)
def test_zero_3_on_two_ranks_is_one_process(tmp_path: Path, start_job) -> None:
    from safetensors.torch import load_file

    one, two = tmp_path / "one", tmp_path / "two"
    flags = ("--train.engine", "deepspeed", "--train.zero_stage", "3")
    for process in (start_job(one), start_job(two, *flags, ranks=2)):
        assert process.wait(240) == 0, process.stderr.read()[-3000:]
    for stage in ("stage1_r4", "stage2_r2", "sft"):
        assert len(rows(one, stage)) == len(rows(two, stage)) >= 2
        for a, b in zip(rows(one, stage), rows(two, stage), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["num_tokens"] == a["num_tokens"]
            if stage != "sft":
                assert b["rewards/margins"] == pytest.approx(a["rewards/margins"], rel=1e-3, abs=1e-5)
        adapter = f"train/{stage}/adapter/adapter_model.safetensors"
        first, second = load_file(str(one / adapter)), load_file(str(two / adapter))
        assert first.keys() == second.keys()
        for name, weight in first.items():
            # Adam turns a rounding of a near-zero gradient into a step of its own size
            torch.testing.assert_close(second[name], weight, rtol=1e-3, atol=2e-4, msg=name)
            assert not name.endswith("lora_B.weight") or weight.abs().max() > 0


@pytest.mark.timeout(400)
def test_all_steps_under_torchrun(tmp_path: Path) -> None:
    """The first rank curates, captions, evaluates and reports; both fill and train; a second start finds all done."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tempo_fast"]
    words += ["run", "tinyworld", "--output_dir", str(tmp_path / "run"), "--train.engine", "deepspeed"]
    words += ["--train.zero_stage", "2", "--model.threads", "1", "--data.tinyworld.train", "3"]
    words += ["--data.tinyworld.heldout", "1", "--train.stages", "[{r: 4}]", "--train.sft.max_steps", "1"]
    words += [
        "--train.sft.batch_size",
        "2",
        "--train.batch_size",
        "4",
        "--eval.bootstrap",
        "10",
        "--eval.captions",
        "false",
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    for start in range(2):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        for step in ("curate", "pairs", "reference", "train", "eval", "report"):
            assert (f"{step}: inputs unchanged, skipped" in done.stderr) == (start == 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [r["name"] for r in summary["eval"]] == ["base", "stage1_r4", "sft", "control"]
    assert (tmp_path / "run" / "report.html").is_file()
