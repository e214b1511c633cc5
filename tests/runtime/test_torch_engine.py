"""The torch engine against AdamW written out, its state, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempo_fast.config import TrainConfig
from tempo_fast.errors import InputError
from tempo_fast.runtime.engine import TorchEngine, make_train_engine
from tempo_fast.runtime.ranks import Ranks

CONFIG = dataclasses.replace(TrainConfig(), weight_decay=0.1, adam_beta2=0.95, max_grad_norm=0.7, engine="torch")


class Toy(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(3, 4, generator=g))
        self.b = nn.Parameter(torch.randn(3, generator=g))
        self.unused = nn.Parameter(torch.randn(2, 2, generator=g))
        self.frozen = nn.Parameter(torch.randn(4, generator=g), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(x @ self.a.T + self.b) ** 2).sum() + (self.frozen @ self.a.T).sum()


def make(seed: int = 0, config: TrainConfig = CONFIG) -> Any:
    module = Toy(seed)
    return make_train_engine(module, {n: p for n, p in module.named_parameters() if p.requires_grad}, config, Ranks())


def batches(n: int) -> list[Tensor]:
    return list(torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(9)))


def test_steps_are_adamw_with_clipping() -> None:
    """Against the update written out in float64; the bias is not decayed, the unused weight is."""
    engine = make()
    oracle = Toy().double()
    names = ["a", "b", "unused"]
    m = {n: torch.zeros_like(oracle.get_parameter(n)) for n in names}
    v = {n: torch.zeros_like(oracle.get_parameter(n)) for n in names}
    for t, x in enumerate(batches(5), 1):
        lr = 0.1 / t
        for half in (x[:2], x[2:]):  # two micro-batches
            engine.backward(engine(half) * 0.5)
        norm = engine.step(lr)
        oracle.zero_grad()
        (oracle(x[:2].double()) * 0.5 + oracle(x[2:].double()) * 0.5).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n in names for p in [oracle.get_parameter(n)]}
        total = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        assert norm == pytest.approx(total, rel=1e-5)
        scale = min(1.0, 0.7 / (total + 1e-6))
        with torch.no_grad():
            for n in names:
                p, g = oracle.get_parameter(n), grads[n] * scale
                p.mul_(1 - lr * (0.1 if p.ndim > 1 else 0.0))
                m[n] = 0.9 * m[n] + 0.1 * g
                v[n] = 0.95 * v[n] + 0.05 * g * g
                p.sub_(lr * (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.95**t)).sqrt() + 1e-8))
    for n in names:
        ours = engine.module.get_parameter(n).double()
        torch.testing.assert_close(ours, oracle.get_parameter(n), rtol=1e-5, atol=1e-6)


def test_no_clipping_at_zero() -> None:
    engine = make(config=dataclasses.replace(CONFIG, max_grad_norm=0.0))
    engine.backward(engine(batches(1)[0]) * 100)
    gradient = engine.module.a.grad.clone()
    assert engine.step(0.0) > 10
    other = make()
    other.backward(other(batches(1)[0]) * 100)
    assert torch.equal(other.module.a.grad, gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_gradient_is_skipped(bad: float) -> None:
    engine, twin = make(), make()
    for e in (engine, twin):
        e.backward(e(batches(1)[0]))
        e.step(0.1)
    engine.backward(engine(batches(1)[0]) * bad)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    assert engine.step(0.1) == math.inf
    assert all(torch.equal(before[n], p) for n, p in engine.module.named_parameters())
    # the next step is as if nothing had been
    for e in (engine, twin):
        e.backward(e(batches(2)[1]))
        e.step(0.1)
    assert all(torch.equal(p, q) for p, q in zip(engine.module.parameters(), twin.module.parameters(), strict=True))


def test_resumed_equals_uninterrupted_to_the_bit() -> None:
    xs = batches(6)
    whole = make()
    for i, x in enumerate(xs):
        if i == 3:
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
        whole.backward(whole(x))
        whole.step(0.05)
    file.seek(0)
    resumed = make(seed=5)
    with torch.no_grad():
        resumed.module.frozen.copy_(whole.module.frozen)  # comes with the model, not with the state
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for x in xs[3:]:
        resumed.backward(resumed(x))
        resumed.step(0.05)
    assert all(torch.equal(p, q) for p, q in zip(whole.module.parameters(), resumed.module.parameters(), strict=True))


def test_a_state_before_the_first_step_can_be_loaded() -> None:
    engine, twin = make(seed=1), make()
    engine.load_state_dict(twin.state_dict())
    assert torch.equal(engine.module.a, twin.module.a)


def test_states_of_other_models_are_refused() -> None:
    engine = make()
    state = engine.state_dict()
    shapes = dict(state["shapes"])
    shapes["else"] = shapes.pop("b")
    with pytest.raises(InputError, match="parameter b is missing"):
        engine.load_state_dict({**state, "shapes": shapes})
    with pytest.raises(InputError, match="a has shape"):
        engine.load_state_dict({**state, "shapes": {**state["shapes"], "a": [1]}})
    with pytest.raises(InputError, match="its format is None, this version reads 2"):
        engine.load_state_dict({"engine": "torch", "weights": {}})
    with pytest.raises(InputError, match="12 of 19 trained values are in none of its files"):
        engine.load_state_dict({**state, "pieces": [p for p in state["pieces"] if p[0] != "a"]})


def test_bfloat16_weights_have_float32_masters() -> None:
    """Steps far below a last bit of bfloat16 add up; micro-batches are summed in float32; a resumed run is the same."""
    config = dataclasses.replace(CONFIG, tune="full", max_grad_norm=0.0, weight_decay=0.0)

    def half(seed: int = 0) -> Any:
        module = Toy(seed).bfloat16()
        return TorchEngine(module, {n: p for n, p in module.named_parameters() if p.requires_grad}, config)

    engine, start = half(), Toy().bfloat16().a.detach().float()
    micro = [x.bfloat16() for x in batches(8)]
    for step in range(40):
        if step == 20:
            twin = half(seed=3)
            twin.module.frozen.data.copy_(engine.module.frozen)
            twin.load_state_dict(engine.state_dict())
        for x in micro:
            engine.backward(engine(x) / 8)
        summed = engine.masters["a"].grad.clone()
        engine.step(1e-5)
    expected = torch.zeros_like(summed)
    for x in micro:
        engine.module.zero_grad()
        (engine(x) / 8).backward()
        expected += engine.module.a.grad.float()
    torch.testing.assert_close(summed, expected, rtol=0.05, atol=0.02)  # the weights moved once in between
    moved = engine.masters["a"].detach() - start
    assert float(moved.abs().median()) == pytest.approx(40e-5, rel=0.1)  # a step alone, 1e-5, would round to nothing
    assert torch.equal(engine.module.a, engine.masters["a"].bfloat16()) and engine.module.a.dtype == torch.bfloat16
    for _ in range(20):
        for x in micro:
            twin.backward(twin(x) / 8)
        twin.step(1e-5)
    assert torch.equal(twin.masters["a"], engine.masters["a"])


def test_state_dict_is_a_copy() -> None:
    engine = make()
    state = engine.state_dict()
    saved = {name: values["master"] for name, _, values in state["pieces"]}["a"]
    kept = saved.clone()
    engine.backward(engine(batches(1)[0]))
    engine.step(0.5)
    assert torch.equal(saved, kept) and not torch.equal(engine.module.a.flatten(), kept)


def test_what_cannot_be_trained_is_refused() -> None:
    module = Toy()
    with pytest.raises(InputError, match="no parameter"):
        TorchEngine(module, {}, CONFIG)
    with pytest.raises(InputError, match="half.w is trained in bfloat16"):
        TorchEngine(module, {"half.w": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}, CONFIG)
    with pytest.raises(InputError, match="train.engine: torch runs one process and 2 were started"):
        make_train_engine(module, {"a": module.a}, CONFIG, Ranks(0, 2))


def test_a_missing_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Toy()
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"pip install 'tempo-fast\[deepspeed\]'"):
        make_train_engine(module, {"a": module.a}, dataclasses.replace(CONFIG, engine="deepspeed"), Ranks())
