"""``python -m bench gpu``, on the CPU with a small plan: what it measures, writes, drops and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.cases import CASES

ROOT = Path(__file__).parents[2]
IMPLS = ("one_pass", "plain", "liger_flce")


def plan() -> gpu.Plan:
    shapes = ((16, 12), (9, 12), (9, 8))
    return gpu.Plan("cpu", 203, shapes, ("rrpo_cached", "dpo_live"), IMPLS, torch.float32, 2, 24, 64, 1)


def test_rows_come_with_their_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.kernels(plan(), tmp_path / "new", 120, with_tests=False) == 0
    data = json.loads((tmp_path / "new" / "kernels.json").read_text())
    assert set(data) == {"env", "ceilings", "tests", "rows"}
    assert all(value > 0 for value in data["ceilings"].values())
    done = [row for row in data["rows"] if "ms" in row]
    # plain has no KL from statistics; one_pass runs twice
    assert len(done) == 3 * (2 + 3) and len(data["rows"]) == 3 * 2 * 4
    for row in data["rows"]:
        n, v, d = row["shape"]
        assert row["tflop"] == pytest.approx(CASES[row["case"]].floor * 2 * n * v * d / 1e12)
        assert row["floor_ms"] > 0
    for row in done:
        assert row["over_floor"] == pytest.approx(row["ms"] / row["floor_ms"])
    assert {row["shape"][2] for row in done if "error" in row} == {12, 8}
    assert all("error" not in row for row in done if row["shape"][::2] == [9, 12])  # once per head
    out = capsys.readouterr().out
    assert "one_pass_again" in out and "skipped liger_flce: " in out and "dropped" not in out


def test_no_time_left_drops_rows_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.kernels(plan(), tmp_path, 0, with_tests=False) == 0
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert len(rows) == 3 * 2 * len(IMPLS) and {row["skipped"] for row in rows} == {"no time left"}
    out = capsys.readouterr().out
    assert f"{len(rows)} rows were dropped for time" in out and "rrpo_cached 9x203x8" in out


def test_the_floor_is_the_larger_of_work_and_traffic() -> None:
    many, one = (4096, 152064, 3584), (1, 152064, 3584)
    fast = {"matmul_tflops": 700.0, "copy_tb_s": 4.0}
    n, v, d = many
    assert gpu.floor(CASES["rrpo_cached"], many, 2, fast)["floor_ms"] == pytest.approx(2 * 2 * n * v * d / 700e9)
    found = gpu.floor(CASES["rrpo_cached"], one, 2, fast)
    assert found["floor_ms"] == pytest.approx(1e-9 * 2 * (v * d + 2 * d) / 4)
    assert gpu.floor(CASES["sft_trained"], one, 2, fast)["gb"] > 1.9 * found["gb"]


def test_tests_that_take_too_long_are_stopped(tmp_path: Path) -> None:
    found = gpu.run_tests(tmp_path, 0.05)
    assert not found["ok"] and "stopped" in found["last"] and (tmp_path / "tests.txt").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_no_tests_at_all_are_no_success(tmp_path: Path) -> None:
    found = gpu.run_tests(tmp_path, 120)
    assert not found["ok"] and "deselected" in found["last"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_without_cuda_it_is_one_sentence() -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--part", "kernels"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and "CUDA" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_part_or_implementation_is_refused() -> None:
    for option in (["--part", "kernel"], ["--impls", "nobody"]):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(option)
        assert stopped.value.code == 2
