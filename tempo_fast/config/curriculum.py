"""The stages of training: preference stages in order, when they advance, and where SFT stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tempo_fast.config.check import require


@dataclass
class ObjectiveConfig:
    name: str = "dpo"
    """One of tempo_kernels.objectives: dpo, cdpo, robust, ipo, hinge, simpo, leanpo, rrpo, ..."""
    options: dict[str, float] = field(default_factory=lambda: {"beta": 0.1, "sft_weight": 1.0})
    """The objective's own options, as its docstring names them."""


@dataclass
class StageObjectiveConfig:
    name: str = ""
    """Loss of this stage; empty takes train.objective's."""
    options: dict[str, float] = field(default_factory=dict)
    """Its options; those of the same objective in train.objective stand where they are not named."""


@dataclass
class StageConfig:
    r: int | list[int] = 16
    """Difficulty of the pairs of this stage; several are mixed."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of its pairs; empty takes all."""
    mix: list[float] = field(default_factory=list)
    """Weight of each r in the stage's pairs: as many as there are, in these proportions and each once, are drawn by the
    seed. Empty takes all pairs."""
    replay: float = 0.0
    """Share of the stage's pairs that are drawn from easier difficulties of earlier stages, in [0, 1)."""
    epochs: int = 1
    """Passes over the pairs."""
    max_steps: int = 0
    """At most so many optimizer steps; 0 is all."""
    learning_rate: float = 0.0
    """Peak; 0 takes train.learning_rate."""
    objective: StageObjectiveConfig = field(default_factory=StageObjectiveConfig)
    """Loss of this stage where it is not train.objective."""
    reference: Literal["", "base", "previous_stage"] = ""
    """Where the stage starts, as reference.mode, which empty takes: ``base`` goes on with the adapter and the reference
    of the stage before, ``previous_stage`` merges them into the model that becomes both."""

    @property
    def rs(self) -> list[int]:
        """The difficulties as a list."""
        return [self.r] if isinstance(self.r, int) else list(self.r)


@dataclass
class AdaptiveConfig:
    every: int = 0
    """Preference steps between looks at held-out pairs, which decide when a stage ends; 0 is off: stages run for their
    epochs."""
    threshold: float = 0.95
    """A stage ends when the policy prefers the chosen answer in so large a share of held-out pairs."""
    patience: int = 3
    """A stage ends when so many looks in a row have not raised its best share; 0 never does."""
    holdout: float = 0.05
    """Share of the videos that are held out in all stages, by the digest of what is read of them."""
    max_records: int = 256
    """Held-out records that a look scores, those of the smallest digests; 0 is all."""
    max_steps: int = 0
    """Preference steps of all stages together: a stage gets its even share of what the stages before it have left;
    0 is as many as the epochs make."""


@dataclass
class SFTConfig:
    when: Literal["after", "before", "interleaved"] = "after"
    """``after`` the preference stages on their merged model; ``before`` them, which then start from the merged SFT
    model and, with ``reference: base``, have it for their reference; ``interleaved``: SFT batches between preference
    steps, with the stage's adapter and optimizer."""
    ratio: float = 0.25
    """With ``interleaved``: SFT steps per preference step, until data.sft was seen ``epochs`` times."""
    epochs: int = 1
    """Passes over data.sft; 0 skips the stage."""
    learning_rate: float = 1e-4
    """Peak."""
    alpha: int = 32
    """LoRA alpha of the SFT adapter; not with ``interleaved``, which has the stage's."""
    batch_size: int = 16
    """Records per optimizer step."""
    vision_lora: bool = True
    """Adapters on the vision tower too; not with ``interleaved``."""
    max_steps: int = 0
    """Stop after this many steps; 0 is all."""
    control: bool = True
    """Also run SFT alone from the base model, on the same data, as the control of the evaluation (``before`` the
    preference stages, SFT is its own)."""


def default_stages() -> list[StageConfig]:
    """r = 16, 8, 4, 2: easy to hard."""
    return [StageConfig(r=r) for r in (16, 8, 4, 2)]


def objective_of(stage: StageConfig, common: ObjectiveConfig) -> ObjectiveConfig:
    """The loss of a stage, its options on top of those of the same objective in ``common``."""
    name = stage.objective.name or common.name
    options = common.options if name == common.name else {}
    return dataclasses.replace(common, name=name, options={**options, **stage.objective.options})


def needed_r(stages: Sequence[StageConfig]) -> list[int]:
    """The difficulties whose pairs the stages read, each once, in the order of their first use."""
    return list(dict.fromkeys(r for stage in stages for r in stage.rs))


def easier_before(stages: Sequence[StageConfig], index: int) -> list[tuple[int, tuple[str, ...]]]:
    """(r, kinds; empty: all) of earlier stages with r easier than all of a stage's: what it replays, easiest first."""
    easiest = max(stages[index].rs)
    found: dict[int, tuple[str, ...]] = {}
    for s in stages[:index]:
        for r in (r for r in s.rs if r > easiest):
            together = sorted({*s.kinds, *found.get(r, s.kinds)})
            found[r] = tuple(together) if s.kinds and found.get(r, s.kinds) else ()
    return sorted(found.items(), reverse=True)


def check_curriculum(
    stages: Sequence[StageConfig],
    adaptive: AdaptiveConfig,
    sft: SFTConfig,
    made_r: Sequence[int],
    made_kinds: Sequence[str] | None,
) -> None:
    """Stages against the pairs that there are: ``made_r`` and, where they are known, ``made_kinds``.

    Raises:
        InputError: naming the key.
    """
    for i, s in enumerate(stages):
        key = f"train.stages[{i}]"
        require(bool(s.rs), f"{key}.r", "one r or several", s.r)
        require(len(set(s.rs)) == len(s.rs), f"{key}.r", "each r once", s.r)
        for r in s.rs:
            require(r in made_r, f"{key}.r", f"one of pairs.r {list(made_r)}", r)
        require(len(set(s.kinds)) == len(s.kinds), f"{key}.kinds", "each kind once", s.kinds)
        for kind in s.kinds:
            known = made_kinds is None or kind in made_kinds
            require(known, f"{key}.kinds", f"of pairs.kinds {list(made_kinds or [])}", kind)
        require(not s.mix or len(s.mix) == len(s.rs), f"{key}.mix", f"one weight for each of r {s.rs}", s.mix)
        require(all(w > 0 for w in s.mix), f"{key}.mix", "above 0", s.mix)
        require(0 <= s.replay < 1, f"{key}.replay", "in [0, 1)", s.replay)
        if s.replay:
            easier = easier_before(stages, i)
            require(bool(easier), f"{key}.replay", f"0 where no earlier stage has an r above {max(s.rs)}", s.replay)
        require(s.epochs >= 1, f"{key}.epochs", ">= 1", s.epochs)
        require(s.max_steps >= 0, f"{key}.max_steps", "0 or more", s.max_steps)
        require(s.learning_rate >= 0, f"{key}.learning_rate", "0 or more", s.learning_rate)
    a = adaptive
    for name in ("every", "patience", "max_records", "max_steps"):
        require(getattr(a, name) >= 0, f"train.adaptive.{name}", "0 or more", getattr(a, name))
    require(0 < a.threshold, "train.adaptive.threshold", "above 0 (above 1 is never reached)", a.threshold)
    require(0 < a.holdout < 1, "train.adaptive.holdout", "in (0, 1)", a.holdout)
    require(not a.max_steps or a.max_steps >= len(stages), "train.adaptive.max_steps", "a step a stage", a.max_steps)
    require(sft.ratio > 0, "train.sft.ratio", "above 0", sft.ratio)
    require(sft.when != "interleaved" or bool(stages), "train.sft.when", "after or before without stages", sft.when)
