"""Tiny models shared by all tests, and videos that need no file."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from tiny_qwen import FakePlan, FakeReader, add_lora, make_bundle, make_tokenizer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def ordinary_priority():
    """SVT-AV1, where root encodes with it, leaves the calling thread in the first real-time class: from then on nothing
    else runs beside that process, nor beside what it forks."""
    _leave_real_time()
    yield
    _leave_real_time()


def _leave_real_time() -> None:
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of the tiny checkpoint; load it anew where a test changes the model."""
    path = tmp_path_factory.mktemp("tiny")
    make_bundle(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tiny_path: str) -> Any:
    """Bundle of the tiny model, frozen and in eval mode; shared by all tests, so leave it as it is."""
    from tempo_fast.models.load import load_bundle

    return load_bundle(tiny_path, "float32", "cpu")


@pytest.fixture
def tiny_lora(tiny: Any) -> Any:
    """Bundle of the tiny model with a random LoRA on the language model; a fresh one for each test."""
    return add_lora(tiny)


@pytest.fixture
def reader() -> FakeReader:
    return FakeReader()


@pytest.fixture
def make_plan() -> type[FakePlan]:
    return FakePlan


@pytest.fixture(scope="session")
def plan_type() -> type[FakePlan]:
    """``make_plan`` for fixtures of a wider scope."""
    return FakePlan


@pytest.fixture(scope="session")
def lora() -> Any:
    """The function ``add_lora``."""
    return add_lora


@pytest.fixture(scope="session", params=["internvl", "llava_onevision", "llava_next_video"])
def frames(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bundle of a tiny model of each family that sees whole frames; shared by all tests, so leave it as it is."""
    from frame_models import write_checkpoint

    from tempo_fast.models.load import load_bundle

    path = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, path)
    return load_bundle(str(path), "float32", "cpu")


@pytest.fixture(scope="session", params=["qwen2_5_vl", "qwen3_vl"])
def successor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bundle of a tiny model of each of Qwen2-VL's successors; shared by all tests, so leave it as it is."""
    from qwen_models import write_checkpoint

    from tempo_fast.models.load import load_bundle

    path = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, make_tokenizer(), path)
    return load_bundle(str(path), "float32", "cpu")
