"""Adapters come and go without a trace."""

from pathlib import Path

import pytest
import torch

from tempo_fast.config import LoraConfig
from tempo_fast.errors import InputError
from tempo_fast.models.load import Bundle, load_bundle
from tempo_fast.training.adapters import adapter_on, attach_lora, load_lora, save_lora, trainable_parameters


def hidden(bundle: Bundle) -> torch.Tensor:
    ids = torch.arange(12)[None]
    positions = torch.arange(12).expand(3, 1, -1)
    visual = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        return bundle.family.hidden_states(bundle.model.eval(), ids, positions, None, visual, None)


def saved(path: str, folder: Path, *, vision: bool = False) -> torch.Tensor:
    bundle = load_bundle(path, "float32", "cpu")
    attach_lora(bundle, LoraConfig(r=2, alpha=4, dropout=0.5), seed=3, vision=vision)
    with torch.no_grad():
        for name, p in bundle.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    save_lora(bundle.model, folder, path)
    return hidden(bundle)


@pytest.mark.parametrize("vision", [False, True])
def test_save_load_and_leave(tmp_path: Path, tiny_path: str, vision: bool) -> None:
    trained = saved(tiny_path, tmp_path / "adapter", vision=vision)
    bundle = load_bundle(tiny_path, "float32", "cpu")
    plain = hidden(bundle)
    names = [n for n, _ in bundle.model.named_parameters()]
    with adapter_on(bundle, str(tmp_path / "adapter")):
        assert torch.equal(hidden(bundle), trained)
        assert not torch.equal(trained, plain)
    assert torch.equal(hidden(bundle), plain)
    assert [n for n, _ in bundle.model.named_parameters()] == names
    with adapter_on(bundle, ""):
        assert torch.equal(hidden(bundle), plain)


def test_seed_decides_the_start_and_nothing_else_moves(tiny_path: str) -> None:
    weights = []
    for seed in (1, 1, 2):
        bundle = load_bundle(tiny_path, "float32", "cpu")
        torch.manual_seed(seed * 100)
        before = torch.get_rng_state()
        attach_lora(bundle, LoraConfig(r=2), seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        weights.append({n: p.detach().clone() for n, p in trainable_parameters(bundle.model).items()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    assert any(not torch.equal(weights[0][n], weights[2][n]) for n in weights[0])
    assert all(p.dtype == torch.float32 for p in weights[0].values())


def test_no_adapter_there(tmp_path: Path, tiny_path: str) -> None:
    with pytest.raises(InputError, match="no adapter_config.json"):
        load_lora(load_bundle(tiny_path, "float32", "cpu"), tmp_path, trainable=False)
