"""The head's weight: plain heads give it, heads with an adapter are refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tempo_fast.errors import InputError
from tempo_fast.runtime.head import gathered_head


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
