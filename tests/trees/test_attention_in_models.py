"""Packed trees through transformers' attention interface: what the text model runs, and what stays as it was."""

from __future__ import annotations

import copy
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_checks import varlen_backward, varlen_forward
from torch import Tensor
from tree_checks import assert_equal, loss_and_gradients, make_trees

from tempo_fast.config import RunConfig
from tempo_fast.errors import InputError
from tempo_fast.trees import attention
from tempo_fast.trees.attention_flash import FlashKernel
from tempo_fast.trees.attention_masked import MaskedAttention
from tempo_fast.trees.attention_merged import MergedAttention
from tempo_fast.trees.batch import PackedBatch, collate, collate_rows
from tempo_fast.trees.forward import tree_hidden
from tempo_fast.trees.vision import FeatureCache
from tempo_kernels.objectives import make_objective

OTHER_WAYS = {
    "masked": lambda packed: MaskedAttention(packed.extents, torch.device("cpu")),
    "varlen": lambda packed: MergedAttention(packed.extents, FlashKernel(varlen_forward, varlen_backward)),
}


@pytest.fixture
def own(tiny: Any) -> Any:
    """Bundle of the tiny model, not yet used with trees."""
    out = copy.copy(tiny)
    out.model = copy.deepcopy(tiny.model)
    out.model.set_attn_implementation("sdpa")
    return out


@pytest.fixture
def hidden(reader: Any) -> Any:
    def run(bundle: Any, packed: PackedBatch, how: str = "auto") -> Tensor:
        with torch.no_grad():
            visual = FeatureCache().features(bundle.family, bundle.model, reader, packed.plans)
            return tree_hidden(bundle, bundle.model, packed, visual, how)

    return run


def config(**fields: Any) -> Any:
    return SimpleNamespace(hidden_size=64, num_attention_heads=4, **fields)


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_ways_of_other_devices_equal_rows(
    tiny_lora: Any, reader: Any, make_plan: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    trees = make_trees(tiny_lora, make_plan)
    made = make_objective("rrpo", beta=0.3, alpha=0.5)
    rows = loss_and_gradients(tiny_lora, reader, collate_rows(trees), made, attention="dense")
    used: list[str] = []

    def other(path: str, packed: PackedBatch) -> Any:
        used.append(path)
        return OTHER_WAYS[way](packed)

    monkeypatch.setattr(attention, "_attention", other)
    assert_equal(loss_and_gradients(tiny_lora, reader, collate(trees), made, attention="split"), rows)
    assert used == ["split"] * 2  # reference and training


def test_no_mask_of_all_pairs_is_made(own: Any, make_plan: Any, hidden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by us, nor by transformers."""
    batches = [f(make_trees(own, make_plan)) for f in (collate, collate_rows)]
    expected = [hidden(own, packed, "dense") for packed in batches]

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask is made")

    monkeypatch.setattr(PackedBatch, "allowed", refused)
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", refused)
    monkeypatch.setitem(attention_masks(), "sdpa", refused)
    for packed, dense in zip(batches, expected, strict=True):
        torch.testing.assert_close(hidden(own, packed), dense, rtol=1e-4, atol=1e-4)


def attention_masks() -> Any:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_all_other_calls_of_the_model_stay_as_they_were(
    own: Any, make_plan: Any, hidden: Any, tmp_path: Path, implementation: str
) -> None:
    """Padding masks, caches, generation, the vision tower, the saved config: to the bit."""
    own.model.set_attn_implementation(implementation)
    fresh = copy.deepcopy(own.model)
    hidden(own, collate(make_trees(own, make_plan)))
    ids = torch.randint(10, 300, (2, 9), generator=torch.Generator().manual_seed(3))
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    with torch.no_grad():
        for mask in (None, padding):
            found = [m(input_ids=ids, attention_mask=mask, use_cache=True) for m in (own.model, fresh)]
            assert torch.equal(found[0].logits, found[1].logits)
        made = [m.generate(ids, attention_mask=padding, max_new_tokens=4, do_sample=False) for m in (own.model, fresh)]
    assert torch.equal(*made)
    assert own.model.model.visual.config._attn_implementation == implementation
    for model, name in ((own.model, "used"), (fresh, "fresh")):
        model.config.save_pretrained(tmp_path / name)
    used, untouched = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("used", "fresh"))
    assert used == untouched


def test_a_model_may_change_its_own_attention_later(own: Any, make_plan: Any, hidden: Any) -> None:
    packed = collate(make_trees(own, make_plan))
    before = hidden(own, packed)
    own.model.set_attn_implementation({"text_config": "eager"})
    assert torch.equal(hidden(own, packed), before)
    ids = torch.arange(10, 19)[None]
    fresh = copy.deepcopy(own.model)
    fresh.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        assert torch.equal(own.model(input_ids=ids).logits, fresh(input_ids=ids).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(tiny_lora: Any, reader: Any, make_plan: Any, reentrant: bool) -> None:
    """Its recompute happens in the backward, when another batch has been through the model."""
    trees = make_trees(tiny_lora, make_plan)
    made = make_objective("dpo", beta=0.3, sft_weight=1.0)
    plain = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    model = tiny_lora.model
    calls: list[int] = []

    def count(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(1)

    layer = model.get_base_model().model.language_model.layers[0].self_attn
    layer.register_forward_pre_hook(count, with_kwargs=True)
    loss_and_gradients(tiny_lora, reader, collate(trees), made)
    without = len(calls)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    again = loss_and_gradients(tiny_lora, reader, collate(trees), made)
    assert len(calls) > 2 * without
    assert again[0] == plain[0] and again[1].keys() == plain[1].keys()
    assert all(torch.equal(again[1][name], gradient) for name, gradient in plain[1].items())


def test_threads_do_not_see_each_others_batches(own: Any, make_plan: Any, hidden: Any) -> None:
    trees = make_trees(own, make_plan)
    batches = [collate(trees[i : i + 2]) for i in range(3)]
    expected = [hidden(own, packed) for packed in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not torch.equal(hidden(own, batches[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_compiled_text_model_takes_any_layout(own: Any, make_plan: Any, hidden: Any) -> None:
    trees = make_trees(own, make_plan)
    batches = [collate(trees), collate(trees[1:]), collate(trees[::-1])]
    expected = [hidden(own, packed) for packed in batches]
    text = own.model.model.language_model
    text.forward = torch.compile(text.forward, backend="eager", dynamic=True)
    for packed, true in zip(batches, expected, strict=True):
        torch.testing.assert_close(hidden(own, packed), true, rtol=1e-5, atol=1e-5)


def test_auto_takes_the_first_that_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_said", set())
    cuda, half = torch.device("cuda"), torch.bfloat16
    packages = {"triton", "flash_attn"}
    monkeypatch.setattr(attention, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(attention.attention_flash, "installed", lambda: "flash_attn" in packages)

    def auto(device: torch.device = cuda, dtype: torch.dtype = half, **fields: Any) -> str:
        return attention.choose("auto", config(**fields), device, dtype)

    with caplog.at_level(logging.INFO, "tempo_fast"):
        assert auto() == auto() == "flex"
        assert auto(torch.device("cpu")) == "split"
        packages.remove("triton")
        assert auto() == "flash" and auto(dtype=torch.float32) == "split" and auto(head_dim=260) == "split"
        packages.clear()
        assert auto() == "split"
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(set(lines)) == 6
    assert lines[0] == "attention of packed trees: flex (compiled, on CUDA)"
    assert lines[1] == "attention of packed trees: split (no flex: the device is cpu; no flash: the device is cpu)"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("fast", "train.attention: must be one of auto, dense, split, flash, flex, got 'fast'"),
        ("flash", "train.attention: flash cannot run because the device is cpu"),
        ("flex", "train.attention: flex has no backward on a CPU, use split"),
    ],
)
def test_what_cannot_run_is_refused(own: Any, make_plan: Any, asked: str, words: str) -> None:
    with pytest.raises(InputError) as e:
        tree_hidden(own, own.model, collate(make_trees(own, make_plan)[2:3]), None, asked)
    assert str(e.value) == words


def test_text_models_that_attend_otherwise_are_refused(own: Any, make_plan: Any) -> None:
    packed = collate(make_trees(own, make_plan)[2:3])
    text = own.model.config.text_config
    text.layer_types = ["full_attention", "sliding_attention"]
    for how in ("dense", "auto"):
        with pytest.raises(InputError, match=r"model.path: the text model has sliding_attention"):
            tree_hidden(own, own.model, packed, None, how)
    with pytest.raises(InputError, match="a sliding window of 128"):
        attention.refuse(config(sliding_window=128))
    attention.refuse(config(sliding_window=128, use_sliding_window=False))


def test_dropout_of_attention_is_refused(own: Any, make_plan: Any) -> None:
    packed = collate(make_trees(own, make_plan)[2:3])
    for layer in own.model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    own.model.eval()
    tree_hidden(own, own.model, packed, None)
    own.model.train()
    with pytest.raises(InputError, match="attention_dropout must be 0"):
        tree_hidden(own, own.model, packed, None)


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"sliding_window": 8}])
def test_extras_of_a_layer_are_refused(extra: dict[str, Any]) -> None:
    mask = attention.TreeMask(lambda q, k, v, scale: q, 1, 3)
    run = attention._attention_function("sdpa")
    x = torch.zeros(1, 4, 3, 8)
    assert torch.equal(run(torch.nn.Identity(), x, x, x, mask, scaling=1.0)[0], x)
    with pytest.raises(InputError, match=next(iter(extra))):
        run(torch.nn.Identity(), x, x, x, mask, **extra)


def test_the_config_names_every_path() -> None:
    from typing import get_args, get_type_hints

    from tempo_fast.config import TrainConfig

    assert get_args(get_type_hints(TrainConfig)["attention"]) == attention.PATHS
    assert RunConfig().train.attention == "auto"
