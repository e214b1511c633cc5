"""The mixins against logits, log_softmax and gather on a tiny text model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_fast.integrations import llama_factory, ms_swift
from tempo_fast.integrations.answers import answer_logps, hidden_states, plain_head, unwrap

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


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["ipo"]])
@pytest.mark.parametrize("is_ref", [False, True])
def test_ms_swift_gets_what_its_loss_expects(loss_type: list[str], is_ref: bool, make_model: Make) -> None:
    class Trainer(ms_swift.HiddenLogpsMixin):
        def __init__(self) -> None:
            self.template = SimpleNamespace(padding_free=False, sequence_parallel_size=1)
            self.args, self.loss_type = SimpleNamespace(ld_alpha=None), loss_type

    model = make_model()
    inputs, labels = make_batch()
    position_ids = torch.arange(13).expand(4, -1)
    batch = {**inputs, "labels": labels, "text_position_ids": position_ids}
    found = Trainer().concatenated_forward(model, batch, is_ref)
    per_token, mask = plain_logps(model, inputs, labels)
    sums = per_token.sum(1) / (mask.sum(1) if loss_type == ["ipo"] else 1)
    torch.testing.assert_close(found["chosen_logps"], sums[:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["rejected_logps"], sums[2:], rtol=1e-5, atol=1e-5)
    assert ("nll_loss" in found) != is_ref
    if not is_ref:
        torch.testing.assert_close(found["nll_loss"], -per_token[:2][mask[:2]].mean(), rtol=1e-5, atol=1e-5)
    packed = Trainer()
    packed.template.padding_free = True
    with pytest.raises(ValueError, match="padding_free"):
        packed.concatenated_forward(model, {**inputs, "labels": labels})


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_llama_factory_gets_what_its_loss_expects(loss_type: str, make_model: Make) -> None:
    class Trainer(llama_factory.HiddenLogpsMixin):
        ld_alpha = None

    trainer = Trainer()
    trainer.loss_type = loss_type
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


def test_nothing_of_the_trainers_is_imported() -> None:
    code = (
        "import sys, tempo_fast.integrations.trl, tempo_fast.integrations.ms_swift, "
        "tempo_fast.integrations.llama_factory\n"
        "assert not {'trl', 'swift', 'llamafactory', 'transformers', 'peft'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
