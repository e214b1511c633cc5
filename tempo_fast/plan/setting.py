"""What decides memory and speed of a training, apart from the model and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tempo_fast.config import RunConfig, TrainConfig


@dataclass(frozen=True)
class Setting:
    """Sizes in bytes: ``size`` of an element of weights and activations."""

    size: int
    """2 for bfloat16, 4 for float32."""
    cuda: bool
    rank: int
    """Of LoRA; 0 where the model itself trains."""
    dropout: float
    policy: str
    """none, selective or full: what the backward computes again."""
    stage: int = 0
    """ZeRO's."""
    world: int = 1
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    trees: bool = True
    attention: str = "auto"
    liger: bool = False
    kl: bool = False
    """The objective reads the reference's mean_embedding."""
    train_vision: bool = False
    train_head: bool = False

    @property
    def lora(self) -> bool:
        return self.rank > 0

    @property
    def mask(self) -> int:
        """Bytes that a dropout keeps of an element: CUDA's has a mask of bytes, the CPU's multiplies by float32."""
        return 0 if not self.dropout else 1 if self.cuda else 4

    @property
    def hides_attention(self) -> bool:
        """FlexAttention is compiled: ``selective`` does not see its output, and it is computed again."""
        return self.cuda and self.trees and self.attention in ("auto", "flex")


def setting_of(config: RunConfig, *, cuda: bool, world: int, sft: bool = False) -> Setting:
    """Of a recipe's preference stages, or of its SFT stage."""
    from tempo_kernels.objectives import make_objective

    t = config.train
    full = t.tune == "full"
    objective = make_objective("sft") if sft else make_objective(t.objective.name, **t.objective.options)
    checkpointing = t.gradient_checkpointing
    policy = checkpointing if isinstance(checkpointing, str) else "full" if checkpointing else "none"
    return Setting(
        size=4 if config.model.dtype == "float32" else 2,
        cuda=cuda,
        rank=0 if full else t.lora.r,
        dropout=0.0 if full else t.lora.dropout,
        policy=policy,
        stage=t.zero_stage,
        world=world,
        deepspeed=t.engine == "deepspeed",
        offload_optimizer=t.offload_optimizer,
        offload_parameters=t.offload_parameters,
        trees=t.trees,
        attention=t.attention,
        liger=cuda and t.liger_kernels is not False,
        kl=not sft and (objective.needs_kl or config.reference.kl == "always"),
        train_vision=t.tune_vision if full else sft and t.sft.vision_lora,
        train_head=full and t.tune_head,
    )


def buckets(train: TrainConfig, trained: int) -> dict[str, Any]:
    """The ``zero_optimization`` section that the engine gives DeepSpeed for so many trained elements."""
    from tempo_fast.runtime.zero_config import zero_config

    return zero_config(train, trained)["zero_optimization"]
