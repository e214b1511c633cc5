"""DeepSpeed's configuration: every value is written out, a file decides what it may and is told what it may not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.runtime.zero_config import SHIPPED, find_file, zero_config

BASE = dataclasses.replace(TrainConfig(), engine="deepspeed", zero_stage=3, max_grad_norm=0.3)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in leaves(v)]
    return [value]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_value_is_left_to_deepspeed(stage: int) -> None:
    config = dataclasses.replace(BASE, zero_stage=stage)
    made = zero_config(config, 12_345)
    assert "auto" not in leaves(made) and None not in leaves(made)
    assert made["zero_optimization"]["stage"] == stage
    # stage 0 is clipped by the engine's own hook, once
    assert made["gradient_clipping"] == (0.3 if stage else 0.0)


def test_buckets_are_no_larger_than_what_trains() -> None:
    config = dataclasses.replace(BASE, zero_stage=2)
    zero = zero_config(config, 12_345)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 12_345 and zero["allgather_bucket_size"] == 12_346  # DeepSpeed wants it even
    assert zero_config(config, 10**10)["zero_optimization"]["reduce_bucket_size"] == 50_000_000


def test_offloading_by_keys() -> None:
    config = dataclasses.replace(BASE, offload_optimizer=True, offload_parameters=True)
    made = zero_config(config, 100)
    zero = made["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
    assert made["zero_force_ds_cpu_optimizer"] is False
    assert "offload_param" not in zero_config(BASE, 100)["zero_optimization"]


def test_selective_recomputing_takes_the_plain_linear_layer() -> None:
    selective = dataclasses.replace(BASE, gradient_checkpointing="selective")
    assert zero_config(selective, 100)["zero_optimization"]["memory_efficient_linear"] is False
    assert "memory_efficient_linear" not in zero_config(BASE, 100)["zero_optimization"]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda p: p.stem)
def test_shipped_files_are_whole_and_fit(path: Path) -> None:
    theirs = json.loads(path.read_text())
    assert "auto" not in leaves(theirs)
    stage = theirs["zero_optimization"]["stage"]
    config = dataclasses.replace(BASE, zero_stage=stage, deepspeed=path.stem, offload_optimizer=False)
    made = zero_config(config, 100)
    for key, value in theirs["zero_optimization"].items():
        assert made["zero_optimization"][key] == value, key
    assert made["train_micro_batch_size_per_gpu"] == 1 and made["gradient_clipping"] == 0.3
    # DeepSpeed itself takes it
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(**made["zero_optimization"]).stage == stage


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but train.zero_stage makes it 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but train.max_grad_norm makes it 0.3"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but training, which keeps float32 masters itself"),
        ({"gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps is 'auto', which means nothing here"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size is 'auto'"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.type is not for this file"),
        ({"train_batch_size": 32}, "train_batch_size is not for this file"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device is nvme; only cpu"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is not for this file"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_decide_is_named(tmp_path: Path, theirs: dict[str, Any], message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(theirs))
    with pytest.raises(InputError, match=message) as caught:
        zero_config(dataclasses.replace(BASE, deepspeed=str(path)), 100)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_decides_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    theirs = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 0.3, "wall_clock_breakdown": True, "comms_logger": {"enabled": False},
    }  # fmt: skip
    path.write_text(json.dumps(theirs))
    made = zero_config(dataclasses.replace(BASE, deepspeed=str(path)), 100)
    zero = made["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["offload_optimizer"], zero["sub_group_size"]) == (
        7, {"device": "cpu"}, 1_000_000_000,
    )  # fmt: skip
    assert made["wall_clock_breakdown"] is True and made["comms_logger"] == {"enabled": False}
    with pytest.raises(
        InputError, match="offload_optimizer.device is 'none', but train.offload_optimizer makes it 'cpu'"
    ):
        path.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "none"}}}))
        zero_config(dataclasses.replace(BASE, deepspeed=str(path), offload_optimizer=True), 100)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="train.deepspeed: zero9 is no file; shipped ones are zero2, zero3, zero3_offload"
    ):
        find_file("zero9")
    for text, message in (("{", "not valid JSON"), ("[1]", "expected an object")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(InputError, match=message):
            zero_config(dataclasses.replace(BASE, deepspeed=str(tmp_path / "x.json")), 1)
