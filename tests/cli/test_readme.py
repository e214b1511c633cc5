"""What the README shows works as shown."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tempo_fast.cli import main
from tempo_fast.configio import load_config
from tempo_fast.schema import PreferenceRecord, read_records

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_recipe_of_your_own_data(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(blocks("yaml")[0])
    config = load_config(str(path))
    assert (config.output_dir, config.data.videos) == ("runs/mine", "my_videos")
    assert [s.r for s in config.train.stages] == [16, 8, 4, 2]
    assert len([line for line in blocks("yaml")[0].splitlines() if not line.startswith("#")]) <= 10


def test_the_loss_head_alone():
    scope: dict = {}
    exec(compile(next(b for b in blocks("python") if "linear_logp" in b), "README", "exec"), scope)
    assert scope["loss"].item() == scope["loss"].item() and scope["hidden"].grad.abs().sum() > 0


def test_pairs_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = {
        "messages": [
            {"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "A, then B."}
        ],
        "rejected_response": "B, then A.",
        "videos": ["a.mp4"],
    }  # fmt: skip
    (tmp_path / "pairs.json").write_text(json.dumps([row, {**row, "rejected_response": 7}]))
    command = next(line for line in README.splitlines() if line.startswith("tempo-fast pairs convert"))
    assert main(shlex.split(command)[1:]) == 0
    [record] = read_records(tmp_path / "runs/mine/pairs/r4.jsonl", PreferenceRecord)
    assert (record.chosen, record.rejected[0].text, record.r) == ("A, then B.", "B, then A.", 4)
    [problem] = (json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines())
    assert problem["line"] == 2 and "rejected_response" in str(problem)


@pytest.mark.parametrize("path", re.findall(r"^((?:tempo_fast|kernels|bench|tests)/[\w./]*)", README, re.MULTILINE))
def test_every_room_of_the_tree_exists(path):
    assert (ROOT / path).exists()


def test_every_objective_of_the_list_exists():
    from tempo_kernels.objectives import make_objective

    listed = re.search(r"Objectives: (.*?)\. Each", README, re.DOTALL)
    assert listed is not None
    names = [n for n in re.findall(r"`(\w+)`", listed[1]) if n != "sft_weight"]
    assert len(names) == 16
    for name in names:
        make_objective(name)


def test_the_trl_trainer():
    pytest.importorskip("trl")
    scope: dict = {}
    exec(compile(next(b for b in blocks("python") if "integrations.trl" in b), "README", "exec"), scope)
    assert scope["Trainer"].objective.name == "tdpo2"
