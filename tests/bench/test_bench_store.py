"""``python -m bench store``: every part runs, and says what a script reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import store


def run(tmp_path: Path, *arguments: str) -> list[dict]:
    out = tmp_path / "rows.json"
    assert store.main(["--json", str(out), "--folder", str(tmp_path), "--repetitions", "2", *arguments]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]  # the stores are gone
    return json.loads(out.read_text())["rows"]


def test_reading_and_opening(tmp_path: Path) -> None:
    small = ("--tokens", "600", "--hidden", "24", "--shards", "30", "--step-ms", "1")
    rows = run(tmp_path, "--parts", "read", "cold", "open", *small)
    assert [(r["case"], r["impl"]) for r in rows] == [
        ("read", "clone"), ("read", "get"), ("read", "copy_"), ("read", "read_into"),
        ("cold", "when_asked"), ("cold", "ahead"),
        ("open", "small_shards"), ("verify", "small_shards"), ("open", "after_gc"), ("verify", "after_gc"),
    ]  # fmt: skip
    assert all(r["gb_s"] > 0 and r["shape"][1:] == [600, 24] for r in rows[:4])
    assert rows[6]["shape"] == [600, 30] and rows[8]["shape"] == [600, 1]


def test_steps(tmp_path: Path) -> None:
    rows = run(tmp_path, "--parts", "step", "--shape", "micro")
    assert [r["impl"] for r in rows] == ["mean_embedding", "hidden"]
    assert all(0 <= r["wait_share"] < 1 and 0 < r["cpu_share"] < 1 for r in rows)


def test_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of their errors, on a small head."""
    monkeypatch.setattr(store, "FORMS_SHAPE", (12, 1024, 64))
    rows = {(r["case"], r["impl"], r["dtype"]): r["error"] for r in run(tmp_path, "--parts", "forms")}
    for dtype in ("float32", "bfloat16"):
        exact, short = (rows["kl_0.001", impl, dtype] for impl in ("mean_embedding", "mean_bfloat16"))
        assert exact["d_kl"] < 0.01 < short["d_kl"] and exact["kl"] < 0.05 < short["kl"]
        assert rows["kl_0.001", "hidden", dtype]["d_kl"] < 0.01
