"""The configuration of a run: nested dataclasses, one docstring per field, validated before any work.

A recipe is the YAML form of ``RunConfig``; every key can be overridden on the command line with its dotted name.
"""

from __future__ import annotations

from tempo_fast.config.curriculum import (
    AdaptiveConfig,
    ObjectiveConfig,
    SFTConfig,
    StageConfig,
    StageObjectiveConfig,
)
from tempo_fast.config.data import (
    CurateConfig,
    DataConfig,
    FeaturesConfig,
    LoaderConfig,
    ModelConfig,
    RayConfig,
    TinyworldConfig,
    VideoConfig,
)
from tempo_fast.config.pairs import (
    GenerationConfig,
    JudgeConfig,
    LeanPOPairsConfig,
    MDPOPairsConfig,
    PairsConfig,
    RRPOPairsConfig,
    SelectConfig,
)
from tempo_fast.config.run import RunConfig
from tempo_fast.config.training import EvalConfig, LoraConfig, ReferenceConfig, ReportConfig, TrainConfig

__all__ = [
    "AdaptiveConfig",
    "CurateConfig",
    "DataConfig",
    "EvalConfig",
    "FeaturesConfig",
    "GenerationConfig",
    "JudgeConfig",
    "LeanPOPairsConfig",
    "LoaderConfig",
    "LoraConfig",
    "MDPOPairsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "PairsConfig",
    "RRPOPairsConfig",
    "RayConfig",
    "ReferenceConfig",
    "ReportConfig",
    "RunConfig",
    "SFTConfig",
    "SelectConfig",
    "StageConfig",
    "StageObjectiveConfig",
    "TinyworldConfig",
    "TrainConfig",
    "VideoConfig",
]
