"""DeepSpeed's configuration: every value is written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tempo_fast.config import TrainConfig
from tempo_fast.runtime.zero_config import zero_config


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in leaves(v)]
    return [value]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_value_is_left_to_deepspeed(stage: int) -> None:
    config = dataclasses.replace(TrainConfig(), engine="deepspeed", zero_stage=stage, max_grad_norm=0.3)
    made = zero_config(config, 12_345)
    assert "auto" not in leaves(made) and None not in leaves(made)
    assert made["zero_optimization"]["stage"] == stage
    # stage 0 is clipped by the engine's own hook, once
    assert made["gradient_clipping"] == (0.3 if stage else 0.0)


def test_buckets_are_no_larger_than_what_trains() -> None:
    config = dataclasses.replace(TrainConfig(), engine="deepspeed", zero_stage=2)
    assert zero_config(config, 12_345)["zero_optimization"]["reduce_bucket_size"] == 12_345
    assert zero_config(config, 10**10)["zero_optimization"]["reduce_bucket_size"] == 50_000_000
