"""The mixins against logits, log_softmax and gather on a tiny text model."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_fast.integrations import llama_factory, ms_swift, trl
from tempo_fast.integrations.answers import answer_logps, hidden_states, plain_head, unwrap
from tempo_kernels.objectives import make_objective

VOCABULARY = 61


def make_model(seed: int = 0) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


def with_adapter(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "down_proj"], **settings}))


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
def test_log_probs_equal_log_softmax_and_gather(adapter: bool, impl: str) -> None:
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


def test_adapter_gradients_equal_the_plain_way() -> None:
    model = with_adapter(make_model())
    inputs, labels = make_batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    coefficients = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.autograd.grad((plain_logps(model, inputs, labels)[0].sum(1) * coefficients).sum(), parameters)
    found = torch.autograd.grad((answer_logps(model, inputs, labels).sums() * coefficients).sum(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_model_stays_as_it_was() -> None:
    model = with_adapter(make_model()).train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    inputs, labels = make_batch()
    answer_logps(model, inputs, labels, adapters_off=True)
    assert [m.training for m in model.modules()] == modes
    assert not unwrap(model).model._forward_hooks
    torch.testing.assert_close(hidden_states(model.eval(), **inputs).shape, torch.Size([4, 13, 32]))


@pytest.mark.parametrize("kind", ["adapters_off", "model"])
def test_reference_log_probs_and_kl(kind: str) -> None:
    base, model = make_model(), with_adapter(make_model())
    inputs, labels = make_batch()
    options: dict[str, Any] = {"adapters_off": True} if kind == "adapters_off" else {"reference": base}
    found = answer_logps(model, inputs, labels, kl=True, **options)
    expected, mask = plain_logps(base, inputs, labels)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    log_p, log_q = (torch.log_softmax(m(**inputs).logits[:, :-1][mask].double(), -1) for m in (model, base))
    torch.testing.assert_close(found.kl.double(), (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-3, atol=1e-5)
    assert found.kl.max() > 1e-3  # the adapter does something


def test_another_adapter_of_the_policy_as_reference() -> None:
    model = with_adapter(make_model())
    model.add_adapter("ref", model.peft_config["default"])
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs, labels = make_batch()
    trains = [p.requires_grad for p in model.parameters()]
    found = answer_logps(model, inputs, labels, reference="ref")
    assert [p.requires_grad for p in model.parameters()] == trains and model.active_adapter == "default"
    model.set_adapter("ref")
    expected, mask = plain_logps(model, inputs, labels)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    model.set_adapter("default")
    torch.testing.assert_close(found.logp, plain_logps(model, inputs, labels)[0][mask], rtol=1e-5, atol=1e-5)


def test_a_reference_with_another_head_gives_log_probs_but_no_kl() -> None:
    other, model = make_model(5), with_adapter(make_model())
    inputs, labels = make_batch()
    expected, mask = plain_logps(other, inputs, labels)
    found = answer_logps(model, inputs, labels, reference=other)
    torch.testing.assert_close(found.ref_logp, expected[mask].detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="frozen"):
        answer_logps(model, inputs, labels, reference=other, kl=True)


def test_heads_that_would_lie_are_refused() -> None:
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


def test_a_wrapped_model_is_called_through_its_wrapper() -> None:
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
def test_ms_swift_gets_what_its_loss_expects(loss_type: list[str], is_ref: bool) -> None:
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
def test_llama_factory_gets_what_its_loss_expects(loss_type: str) -> None:
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


def trl_arguments(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"beta": 0.3, "loss_type": ["sigmoid"], "label_smoothing": 0.0, **changes})


def _same(value: Any) -> Any:
    return value


class Host(trl.ObjectiveMixin):
    """The attributes of TRL's trainer that the mixin touches."""

    def __init__(self, model: Any, **changes: Any) -> None:
        self.model, self.ref_model, self.args = model, None, trl_arguments(**changes)
        self._metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = 0
        self.accelerator = SimpleNamespace(gather=_same, gather_for_metrics=_same, unwrap_model=_same)


def trl_inputs() -> tuple[dict[str, Tensor], Tensor]:
    inputs, labels = make_batch()
    return {**inputs, "completion_mask": (labels != -100).long()}, labels


def test_trl_sigmoid_loss_equals_plain_dpo() -> None:
    base, model = make_model(), with_adapter(make_model()).train()
    inputs, labels = trl_inputs()
    host = Host(model)
    loss = host._compute_loss(model, inputs)
    d = (plain_logps(model, make_batch()[0], labels)[0] - plain_logps(base, make_batch()[0], labels)[0]).sum(1)
    expected = -torch.nn.functional.logsigmoid(0.3 * (d[:2] - d[2:])).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    metrics = host._metrics["train"]
    assert metrics["rewards/margins"] == pytest.approx([0.3 * (d[:2] - d[2:]).mean().item()], rel=1e-4)
    assert metrics["num_tokens"] == [int(inputs["attention_mask"].sum())]
    assert loss.requires_grad


def test_trl_with_an_objective_of_spans_and_kl() -> None:
    class Trainer(Host):
        objective = make_objective("rrpo", beta=0.5, alpha=0.1)

    model = with_adapter(make_model())
    inputs, labels = trl_inputs()
    spans = torch.randint(0, 2, labels.shape, generator=torch.Generator().manual_seed(0))
    host = Trainer(model)
    loss = host._compute_loss(model, {**inputs, "spans": spans})
    found = answer_logps(model, make_batch()[0], labels, adapters_off=True, kl=True)
    assert found.ref_logp is not None and found.kl is not None
    marked = (found.logp - found.ref_logp) * spans[found.row, found.position]
    u = [marked[found.row == i].sum() for i in range(4)]
    k = [found.kl[found.row == i].sum() for i in range(4)]
    expected = sum(-torch.nn.functional.logsigmoid(0.5 * (u[i] - u[i + 2])) + 0.1 * k[i] for i in range(2)) / 2
    torch.testing.assert_close(loss, expected)
    assert host._metrics["eval"]["kl/chosen"] or host._metrics["train"]["kl/chosen"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"precompute_ref_log_probs": True}, "precompute"),
        ({"f_divergence_type": "js_divergence"}, "reverse_kl"),
        ({"loss_type": ["discopop"]}, "discopop"),
        ({"loss_type": ["sigmoid", "sft"]}, "sft"),
    ],
)
def test_trl_arguments_are_never_dropped_in_silence(changes: dict[str, Any], words: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=words):
        Host(model, **changes)._compute_loss(model, trl_inputs()[0])


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_trl_itself_computes_the_same_loss(loss_type: str, tmp_path: Any) -> None:
    """The real trainer with and without the mixin, on the same batch (where TRL is installed)."""
    pytest.importorskip("trl")
    from trl import DPOConfig, DPOTrainer

    class Ours(trl.ObjectiveMixin, DPOTrainer):
        pass

    inputs, _ = trl_inputs()
    losses = []
    for cls in (DPOTrainer, Ours):
        losses.append(_trl_loss(cls, DPOConfig, loss_type, inputs, tmp_path))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


def _trl_loss(cls: Any, config: Any, loss_type: str, inputs: dict[str, Tensor], folder: Any) -> Tensor:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="t1", pad_token="t2", unk_token="t0")
    rows = Dataset.from_list([{"prompt": "t3", "chosen": "t4", "rejected": "t5"}] * 2)
    args = config(
        output_dir=str(folder), loss_type=loss_type, beta=0.3, label_smoothing=0.1 if loss_type == "robust" else 0.0,
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
    )
    trainer = cls(model=with_adapter(make_model()), args=args, train_dataset=rows, processing_class=tokenizer)
    torch.manual_seed(2)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name and ".ref." not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return trainer._compute_loss(trainer.model, dict(inputs), False).detach()


def test_nothing_of_the_trainers_is_imported() -> None:
    code = (
        "import sys, tempo_fast.integrations.trl, tempo_fast.integrations.ms_swift, "
        "tempo_fast.integrations.llama_factory\n"
        "assert not {'trl', 'swift', 'llamafactory', 'transformers', 'peft'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
