"""What is asked of a model, and what every engine offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tempo_fast.config import GenerationConfig


@dataclass(frozen=True)
class Request:
    """One question: ``plans`` are the videos (video.reader.FramePlan, in the order they are shown), before the text.

    ``max_new_tokens`` None takes the engine's own limit.
    """

    plans: Sequence[Any]
    prompt: str
    max_new_tokens: int | None = None


class Engine(Protocol):
    """Answers requests. The same engine, seed and requests give the same texts."""

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """One text per request, in order, without special tokens and outer white space. ``desc`` names a progress bar;
        empty shows none. Raises InputError when a video cannot be read or a server cannot be reached."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Everything that decides the texts, as plain JSON: engine, model digest, sampling parameters, seed."""
        ...


def request_identity(request: Request) -> list[Any]:
    """What decides a request's answer under one engine: pixels, words, length limit. Plain JSON."""
    return [[plan.key for plan in request.plans], request.prompt, request.max_new_tokens]


def sampling_provenance(config: GenerationConfig, seed: int) -> dict[str, Any]:
    """The sampling part of an engine's provenance; the seed only counts where something is drawn."""
    row: dict[str, Any] = {
        "temperature": config.temperature,
        "repetition_penalty": config.repetition_penalty,
        "max_new_tokens": config.max_new_tokens,
    }
    return {**row, "seed": seed} if config.temperature > 0 else row
