"""Parameter counts from numbers alone: against published checkpoints, and against real modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tempo_fast.config import LoraConfig
from tempo_fast.errors import InputError
from tempo_fast.models.load import TINYWORLD_BASE, load_bundle
from tempo_fast.plan.shapes import BUILT_IN, built_in, load_shape, shape_of

# elements, from metadata.total_size of model.safetensors.index.json (two bytes each) of Qwen/<name>-Instruct
PUBLISHED = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2-vl-72b": 73_405_560_320,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-32b": 33_452_718_336,
    "qwen2.5-vl-72b": 73_410_777_344,
}


def test_every_built_in_shape_is_published() -> None:
    assert PUBLISHED.keys() == BUILT_IN.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_checkpoints(name: str) -> None:
    shape = shape_of(name, *built_in(name))
    assert shape.total == PUBLISHED[name]
    assert shape.text.weights == sum(x.inputs * x.outputs for x in shape.text.linears) * shape.text.depth
    assert 0 < shape.language - shape.text.weights < 0.001 * shape.language  # norms and biases


def test_a_vision_tower_as_others_count_it() -> None:
    # printed by a training script of Qwen2.5-VL-7B that freezes it
    assert shape_of("x", *built_in("qwen2.5-vl-7b")).vision == 676_550_144


@pytest.mark.parametrize("vision", [False, True])
def test_counts_of_a_real_model_with_its_adapters(vision: bool) -> None:
    from tempo_fast.training.adapters import attach_lora, trainable_parameters

    bundle = load_bundle("tinyworld", "float32", "cpu")
    whole = sum(p.numel() for p in bundle.model.parameters())
    tower = sum(p.numel() for p in bundle.family.vision_tower(bundle.model).parameters())
    shape = load_shape("tinyworld")
    assert (shape.total, shape.vision, shape.head) == (whole, tower, bundle.family.head(bundle.model).weight.numel())
    model = attach_lora(bundle, LoraConfig(r=5, alpha=10), seed=0, vision=vision)
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    assert trained == shape.text.lora(5) + (shape.tower.lora(5) if vision else 0)


FRAMES = ("internvl", "llava_onevision", "llava_next_video")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", *FRAMES])
def test_every_family_counts_as_a_real_model(name: str) -> None:
    import frame_models
    import qwen_models
    import tiny_qwen
    import transformers

    from tempo_fast.models import get_family

    tokenizer = frame_models.make_tokenizer(name) if name in FRAMES else tiny_qwen.make_tokenizer()
    where: Any = tiny_qwen if name == "qwen2_vl" else frame_models if name in FRAMES else qwen_models
    config = where.make_config(tokenizer) if name == "qwen2_vl" else where.make_config(name, tokenizer)
    family = get_family(config.model_type)
    model = getattr(transformers, family.model_class)(config)  # type: ignore[attr-defined]
    shape = shape_of(name, family, config)
    assert shape.total == sum(p.numel() for p in model.parameters())
    assert shape.vision == sum(p.numel() for p in family.vision_tower(model).parameters())
    assert {x.name.rsplit(".", 1)[-1] for x in shape.text.linears if x.adapted} >= {"q_proj", "o_proj", "down_proj"}
    assert any(x.adapted for x in shape.tower.linears)
    assert shape.tower.mlp in {x.outputs for x in shape.tower.linears}


def test_config_json_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((TINYWORLD_BASE / "config.json").read_text())
    assert load_shape(str(tmp_path)).total == load_shape("tinyworld").total


def test_names_of_directories_that_are_not_there() -> None:
    shape = load_shape("models/Qwen2-VL-2B-Instruct")
    assert shape.total == PUBLISHED["qwen2-vl-2b"]
    assert "qwen2-vl-2b" in shape.notes[0]
    assert load_shape("qwen2-vl-2b").notes == []


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model.path: nowhere .*qwen2-vl-7b"):
        load_shape("nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InputError, match="llama"):
        load_shape(str(tmp_path))
