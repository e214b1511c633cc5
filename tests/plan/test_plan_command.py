"""``tempo-fast plan`` as it is typed: what it prints and writes, from which files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempo_fast.cli import main
from tempo_fast.models.load import TINYWORLD_BASE
from tempo_fast.pairs.formats import write_pairs
from tempo_fast.plan.text import PARTS
from tempo_fast.schema import PreferenceRecord, Rejected


def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str, recipe: str = "tempo_fast") -> tuple:
    out = tmp_path / "plan.json"
    assert main(["plan", recipe, "--json", str(out), *words]) == 0
    return capsys.readouterr().out, json.loads(out.read_text())


def test_a_shipped_recipe_on_eight_gpus(capsys, tmp_path: Path) -> None:
    text, data = plan(capsys, tmp_path, "--gpus", "8", "--records", "1000", "--sft", "500", "--price", "2")
    assert data["model"]["total"] == 8_291_375_616
    assert [m["name"] for m in data["memory"]] == ["ZeRO-0", "ZeRO-2", "ZeRO-2 offload", "ZeRO-3", "ZeRO-3 offload"]
    assert [m["name"] for m in data["memory"] if m["asked"]] == ["ZeRO-2"]  # as the recipe says
    for row in data["memory"]:
        assert row["bytes"] == pytest.approx(sum(row["parts"].values()))
        assert set(row["parts"]) <= set(PARTS)
        assert row["bytes"] == pytest.approx(max(row["phases"].values()))
    names = [s["name"] for s in data["stages"]]
    assert names[:2] == ["stage1_r16 fill", "stage1_r16"]
    assert names[-2:] == ["sft", "control"]
    assert data["hours"] == pytest.approx(sum(s["hours"] for s in data["stages"]) + data["pair_hours"])
    assert data["cost"] == pytest.approx(16 * data["hours"])
    for said in (
        "* ZeRO-2",
        "assumptions",
        "not measured",
        "40%",
        "built-in shape qwen2-vl-7b",
        "stage4_r2",
        "together",
    ):
        assert said in text
    assert max(map(len, text.splitlines()[:4])) < 200


def test_settings_change_the_plan(capsys, tmp_path: Path) -> None:
    def asked(*words: str) -> dict:
        data = plan(capsys, tmp_path, "--gpus", "8", "--records", "1000", *words)[1]
        return next(m for m in data["memory"] if m["asked"]) | {
            "hours": data["hours"],
            "tokens": data["record"]["tokens"],
        }

    base = asked()
    assert asked("--train.gradient_checkpointing", "none")["parts"]["activations"] > base["parts"]["activations"]
    assert asked("--train.gradient_checkpointing", "none")["hours"] < base["hours"]
    assert asked("--video.total_pixels", "3000000")["tokens"] < base["tokens"]
    assert asked("--model.path", "qwen2.5-vl-32b")["bytes"] > 3 * base["bytes"]
    assert asked("--mfu", "0.2")["hours"] > 1.5 * base["hours"]
    assert asked("--gpu", "h200")["longest_frames"] > base["longest_frames"]
    assert asked("--train.zero_stage", "3")["name"] == "ZeRO-3"
    assert asked("--seconds", "20")["tokens"] < base["tokens"]


def test_what_does_not_fit_is_said(capsys, tmp_path: Path) -> None:
    text, data = plan(capsys, tmp_path, "--gpu", "rtx4090", "--gpus", "8", "--model.path", "qwen2.5-vl-72b")
    assert not any(m["fits"] for m in data["memory"])
    assert {m["longest_frames"] for m in data["memory"]} == {0}
    assert "none does" in text
    assert "no time or cost without data" in text


def test_a_record_over_the_budget_is_said(capsys, tmp_path: Path) -> None:
    text, _ = plan(capsys, tmp_path, "--train.max_tokens", "4000")
    assert "longer than train.max_tokens" in text


def test_config_json_alone(capsys, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((TINYWORLD_BASE / "config.json").read_text())
    words = ("--model.path", str(folder), "--gpu", "cpu", "--video.total_pixels", "200000", "--records", "10")
    text, data = plan(capsys, tmp_path, *words)
    assert data["model"]["total"] < 4e6
    assert "plan of model on 1 x cpu" in text
    assert "overhead" not in data["memory"][0]["parts"]
    assert [m["name"] for m in data["memory"]][0] == "torch"


def test_lengths_from_a_file_of_pairs(capsys, tmp_path: Path) -> None:
    """Videos are probed, answers counted with the model's tokenizer, records per r from their files."""
    from fractions import Fraction

    import av
    import numpy as np

    video = tmp_path / "v.mp4"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(80):
            frame = av.VideoFrame.from_ndarray(np.full((96, 160, 3), 3 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    rejected = [Rejected("A blue square grows.", kind, 4) for kind in ("drop", "shuffle")]
    records = [
        PreferenceRecord(str(i), str(video), "What happens?", "A red circle moves left and grows.", rejected, 4)
        for i in range(5)
    ]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "r4.jsonl", records)
    write_pairs(pairs / "r2.jsonl", records[:3])
    stages = ("--train.stages", "[{r: 4}, {r: 2}]", "--model.path", "tinyworld", "--gpu", "cpu")
    text, data = plan(capsys, tmp_path, "--pairs", str(pairs), *stages)
    record = data["record"]
    assert record["frames"] == 8  # eight seconds at 1 fps
    assert record["answers"] == 3
    assert 4 <= record["answer"] <= 12
    sizes = {s["name"]: s["records"] for s in data["stages"]}
    assert sizes == {"stage1_r4 fill": 5, "stage1_r4": 5, "stage2_r2 fill": 3, "stage2_r2": 3}
    assert "making pairs" not in text  # they are there
    alone = plan(capsys, tmp_path, "--pairs", str(pairs / "r4.jsonl"), *stages)[1]
    assert {s["records"] for s in alone["stages"]} == {5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0"], "--gpus must be 1 or more"),
        (["--mfu", "1.5"], r"--mfu must be in (0, 1]"),
        (["--size", "big"], "--size is written as 1280x720"),
        (["--gpu", "v100"], "--gpu: v100 is none of h100"),
        (["--model.path", "nowhere"], "model.path: nowhere"),
        (["--pairs", "nothing.jsonl"], "nothing.jsonl"),
        (["--train.colour", "red"], "train.colour"),
        (["--size", "10000x20"], "aspect ratio"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words: list[str], said: str) -> None:
    assert main(["plan", "tempo_fast", *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert said in told[-1]


@pytest.mark.parametrize("recipe", ["temple", "tempo_fast", "rrpo", "leanpo", "mdpo", "tinyworld"])
def test_every_shipped_recipe_has_a_plan(capsys, tmp_path: Path, recipe: str) -> None:
    _, data = plan(capsys, tmp_path, "--records", "100", "--gpus", "2", recipe=recipe)
    assert data["hours"] > 0
    assert all(m["bytes"] > 0 for m in data["memory"])
