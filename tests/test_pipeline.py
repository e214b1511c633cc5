"""The whole method on real files with the shipped model, small: what a run leaves, what it skips and what it reuses."""

import json
from pathlib import Path

import pytest

from tempo_fast.cli import main
from tempo_fast.files import read_json, read_jsonl
from tempo_fast.models.load import load_bundle

SMALL = [
    "--data.tinyworld.train", "5", "--data.tinyworld.heldout", "3", "--data.tinyworld.seed", "11",
    "--train.stages", "[{r: 16}, {r: 8}, {r: 4}, {r: 2}]", "--train.sft.max_steps", "2", "--train.sft.batch_size", "4",
    "--train.batch_size", "6", "--eval.stages", "ends", "--eval.bootstrap", "50", "--report.pairs", "1",
    "--model.threads", "1", "--generation.max_new_tokens", "40",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "demo"
    assert main(["run", "tinyworld", "--output_dir", str(out), *SMALL]) == 0
    return out


def test_summary(run: Path) -> None:
    summary = read_json(run / "summary.json")
    stages = summary["stages"]
    assert [s["r"] for s in stages] == [16, 8, 4, 2]
    for stage in stages:
        assert stage["steps"] >= 1 and stage["loss_first"] > 0 and stage["loss_last"] > 0
        assert 0 <= stage["accuracy"] <= 1 and stage["margin"] is not None
        assert stage["reference"]["read_misses"] == 0
    # every chosen answer is computed once in the whole run
    assert stages[0]["reference"]["chosen_misses"] == stages[0]["records"]
    assert all(s["reference"]["chosen_misses"] == 0 for s in stages[1:])
    assert [row["name"] for row in summary["eval"]] == ["base", "stage4_r2", "sft", "control"]
    for row in summary["eval"]:
        for kind in ("drop", "shuffle", "reverse"):
            for r in ("16", "8", "4", "2"):
                stat = row["pairwise"][kind][r]
                assert stat["n"] == 0 or 0 <= stat["lo"] <= stat["value"] <= stat["hi"] <= 1
        assert {"all", "before", "last"} <= set(row["questions"])
        assert {"objects", "order_tau", "events"} <= set(row["captions"])
    assert set(summary["timings_s"]) >= {"world", "curate", "pairs", "reference", "train", "eval", "total"}
    assert f"pretrained={run / 'train' / 'merged'}" in summary["lmms_eval"]
    assert summary["counts"]["usable"] == 5 and summary["quarantined"] == []
    assert summary["sft"]["steps"] == summary["control"]["steps"] == 2


def test_captions_are_what_happens(run: Path) -> None:
    truth = {Path(row["video"]).name: row["description"] for _, row in read_jsonl(run / "world" / "truth.jsonl")}
    told = total = 0
    for _, row in read_jsonl(run / "pairs" / "r16.jsonl"):
        true = [s for s in truth[Path(row["video"]).name].split(". ")]
        ours = row["chosen"].split(". ")
        assert len(ours) == len(true)
        told += sum(a.strip(".") == b.strip(".") for a, b in zip(ours, true, strict=True))
        total += len(true)
    assert told / total > 0.8


def test_second_epoch_and_second_run_compute_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = sorted((run / "reference").rglob("*.safetensors"))
    stamps = {p: p.stat().st_mtime_ns for p in [*shards, *run.rglob("adapter_model.safetensors")]}
    with caplog.at_level("INFO", logger="tempo_fast"):
        assert main(["run", str(run)]) == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    for step in ("curate", "pairs", "reference", "train", "eval", "report"):
        assert f"{step}: inputs unchanged, skipped" in caplog.text
    words = ["--reference.store", str(run / "reference"), "--train.stages", "[{r: 16, epochs: 2}]"]
    words += ["--train.sft.epochs", "0"]
    again = run.parent / "again"
    (again / "pairs").mkdir(parents=True)
    (again / "pairs" / "r16.jsonl").write_text((run / "pairs" / "r16.jsonl").read_text())
    assert main(["train", str(run / "config.yaml"), "--output_dir", str(again), *words]) == 0
    assert sorted((run / "reference").rglob("*.safetensors")) == shards
    (stage,) = read_json(again / "summary.json")["stages"]
    assert stage["reference"]["misses"] == 0 and stage["reference"]["read_hits"] > 0


def test_results_load(run: Path) -> None:
    merged = load_bundle(str(run / "train" / "merged"))
    assert merged.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    adapter = json.loads((run / "train/stage4_r2/adapter/adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA" and adapter["r"] == 32
    assert list((run / "tensorboard").rglob("events.*"))
    page = (run / "report.html").read_text()
    assert "<svg" in page and "data:image/jpeg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_audit(run: Path) -> None:
    audit = read_json(run / "pairs" / "audit.json")
    for r in ("16", "8", "4", "2"):
        for kind in ("drop", "shuffle", "reverse"):
            tally = audit["stats"][r][kind]
            assert tally["made"] + sum(tally["filtered"].values()) == audit["videos"]
    # short films make r = 16 and r = 8 the same perturbation, and the audit says so
    assert audit["coincide"]
