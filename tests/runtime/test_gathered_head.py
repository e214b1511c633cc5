"""The head's weight: plain heads give it, heads with an adapter are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tempo_fast.errors import InputError
from tempo_fast.runtime.head import apply_head, gathered_head


def test_a_plain_head_gives_its_parameter(tiny: Any) -> None:
    head = tiny.family.head(tiny.model)
    with gathered_head(head) as weight:
        assert weight is head.weight and weight.shape == (tiny.config.text_config.vocab_size, 64)


def test_an_adapter_on_the_head_is_refused(tiny: Any) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(tiny.model), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(InputError, match="adapter on the vocabulary head"), gathered_head(tiny.family.head(model)):
        pass


def test_a_bias_is_refused() -> None:
    with pytest.raises(InputError, match="head with a bias is not supported"), gathered_head(nn.Linear(3, 5)):
        pass


def test_a_trainable_plain_head_keeps_its_graph() -> None:
    head = nn.Linear(3, 5, bias=False)
    with gathered_head(head) as weight:
        weight.sum().backward()
    assert head.weight.grad is not None


def squared(hidden: Tensor, weight: Tensor) -> tuple[Tensor, None]:
    return (hidden @ weight.T).square().sum(-1), None


@pytest.mark.parametrize("trains", [True, False])
def test_a_function_of_the_head_gets_gradients_for_what_trains(trains: bool) -> None:
    head, hidden = nn.Linear(3, 5, bias=False).requires_grad_(trains), torch.randn(2, 3, requires_grad=True)
    value, nothing = apply_head(head, hidden, squared)
    value.sum().backward()
    assert nothing is None and hidden.grad is not None
    assert (head.weight.grad is not None) == trains
    if trains:
        torch.testing.assert_close(head.weight.grad, 2 * head.weight.detach() @ hidden.detach().T @ hidden.detach())


def test_a_function_of_a_head_with_a_bias_is_refused() -> None:
    with pytest.raises(InputError, match="head with a bias is not supported"):
        apply_head(nn.Linear(3, 5), torch.zeros(1, 3), squared)


def test_a_partitioned_head_that_trains_runs_the_function_as_its_own_call() -> None:
    """What ZeRO-3 hangs on the module's call comes to run; the module is as before afterwards, also after a failure."""
    head, calls = nn.Linear(3, 5, bias=False), []
    head.weight.ds_id = 0
    head.register_forward_pre_hook(lambda *_: calls.append("gather"))
    head.register_forward_hook(lambda *_: calls.append("release"))
    hidden = torch.randn(2, 3)
    value, _ = apply_head(head, hidden, squared)
    assert calls == ["gather", "release"] and value.requires_grad
    with pytest.raises(ZeroDivisionError):
        apply_head(head, hidden, lambda x, w: (1 / 0,))
    torch.testing.assert_close(head(hidden), hidden @ head.weight.T)
    with pytest.raises(RuntimeError, match="apply_head"), gathered_head(head):
        pass
