"""Curation and pairs by several processes, as launchers start them: the same bytes as by one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--data.tinyworld.train", "4", "--data.tinyworld.heldout", "1", "--pairs.bucket_videos", "1"]
COMMAND = [sys.executable, "-m", "tempo_fast"]


def start(folder: Path, *words: str, launcher: list[str] | None = None, **env: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.Popen(
        [*(launcher or COMMAND), *words, *SMALL, "--model.threads", "1"],
        cwd=folder, env={**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def done(process: subprocess.Popen[str]) -> str:
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    return out


def result(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for k in ("curate", "pairs") for p in (out / k).glob("[!j]*.json*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run by one process, with its videos."""
    folder = tmp_path_factory.mktemp("whole")
    done(start(folder, "run", "tinyworld", "--until", "pairs", "--output_dir", "one"))
    assert {"curate/clips.jsonl", "pairs/r2.jsonl", "pairs/audit.json"} <= set(result(folder / "one"))
    return folder


def words(name: str, verb: str = "run") -> list[str]:
    """Another run over the same videos, under the same names."""
    until = ["--until", "pairs"] if verb == "run" else []
    return [verb, "tinyworld", *until, "--output_dir", name, "--data.videos", "one/world/videos/train_*.mp4"]


def test_an_array_of_tasks_that_never_meet(whole):
    """One task after the other, as a full cluster starts them; what comes last puts everything together."""
    said = []
    for task in (2, 1, 2):
        env = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1"}
        said.append(done(start(whole, *words("array"), **env)))
    assert "curate: part 1 of 2 is done" in said[0] and "pairs: part 0 of 2 is done" in said[1]
    assert result(whole / "array") == result(whole / "one")
    assert "runs in one job" in done(start(whole, *words("array", "reference"), **env))


def test_ranks_of_torchrun(whole):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tempo_fast"]
    done(start(whole, *words("ranks"), launcher=launcher))
    assert result(whole / "ranks") == result(whole / "one")
