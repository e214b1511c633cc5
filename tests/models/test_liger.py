"""Liger's kernels: which of its functions are asked, with what, and when none is. A stand-in is asked, with the
signatures of liger-kernel 0.8.5: its kernels need CUDA."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from tempo_fast.config import RunConfig
from tempo_fast.errors import InputError
from tempo_fast.models.liger import apply_liger

CUDA = torch.device("cuda")


class LigerRMSNorm(nn.Module):
    pass


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls of the stand-in's functions, which replace a class of the modelling file as Liger's do."""
    calls: list[tuple[str, dict[str, Any]]] = []
    package, inner = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    package.__spec__ = ModuleSpec("liger_kernel", None)

    def function(name: str) -> Any:
        def apply(
            rope: bool = True,
            cross_entropy: bool = False,
            fused_linear_cross_entropy: bool = True,
            rms_norm: bool = True,
            swiglu: bool = True,
            model: Any = None,
        ) -> None:
            calls.append((name, {**locals()}))
            home = import_module(f"transformers.models.{name}.modeling_{name}")
            for norm in [n for n in vars(home) if n.endswith("RMSNorm")]:
                setattr(home, norm, LigerRMSNorm)

        return apply

    for name in ("qwen2", "qwen3", "llama", "mistral"):
        setattr(inner, f"apply_liger_kernel_to_{name}", function(name))
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    return calls


def check(bundle: Any, calls: list[tuple[str, dict[str, Any]]], name: str, rope: bool) -> None:
    model = copy.deepcopy(bundle.model)
    text = model.model.language_model
    home = import_module(f"transformers.models.{name}.modeling_{name}")
    classes = {n: v for n, v in vars(home).items() if isinstance(v, type)}
    assert apply_liger(model, True, CUDA)
    [(which, flags)] = calls
    assert which == name and flags["model"] is text
    assert flags["rope"] == rope and flags["rms_norm"] and flags["swiglu"]
    assert not flags["cross_entropy"] and not flags["fused_linear_cross_entropy"]
    # models that are built later are transformers' own
    assert {n: v for n, v in vars(home).items() if isinstance(v, type)} == classes
    assert any(n.endswith("RMSNorm") for n in classes)


def test_qwen2_vl(tiny: Any, asked: Any) -> None:
    check(tiny, asked, "qwen2", rope=False)


def test_its_successors(successor: Any, asked: Any) -> None:
    check(successor, asked, "qwen3" if successor.family.name == "qwen3_vl" else "qwen2", rope=False)


def test_families_around_a_text_model(frames: Any, asked: Any) -> None:
    check(frames, asked, frames.config.get_text_config().model_type, rope=True)


def test_auto_takes_them_where_they_run(tiny: Any, asked: Any) -> None:
    assert not apply_liger(tiny.model, "auto", torch.device("cpu")) and not asked
    assert apply_liger(copy.deepcopy(tiny.model), "auto", CUDA) and len(asked) == 1


def test_off_leaves_the_model_alone(tiny: Any, asked: Any) -> None:
    assert not apply_liger(tiny.model, False, CUDA) and not asked


def test_refused_in_a_sentence(tiny: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^train\.liger_kernels: .* the device is cpu$"):
        apply_liger(tiny.model, True, torch.device("cpu"))
    other = copy.deepcopy(tiny.model)
    other.config.text_config.model_type = "mamba"
    with pytest.raises(InputError, match=r"^train\.liger_kernels: .* no kernels for the text model mamba$"):
        apply_liger(other, True, CUDA)
    assert not apply_liger(other, "auto", CUDA)
    monkeypatch.delitem(sys.modules, "liger_kernel")
    monkeypatch.setattr("tempo_fast.models.liger.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^train\.liger_kernels: .* liger-kernel is not installed$"):
        apply_liger(tiny.model, True, CUDA)
    assert not apply_liger(tiny.model, "auto", CUDA) and not asked


def test_the_default_is_off() -> None:
    assert RunConfig().train.liger_kernels is False
