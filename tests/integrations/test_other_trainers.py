"""The mixins against logits, log_softmax and gather on a tiny text model."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_fast.integrations import llama_factory, ms_swift
from tempo_fast.integrations.answers import answer_logps, hidden_states, plain_head, unwrap
from tempo_fast.integrations.drop_in import drop_in

VOCABULARY = 61
Make = Callable[..., Any]


def make_batch(seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """4 rows (2 chosen, 2 rejected) of prompt, answer and right padding, all of ragged lengths."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (4, 13), generator=g)
    labels = torch.full_like(ids, -100)
    attention = torch.zeros_like(ids)
    for i, (prompt, end) in enumerate([(3, 9), (5, 13), (3, 12), (5, 6)]):
        labels[i, prompt:end] = ids[i, prompt:end]
        attention[i, :end] = 1
    return {"input_ids": ids, "attention_mask": attention}, labels


def plain_logps(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T-1] log-probs, 0 outside the answers, and their mask, the usual way."""
    logits = model(**inputs).logits[:, :-1]
    mask = labels[:, 1:] != -100
    picked = torch.log_softmax(logits.float(), -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return picked * mask, mask


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("impl", ["one_pass", "eager"])
def test_log_probs_equal_log_softmax_and_gather(adapter: bool, impl: str, make_model: Make, with_adapter: Make) -> None:
    model = make_model().requires_grad_(False)
    if adapter:
        model = with_adapter(model)
    inputs, labels = make_batch()
    expected, mask = plain_logps(model, inputs, labels)
    found = answer_logps(model, inputs, labels, impl=impl)
    torch.testing.assert_close(found.logp, expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sums(), expected.sum(1), rtol=1e-5, atol=1e-5)
    assert found.lengths().tolist() == mask.sum(1).tolist()
    assert torch.equal(labels[found.row, found.position], labels[:, 1:][mask])


def test_adapter_gradients_equal_the_plain_way(make_model: Make, with_adapter: Make) -> None:
    model = with_adapter(make_model())
    inputs, labels = make_batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.autograd.grad((plain_logps(model, inputs, labels)[0].sum(1) * coefficients).sum(), parameters)
    found = torch.autograd.grad((answer_logps(model, inputs, labels).sums() * coefficients).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was(make_model: Make, with_adapter: Make) -> None:
    model = with_adapter(make_model()).train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    inputs, labels = make_batch()
    answer_logps(model, inputs, labels, adapters_off=True)
    assert [m.training for m in model.modules()] == modes
    assert not unwrap(model).model._forward_hooks
    torch.testing.assert_close(hidden_states(model.eval(), **inputs).shape, torch.Size([4, 13, 32]))


@pytest.mark.parametrize("kind", ["adapters_off", "model"])
def test_reference_log_probs_and_kl(kind: str, make_model: Make, with_adapter: Make) -> None:
    base, model = make_model(), with_adapter(make_model())
    inputs, labels = make_batch()
    options: dict[str, Any] = {"adapters_off": True} if kind == "adapters_off" else {"reference": base}
    found = answer_logps(model, inputs, labels, kl=True, **options)
    expected, mask = plain_logps(base, inputs, labels)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    log_p, log_q = (torch.log_softmax(m(**inputs).logits[:, :-1][mask].double(), -1) for m in (model, base))
    torch.testing.assert_close(found.kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-3, atol=1e-5)
    assert found.kl.max() > 1e-3  # the adapter does something


def test_another_adapter_of_the_policy_as_reference(make_model: Make, with_adapter: Make) -> None:
    model = with_adapter(make_model())
    model.add_adapter("ref", model.peft_config["default"])
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs, labels = make_batch()
    trains = [p.requires_grad for p in model.parameters()]
    found = answer_logps(model, inputs, labels, adapter="ref")
    assert [p.requires_grad for p in model.parameters()] == trains and model.active_adapter == "default"
    model.set_adapter("ref")
    expected, mask = plain_logps(model, inputs, labels)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(found.logp, plain_logps(model, inputs, labels)[0][mask], rtol=1e-5, atol=1e-5)


def test_a_reference_with_another_head_gives_log_probs_but_no_kl(make_model: Make, with_adapter: Make) -> None:
    other, model = make_model(5), with_adapter(make_model())
    inputs, labels = make_batch()
    expected, mask = plain_logps(other, inputs, labels)
    found = answer_logps(model, inputs, labels, reference=other)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="frozen"):
        answer_logps(model, inputs, labels, reference=other, kl=True)


def test_heads_that_would_lie_are_refused(make_model: Make, with_adapter: Make) -> None:
    with pytest.raises(ValueError, match="target_modules"):
        plain_head(with_adapter(make_model(), target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        plain_head(with_adapter(make_model(), modules_to_save=["lm_head"]))
    model = make_model()
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="logits_scaling"):
        plain_head(model)
    model = make_model()
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match="ZeRO-3"):
        plain_head(model)
    inputs, labels = make_batch()
    with pytest.raises(ValueError, match="no reference"):
        answer_logps(make_model(), inputs, labels, adapters_off=True)


def test_a_head_sharded_by_fsdp2_is_refused(make_model: Make) -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = make_model()
        mesh = dist.init_device_mesh("cpu", (1,))
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        with pytest.raises(ValueError, match="FSDP"):
            plain_head(model)
    finally:
        dist.destroy_process_group()


def test_a_wrapped_model_is_called_through_its_wrapper(make_model: Make, with_adapter: Make) -> None:
    """Gradient synchronisation lives in the wrapper's forward."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(**kwargs)

    wrapped = Wrapper(with_adapter(make_model()))
    inputs, labels = make_batch()
    found = answer_logps(wrapped, inputs, labels, adapters_off=True)
    assert wrapped.calls == 2
    torch.testing.assert_close(found.logp, answer_logps(wrapped.module, inputs, labels).logp)


# -- the mixins -------------------------------------------------------------------------------------------------------


def stand_in(monkeypatch: pytest.MonkeyPatch, path: str, name: str, host: type) -> None:
    """``path`` as an importable module that holds ``name``, with the packages above it."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[path], name, host)
    drop_in.cache_clear()


@pytest.fixture(autouse=True)
def no_class_of_a_stand_in_stays() -> Iterator[None]:
    yield
    drop_in.cache_clear()


class SwiftHost:
    """What ms-swift's trainer has when its loss asks for log-probs."""

    aux_loss_enabled = is_encoder_decoder = False

    def __init__(self, loss_type: Any) -> None:
        self.template = SimpleNamespace(padding_free=False, packing=False, sequence_parallel_size=1)
        self.args, self.loss_type = SimpleNamespace(ld_alpha=None), loss_type


class Swift46Host(SwiftHost):
    """From 4.6 on, ipo's division by the token counts is the trainer's."""

    def _get_ipo_sequence_logps(self, sums: Tensor, counts: Tensor) -> Tensor:
        return sums / counts


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"], "ipo"])
@pytest.mark.parametrize("is_ref", [False, True])
@pytest.mark.parametrize("host", [SwiftHost, Swift46Host])
def test_ms_swift_gets_what_its_loss_expects(
    loss_type: Any, is_ref: bool, host: type, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "swift.rlhf_trainers.dpo_trainer", "DPOTrainer", host)
    # as its factory resolves a name of its table
    module, name = "tempo_fast.integrations.ms_swift.DPOTrainer".rsplit(".", 1)
    trainer = getattr(importlib.import_module(module), name)(loss_type)
    assert isinstance(trainer, SwiftHost)

    model = make_model()
    inputs, labels = make_batch()
    position_ids = torch.arange(13).expand(4, -1)
    batch = {**inputs, "labels": labels, "text_position_ids": position_ids}
    found = trainer.concatenated_forward(model, batch, is_ref)
    assert set(batch) == {*inputs, "labels", "text_position_ids"}  # the trainer uses it again for the reference
    per_token, mask = plain_logps(model, inputs, labels)
    sums = per_token.sum(1) / (mask.sum(1) if "ipo" in loss_type and host is SwiftHost else 1)
    counts = torch.cat([found["chosen_completion_token_counts"], found["rejected_completion_token_counts"]])
    assert counts.tolist() == mask.sum(1).tolist()
    torch.testing.assert_close(found["chosen_logps"], sums[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rejected_logps"], sums[2:], rtol=1e-5, atol=1e-5)
    assert found["mean_chosen_logits"].isnan() and found["mean_rejected_logits"].isnan()
    assert ("nll_loss" in found) != is_ref
    if not is_ref:
        torch.testing.assert_close(found["nll_loss"], -per_token[:2][mask[:2]].mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        ("template", {"padding_free": True}, "padding_free"),
        ("template", {"packing": True}, "packing"),
        ("template", {"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ("args", {"ld_alpha": 0.5}, "ld_alpha"),
        ("", {"aux_loss_enabled": True}, "router_aux_loss_coef"),
        ("", {"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_ms_swift_options_that_would_be_dropped_are_refused(where: str, change: dict[str, Any], words: str) -> None:
    trainer = type("Trainer", (ms_swift.HiddenLogpsMixin, SwiftHost), {})(["sigmoid"])
    vars(getattr(trainer, where) if where else trainer).update(change)
    with pytest.raises(ValueError, match=words):
        trainer.concatenated_forward(None, {})


class FactoryHost:
    """What LLaMA-Factory's trainer has when its loss asks for log-probs."""

    ld_alpha = None

    def __init__(self, loss_type: str) -> None:
        self.loss_type = loss_type


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_llama_factory_gets_what_its_loss_expects(
    loss_type: str, make_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "llamafactory.train.dpo.trainer", "CustomDPOTrainer", FactoryHost)
    host = importlib.import_module("llamafactory.train.dpo.trainer")
    host.CustomDPOTrainer = llama_factory.CustomDPOTrainer  # type: ignore[attr-defined]  # the user's line
    trainer = host.CustomDPOTrainer(loss_type)
    assert isinstance(trainer, FactoryHost) and llama_factory.CustomDPOTrainer is host.CustomDPOTrainer

    model = make_model()
    inputs, labels = make_batch()
    found = trainer.concatenated_forward(model, {**inputs, "labels": labels})
    per_token, mask = plain_logps(model, inputs, labels)
    sums, means = per_token.sum(1), per_token.sum(1) / mask.sum(1)
    expected = means if loss_type == "simpo" else sums
    torch.testing.assert_close(found["chosen_logps"], expected[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rejected_logps"], expected[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["chosen_logps_avg"], means[:2], rtol=1e-5, atol=1e-5)
    assert found["chosen_logits"].isnan().all()
    trainer.ld_alpha = 0.5
    with pytest.raises(ValueError, match="ld_alpha"):
        trainer.concatenated_forward(model, {**inputs, "labels": labels})


@pytest.mark.parametrize("module", [ms_swift, llama_factory])
def test_a_trainer_that_is_not_installed_is_named(module: ModuleType) -> None:
    name = {ms_swift: "DPOTrainer", llama_factory: "CustomDPOTrainer"}[module]
    with pytest.raises(ImportError, match=f"{name} is not there"):
        getattr(module, name)
    with pytest.raises(AttributeError, match="Trainerr"):
        module.Trainerr  # noqa: B018


def test_nothing_of_the_trainers_is_imported() -> None:
    code = (
        "import sys, tempo_fast.integrations.trl, tempo_fast.integrations.ms_swift, "
        "tempo_fast.integrations.llama_factory\n"
        "assert not {'trl', 'swift', 'llamafactory', 'transformers', 'peft'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
