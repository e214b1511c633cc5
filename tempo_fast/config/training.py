"""Stages, adapters, optimiser, reference, evaluation, report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tempo_fast.config.check import require
from tempo_fast.config.curriculum import AdaptiveConfig, ObjectiveConfig, SFTConfig, StageConfig, default_stages


@dataclass
class LoraConfig:
    r: int = 32
    """Rank."""
    alpha: int = 64
    """Scale is alpha / r."""
    dropout: float = 0.05
    """On the adapter's input."""


@dataclass
class TrainConfig:
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Loss of the preference stages."""
    stages: list[StageConfig] = field(default_factory=default_stages)
    """The curriculum, in order."""
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Ends stages by what held-out pairs say."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Imitation of data.sft after the curriculum, before it or between its steps."""
    tune: Literal["lora", "full"] = "lora"
    """What trains: adapters, or the language model itself. Each stage of ``full`` leaves a directory for
    ``from_pretrained`` and starts from the one before; its input embedding trains unless a frozen head shares it."""
    tune_head: bool = False
    """With ``full``: train the vocabulary head too. Not with an objective that needs the KL: cached statistics give it
    only under the head they were made with."""
    tune_vision: bool = False
    """With ``full``: train the vision tower and the projector too, in every stage."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters of the preference stages (language model only)."""
    learning_rate: float = 5e-6
    """Peak of each stage."""
    batch_size: int = 16
    """Pairs per optimizer step over all ranks: in a tree of one chosen and three rejected the chosen counts thrice."""
    max_tokens: int = 16384
    """Token budget of one packed row; a record that is longer is an error."""
    length_window: int = 1
    """Optimizer steps whose records are sorted by length before they are dealt to steps: more than 1 makes the records
    of a step alike, so that ranks finish together and rows are full; the order of the steps stays random."""
    weight_decay: float = 0.1
    """AdamW."""
    adam_beta2: float = 0.95
    """AdamW; beta1 is 0.9."""
    warmup_ratio: float = 0.05
    """Share of a stage's steps with linear warm-up; then cosine to 0."""
    max_grad_norm: float = 1.0
    """Gradient clipping; 0 is off."""
    gradient_checkpointing: bool | Literal["none", "full", "selective"] = "full"
    """What the backward computes again. ``full`` (true): every layer; ``none`` (false): nothing; ``selective``: all
    but attention and the projections that do not widen, for about five times the memory of ``full`` (attention by
    ``flex`` is compiled, and computed again)."""
    liger_kernels: bool | Literal["auto"] = False
    """RMSNorm, SwiGLU and (but for Qwen-VL) RoPE of the text model by the package liger-kernel, on CUDA; they change
    rounding alone. true: an error where they cannot run; ``auto``: the model's own there."""
    save_steps: int = 50
    """Checkpoint every so many optimizer steps, and at the end of each stage."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept while a stage runs."""
    keep_stage_states: bool = False
    """Keep the last checkpoint of each finished stage (weights and optimizer) beside its result."""
    async_save: bool = False
    """Write checkpoints in the background, from a copy in CPU memory: a step waits for the copy alone. A failed write
    stops the run at its next step, and the next save waits for the one before."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """Plain torch on one process, or DeepSpeed under torchrun."""
    zero_stage: Literal[0, 2, 3] = 0
    """DeepSpeed ZeRO stage."""
    offload_optimizer: bool = False
    """Under ZeRO-2 and -3: float32 weights and moments in CPU memory, updated there."""
    offload_parameters: bool = False
    """Under ZeRO-3: this rank's part of the weights in CPU memory too, until they are used."""
    deepspeed: str = ""
    """A DeepSpeed JSON file, or the name of a shipped one (zero2, zero3, zero3_offload): its buckets, thresholds and
    offloading take the place of ours. What this configuration decides (stage, batch, precision, clipping, optimizer)
    may stand there only with the same value."""
    attention: Literal["auto", "dense", "split", "flash", "flex"] = "auto"
    """Of packed trees. ``flex``: FlexAttention with a block mask, trains on CUDA alone; ``flash``: the flash-attn
    package; ``split``: prompt and branches apart, on torch's own kernels; ``dense``: the model's own attention with a
    mask of all tokens by all tokens, slow. ``auto`` takes the first of these that runs, never ``dense``."""
    trees: bool = True
    """One row per video for all its answers; false runs each answer as a row of its own (slow; same result)."""


@dataclass
class ReferenceConfig:
    mode: Literal["base", "previous_stage"] = "base"
    """``base``: one reference for all stages, one LoRA. ``previous_stage``: merge, refill, new LoRA (official)."""
    store: str = ""
    """Folder of the statistics; empty is <output_dir>/reference. Can be shared by runs."""
    kl: Literal["objective", "always"] = "objective"
    """Store what the exact KL needs only when the objective uses it, or always, so that the KL is logged."""
    keep: Literal["mean_embedding", "hidden"] = "mean_embedding"
    """What is stored for the exact KL. ``mean_embedding``: 4 bytes a token and hidden channel, nothing left to compute.
    ``hidden``: the reference's hidden states in the model's dtype, 2 bytes in bfloat16 and as exact; a step then runs
    the vocabulary head over the answers once more. (A mean in bfloat16 would put the gradient of a KL of 1e-3 off by
    7 %, and of smaller ones by more.)"""


@dataclass
class EvalConfig:
    r: list[int] = field(default_factory=lambda: [16, 8, 4, 2])
    """Difficulties of the pairwise probe."""
    max_videos: int = 0
    """Use at most this many held-out videos; 0 is all."""
    captions: bool = True
    """Also generate free captions and score objects and order."""
    stages: Literal["all", "ends"] = "all"
    """Evaluate after every stage, or only base, last stage, SFT and control."""
    bootstrap: int = 1000
    """Resamples over videos for the 95 % intervals."""


@dataclass
class ReportConfig:
    pairs: int = 2
    """Film strips per kind and r."""
    strip_frames: int = 24
    """Frames of a film strip."""


def check_engine(t: TrainConfig, dtype: str) -> None:
    """What trains must fit the engine; ``dtype`` of the model. Raises InputError naming the key."""
    require(t.engine == "deepspeed" or t.zero_stage == 0, "train.zero_stage", "0 without deepspeed", t.zero_stage)
    require(t.engine == "deepspeed" or not t.deepspeed, "train.deepspeed", "empty without deepspeed", t.deepspeed)
    require(
        t.zero_stage >= 2 or not t.offload_optimizer,
        "train.offload_optimizer", "false below zero_stage 2", t.offload_optimizer,
    )  # fmt: skip
    require(
        t.zero_stage == 3 or not t.offload_parameters,
        "train.offload_parameters", "false below zero_stage 3", t.offload_parameters,
    )  # fmt: skip
    require(t.tune == "full" or not t.tune_head, "train.tune_head", "false unless train.tune is full", t.tune_head)
    require(
        t.tune == "full" or not t.tune_vision, "train.tune_vision", "false unless train.tune is full", t.tune_vision
    )
    # below stage 2 DeepSpeed's engine updates the weights themselves
    plain = t.engine == "deepspeed" and t.zero_stage == 0 and dtype != "float32"
    require(
        t.tune == "lora" or not plain,
        "train.zero_stage", f"2 or 3 to train the whole model in {dtype} with deepspeed", t.zero_stage,
    )  # fmt: skip
