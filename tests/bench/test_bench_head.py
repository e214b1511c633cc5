"""The benchmark's command line: its exit codes and the file a script reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_head_writes_a_row_per_case_and_impl(tmp_path: Path) -> None:
    path = tmp_path / "new" / "head.json"
    shape = ("--n", "24", "--v", "3001", "--d", "32", "--repetitions", "2", "--threads", "1")
    done = bench("head", "--device", "cpu", "--json", str(path), *shape)
    assert done.returncode == 0, done.stderr
    data = json.loads(path.read_text())
    assert set(data) == {"env", "rows"} and data["env"]["torch"]
    rows = {(row["case"], row["impl"]): row for row in data["rows"]}
    cases = ("dpo_live", "dpo_cached", "rrpo_live", "rrpo_cached")
    assert set(rows) == {(case, impl) for case in cases for impl in ("eager", "one_pass")}
    for (case, _), row in rows.items():
        assert row["shape"] == [24, 3001, 32] and row["dtype"] == "float32" and row["repetitions"] == 2
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["tflops"] > 0
        assert row["error"]["logp"] < 1e-4 and row["error"]["d_logp"] < 1e-4
        assert ("d_kl" in row["error"]) == case.startswith("rrpo")
        assert row["error"].get("d_kl", 0) < 1e-2
    for case in cases:  # eager holds 24 x 3001 logits several times over, one_pass a slice of 2048 columns once
        assert rows[case, "one_pass"]["peak_mib"] < 0.7 * rows[case, "eager"]["peak_mib"]
        assert rows[case, "eager"]["peak_mib"] > 24 * 3001 * 4 / 2**20
        assert case in done.stdout


def test_unknown_name_lists_what_there_is() -> None:
    done = bench("haed")
    assert done.returncode == 2 and "'haed'" in done.stderr and "head" in done.stderr
    assert bench().returncode == 2
    assert bench("--help").returncode == 0


def test_impossible_options_are_refused() -> None:
    done = bench("head", "--n", "3")
    assert done.returncode == 2 and "--n must be at least 8" in done.stderr
