"""``python -m bench generate`` on a very small model: every side answers the same requests with the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import generate


def test_sides_give_the_same_tokens(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    arguments = ["--shape", "micro", "--requests", "9", "--batch_size", "3", "--repetitions", "1", "--answer", "6"]
    assert generate.main([*arguments, "--cases", "window", "video", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    rows = {(row["case"], row["impl"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 * len(generate.IMPLS)
    for case, videos in (("window", 18), ("video", 9)):
        for impl in ("continuous", "static", "generate"):
            row = rows[case, impl]
            assert row["different"] == 0 and row["videos"] == videos and row["tokens"] > 9
            assert row["tokens_per_s"] == pytest.approx(1e3 * row["tokens"] / row["ms"])
            assert row["over"]["generate"] == pytest.approx(rows[case, "generate"]["ms"] / row["ms"])
        assert rows[case, "continuous"]["steps"] < rows[case, "static"]["steps"]
        vllm = rows[case, "vllm"]
        assert "ms" in vllm or vllm["skipped"] == "vllm is not installed"
    assert rows["video", "static"]["prompt"] == 48
    assert "tokens_per_s" in capsys.readouterr().out


def test_lengths() -> None:
    assert generate.lengths_of("equal", 40, 5) == [40] * 5
    drawn = generate.lengths_of("unequal", 40, 500)
    assert drawn == generate.lengths_of("unequal", 40, 500) and len(set(drawn)) > 50
    assert min(drawn) == 10 and max(drawn) == 240 and 25 < sum(drawn) / 500 < 55


def test_what_cannot_run_is_said(capsys: Any) -> None:
    for arguments, words in (
        (["--requests", "0"], "must be at least 1"),
        (["--shape", "7b"], "needs --device cuda"),
    ):
        with pytest.raises(SystemExit):
            generate.main(arguments)
        assert words in capsys.readouterr().err
