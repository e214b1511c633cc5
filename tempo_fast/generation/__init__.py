"""Answer engines: who captions clips and videos. One interface, three ways behind it."""

from __future__ import annotations

from typing import Any

from tempo_fast.config import GenerationConfig, JudgeConfig
from tempo_fast.generation.base import Engine, RefusedRequest, Request, request_identity
from tempo_fast.generation.cache import AnswerCache

__all__ = ["AnswerCache", "Engine", "RefusedRequest", "Request", "make_engine", "make_judge", "request_identity"]


def make_engine(config: GenerationConfig, bundle: Any, reader: Any, features: Any, seed: int) -> Engine:
    """The engine that ``generation.engine`` names.

    Args:
        config: engine, sampling parameters, longest answer.
        bundle: models.load.Bundle; may be None for ``openai``, and without weights for ``vllm``.
        reader: video.reader.VideoReader.
        features: trees.vision.FeatureCache, used by the transformers engine; None makes a private one.
        seed: of every sampled answer; without effect at temperature 0.

    Raises:
        InputError: the engine's package is missing, or its endpoint cannot be reached.
    """
    if config.engine == "transformers":
        from tempo_fast.generation.transformers_engine import TransformersEngine

        return TransformersEngine(config, bundle, reader, features, seed)
    if config.engine == "vllm":
        from tempo_fast.generation.vllm_engine import VLLMEngine

        return VLLMEngine(config, bundle, reader, seed)
    from tempo_fast.generation.openai_engine import OpenAIEngine

    return OpenAIEngine(config, reader, seed)


def make_judge(config: JudgeConfig, seed: int) -> Engine | None:
    """The judge model: greedy, text alone, behind its endpoint; None where there is no endpoint.

    Raises:
        InputError: the endpoint cannot be reached, or does not serve ``model``.
    """
    if not config.endpoint:
        return None
    from tempo_fast.generation.openai_engine import OpenAIEngine

    settings = GenerationConfig(
        engine="openai",
        endpoint=config.endpoint,
        model=config.model,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
    )
    return OpenAIEngine(settings, None, seed)
