"""Per-token log-probs of the answers in a padded batch, from hidden states, without logits of the other positions.

Shapes: B rows, T positions, N answer tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tempo_kernels.head import linear_logp

IGNORE = -100


@dataclass
class Answers:
    """The answer tokens of a batch, gathered row by row."""

    logp: Tensor
    """[N] float32, differentiable."""
    row: Tensor
    """[N] row of each token."""
    position: Tensor
    """[N] position of each token in its row (of the token, not of the state that predicts it)."""
    rows: int
    """B."""
    ref_logp: Tensor | None = None
    """[N] the reference's."""
    kl: Tensor | None = None
    """[N] exact KL(ref || policy), differentiable."""

    def sums(self) -> Tensor:
        """[B] summed log-prob of each row's answer."""
        return self.logp.new_zeros(self.rows).index_add(0, self.row, self.logp)

    def lengths(self) -> Tensor:
        """[B] answer tokens of each row, at least 1."""
        return torch.bincount(self.row, minlength=self.rows).clamp(min=1)


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a DDP, DeepSpeed, torch.compile or PEFT wrapper."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif not hasattr(inner, "get_output_embeddings") and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            return inner


def plain_head(model: nn.Module) -> tuple[Tensor, Tensor | None, float | None]:
    """weight [V, D], bias [V] or None, softcap or None of the model's head.

    Raises ValueError for a head with an adapter, a quantised or sharded one, or scaled logits: the loss would silently
    differ from what the model's own forward computes.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"the head is a {type(head).__name__}, not a plain linear layer: leave lm_head out of the adapter's "
            "target_modules and modules_to_save, and do not quantise it"
        )
    if head.weight.ndim != 2 or head.weight.numel() == 0 or hasattr(head.weight, "full_tensor"):
        raise ValueError("the head is sharded (ZeRO-3, FSDP): gather it around the loss, or use ZeRO-2 or DDP")
    config = inner.config.get_text_config()
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ValueError(f"models that scale their logits ({key} = {getattr(config, key)}) are not supported")
    return head.weight, head.bias, getattr(config, "final_logit_softcapping", None)


def hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[B, T, D] last hidden states (what the head sees), through the model's own, possibly wrapped forward.

    ``inputs`` go to the model as they are, without ``labels``. Where the model can, it computes the logits of one
    position only. Raises ValueError when the model has no separate backbone.
    """
    inner = unwrap(model)
    backbone = getattr(inner, inner.base_model_prefix, None) or getattr(inner, "model", None)
    if not isinstance(backbone, nn.Module):
        raise ValueError(f"{type(inner).__name__} has no backbone apart from its head")
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        inputs["logits_to_keep"] = 1
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

    handle = backbone.register_forward_hook(keep)
    try:
        model(**{**inputs, "use_cache": False, "return_dict": True})
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(f"the backbone ran {len(seen)} times in one forward; exactly one is expected")
    return seen[0]


def answer_logps(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    *,
    reference: nn.Module | None = None,
    adapter: str | None = None,
    adapters_off: bool = False,
    kl: bool = False,
    exact_kl: bool = False,
    impl: str = "auto",
) -> Answers:
    """Log-probs of the tokens of ``labels`` [B, T] that are not -100, each predicted by the position before it.

    Args:
        model: policy; wrapped (DDP, DeepSpeed ZeRO-0 to 2, PEFT) or not.
        inputs: what the model takes besides labels, batch first; longer hidden states (visual tokens put in front)
            are cut to the last T positions.
        reference: another model, run without gradient; or ``adapter``: another PEFT adapter of the policy, by name; or
            ``adapters_off``: the policy with its PEFT adapters disabled. Any fills ``ref_logp``, and ``kl`` if asked.
        exact_kl, impl: as :func:`tempo_kernels.head.linear_logp`.

    Raises ValueError for heads that cannot be used, for a reference with a head of its own where ``kl`` is asked, and
    for a policy that trains the head it shares with its reference.
    """
    row, before = torch.nonzero(labels[:, 1:] != IGNORE, as_tuple=True)
    targets = labels[row, before + 1]
    weight, bias, softcap = plain_head(model)
    if weight.requires_grad and (adapters_off or adapter is not None):
        raise ValueError("the head trains, so the model with its adapters off is no reference: freeze the head")

    def gathered(of: nn.Module) -> Tensor:
        states = hidden_states(of, **inputs)[:, -labels.shape[1] :]
        return states[row, before]

    hidden = gathered(model)
    ref_hidden = ref_logp = None
    if reference is not None or adapter is not None or adapters_off:
        source = model if reference is None else reference
        with as_reference(source, adapter=adapter, adapters_off=adapters_off):
            ref_hidden = gathered(source)
            ref_weight, ref_bias, ref_cap = plain_head(source)
        if not _same(ref_weight, weight) or not _same(ref_bias, bias) or ref_cap != softcap:
            if kl:
                raise ValueError("the exact KL needs a reference with the policy's own (frozen) head")
            with torch.no_grad():
                ref_logp = linear_logp(ref_hidden, ref_weight, targets, bias=ref_bias, softcap=ref_cap, impl=impl).logp
            ref_hidden = None
    out = linear_logp(
        hidden, weight, targets, bias=bias, softcap=softcap, reference=ref_hidden, impl=impl, kl=kl, exact_kl=exact_kl
    )
    return Answers(out.logp, row, before + 1, labels.shape[0], ref_logp if ref_hidden is None else out.ref_logp, out.kl)


def _same(reference: Tensor | None, policy: Tensor | None) -> bool:
    """Equal by value. One that trains leaves the reference's after a step: not worth reading both to find out."""
    if reference is policy:
        return True
    if reference is None or policy is None or policy.requires_grad or reference.shape != policy.shape:
        return False
    return torch.equal(reference, policy)


@contextmanager
def as_reference(model: nn.Module, *, adapter: str | None = None, adapters_off: bool = False) -> Iterator[None]:
    """Without gradient and dropout, with another adapter active or none; all is put back. Raises ValueError without
    PEFT adapters to switch."""
    switched = _adapter(model, adapter) if adapters_off or adapter is not None else nullcontext()
    with torch.no_grad(), _evaluating(model), switched:
        yield


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout while the reference runs; every module's own mode comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """The policy with its PEFT adapter ``name`` active, or with none."""
    inner: Any = model
    while not hasattr(inner, "disable_adapter"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise ValueError("there is no reference: pass one, or train a PEFT adapter")
    if name is None:
        with inner.disable_adapter():
            yield
        return
    active = inner.active_adapter
    trainable = [p for p in inner.parameters() if p.requires_grad]
    inner.set_adapter(name)
    try:
        yield
    finally:
        inner.set_adapter(active)
        inner.requires_grad_(False)  # set_adapter has its own idea of what trains
        for parameter in trainable:
            parameter.requires_grad_(True)
