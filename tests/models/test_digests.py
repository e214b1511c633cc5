"""What a checkpoint's digests see: all that decides answers, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tempo_fast.models.load import checkpoint_digest, config_digest, load_bundle, weights_digest


@pytest.fixture
def copy(tiny_path: str, tmp_path: Path) -> Path:
    shutil.copytree(tiny_path, tmp_path / "copy")
    return tmp_path / "copy"


def digests(path: Path | str) -> tuple[str, str, str]:
    return weights_digest(str(path)), config_digest(str(path)), checkpoint_digest(str(path))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_copy_is_the_same(copy: Path, tiny_path: str) -> None:
    assert digests(copy) == digests(tiny_path)
    bundle = load_bundle(tiny_path, "float32", "cpu")
    assert (bundle.weights_digest, bundle.config_digest, bundle.digest) == digests(copy)


def test_architecture_changes_config_and_checkpoint(copy: Path) -> None:
    before = digests(copy)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    after = digests(copy)
    assert after[0] == before[0] and after[1] != before[1] and after[2] != before[2]


def test_who_wrote_the_config_is_no_architecture(copy: Path) -> None:
    before = config_digest(str(copy))
    change(copy / "config.json", transformers_version="0.1", dtype="bfloat16")
    assert config_digest(str(copy)) == before


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
     "preprocessor_config.json", "vocab.txt", "tokenizer.model", "additional_chat_templates/other.jinja"],
)  # fmt: skip
def test_what_is_read_beside_the_weights_changes_the_checkpoint(copy: Path, name: str) -> None:
    before = digests(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("something else")
    after = digests(copy)
    assert after[:2] == before[:2] and after[2] != before[2]


@pytest.mark.parametrize("name", ["card.json", "merge.json", "README.md", "README.txt", "notes.html"])
def test_notes_change_nothing(copy: Path, name: str) -> None:
    before = digests(copy)
    (copy / name).write_text("{}")
    assert digests(copy) == before


def test_weights_change_weights_and_checkpoint(copy: Path) -> None:
    before = digests(copy)
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    after = digests(copy)
    assert after[0] != before[0] and after[1] == before[1] and after[2] != before[2]
