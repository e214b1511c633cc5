"""What is asked of a model, and what every engine offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tempo_fast.config import GenerationConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest


@dataclass(frozen=True)
class Request:
    """One question: ``plans`` are the videos (video.reader.FramePlan, in the order they are shown), before the text of
    the first user turn; ``prompt`` is the last user turn, which is answered.

    ``max_new_tokens``, ``temperature`` and ``top_p`` None take the engine's own, so that greedy captions and sampled
    answers can run in one batch. Temperature 0 is greedy; ``top_p`` in (0, 1] has no say there. ``turns`` are earlier
    (user, assistant) turns. ``sample`` numbers several samples of one question: it enters seed and identity.
    """

    plans: Sequence[Any]
    prompt: str
    max_new_tokens: int | None = None
    turns: Sequence[tuple[str, str]] = ()
    sample: int = 0
    temperature: float | None = None
    top_p: float | None = None


class Sampling(NamedTuple):
    """How one request is answered, its own settings before the engine's. ``seed`` [0, 2^60) is its own; an answer at
    temperature 0 does not depend on it."""

    temperature: float
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int


class RefusedRequest(InputError):
    """Requests that are refused for what they are, such as a prompt longer than the model takes; all others that were
    asked with them are answered.

    Attributes:
        reasons: why, by index among the requests that were asked.
        texts: one per request that was asked, "" where it is refused.
    """

    def __init__(self, reasons: Mapping[int, str], texts: Sequence[str]) -> None:
        super().__init__(reasons[min(reasons)])
        self.reasons, self.texts = dict(reasons), list(texts)


class Engine(Protocol):
    """Answers requests. The same engine, seed and requests give the same texts."""

    seed: int
    """Of every sampled answer."""

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """One text per request, in order, without special tokens and outer white space. ``desc`` names a progress bar;
        empty shows none. Raises InputError when a video cannot be read or a server cannot be reached, RefusedRequest
        when nothing else is wrong."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Everything that decides the texts, as plain JSON: engine, model digest, sampling parameters, seed."""
        ...


def request_identity(request: Request) -> list[Any]:
    """What decides a request's answer under one engine: pixels, words, length limit, and what it sets itself. Plain
    JSON."""
    own: dict[str, Any] = {}
    if request.turns:
        own["turns"] = [list(turn) for turn in request.turns]
    if request.sample:
        own["sample"] = request.sample
    if request.temperature is not None:
        own["temperature"] = request.temperature
    if request.top_p is not None:
        own["top_p"] = request.top_p
    row: list[Any] = [[plan.key for plan in request.plans], request.prompt, request.max_new_tokens]
    return [*row, own] if own else row


def sampling_of(config: GenerationConfig, seed: int, request: Request) -> Sampling:
    """The settings of one request under an engine's configuration and seed."""
    return Sampling(
        temperature=config.temperature if request.temperature is None else request.temperature,
        top_p=config.top_p if request.top_p is None else request.top_p,
        repetition_penalty=config.repetition_penalty,
        max_new_tokens=request.max_new_tokens or config.max_new_tokens,
        seed=int(digest([seed, request_identity(request)])[:15], 16),
    )


def sampling_provenance(config: GenerationConfig, seed: int) -> dict[str, Any]:
    """The sampling part of an engine's provenance; what only counts where something is drawn stands only there."""
    row: dict[str, Any] = {
        "temperature": config.temperature,
        "repetition_penalty": config.repetition_penalty,
        "max_new_tokens": config.max_new_tokens,
    }
    if config.temperature > 0:
        row["seed"] = seed
        if config.top_p != 1:
            row["top_p"] = config.top_p
    return row
