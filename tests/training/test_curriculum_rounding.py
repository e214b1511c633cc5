"""What rounding does to a merged model, against the files before and after."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen import add_lora, make_bundle

from tempo_fast.models.load import load_bundle
from tempo_fast.training.adapters import merge_lora, save_lora


@pytest.mark.parametrize("size", [1e-4, 1e-1])
def test_errors_are_those_of_the_files(tmp_path: Path, size: float) -> None:
    bundle = make_bundle(tmp_path / "float32", tie=False)
    bundle.model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    bundle.tokenizer.save_pretrained(tmp_path / "base")
    tuned = add_lora(load_bundle(str(tmp_path / "base"), "float32", "cpu"))
    with torch.no_grad():
        for name, p in tuned.model.named_parameters():
            if "lora_B" in name:
                p.mul_(size)
    save_lora(tuned.model, tmp_path / "adapter", str(tmp_path / "base"))
    errors = merge_lora(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged", device="cpu")

    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    absolute = relative = lost = update = 0.0
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype == torch.bfloat16
        # files may leave out wrappers in front of the layers' names
        parts = [k for k in adapter if name.removesuffix(".weight").removeprefix("model.") + ".lora" in k]
        if not parts:
            assert torch.equal(after[name], weight)
            continue
        a, b = (adapter[next(k for k in parts if part in k)] for part in ("lora_A", "lora_B"))
        exact = weight.float() + 2 * (b @ a)  # alpha / r of add_lora
        error = (after[name].float() - exact).abs()
        absolute, relative = max(absolute, error.max().item()), max(relative, (error / exact.abs()).max().item())
        lost += error.double().square().sum().item()
        update += (2 * (b @ a)).double().square().sum().item()
    assert errors == {
        "max_rounding_error": pytest.approx(absolute, rel=1e-3),
        "max_relative_error": pytest.approx(relative, rel=1e-3),
        "update_error": pytest.approx((lost / update) ** 0.5, rel=1e-3),
    }
    assert 2**-10 < errors["max_relative_error"] <= 2**-8  # bfloat16 keeps eight bits
    assert (errors["update_error"] > 0.5) == (size < 1e-3)  # a small update drowns
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == errors
