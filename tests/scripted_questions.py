"""A scripted world for questions: videos without files, and an engine whose answers a test decides."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tempo_fast.config import PairsConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation import Request, request_identity
from tempo_fast.pairs.method import Context, Item
from tempo_fast.pairs.prompts import PromptPool
from tempo_fast.schema import QARecord
from tempo_fast.video.augment import Augmentation, draw_augmentation

WORDS = "a red blue green circle ring square moves grows left right then appears and the vanishes".split()


@dataclass(frozen=True)
class Plan:
    video: str
    indices: tuple[int, ...]
    augment: Augmentation | None = None

    @property
    def key(self) -> str:
        return digest([self.video, self.indices, self.augment])


class QuestionReader:
    """Eight sampled frames a video, of 90 x 160 pixels."""

    settings: Sequence[Any] = ()

    def plan(self, path: str) -> Plan:
        if "gone" in path:
            raise InputError(f"{path}: no such file")
        return Plan(path, tuple(range(0, 80, 10)))

    def plan_sparse(self, path: str, n_frames: int, augment_seed: int | None = None) -> Plan:
        whole = self.plan(path).indices
        shown = (whole[0],) if n_frames == 1 else (whole[0], whole[-1])
        return Plan(path, shown, None if augment_seed is None else draw_augmentation(augment_seed, 90, 160))


class Talker:
    """Answers by ``say(request)``; without one, some words that the request and the seed decide."""

    def __init__(self, say: Callable[[Request], str] | None = None, seed: int = 0) -> None:
        self._say, self.seed = say, seed
        self.asked: list[Request] = []

    def provenance(self) -> dict[str, Any]:
        return {"engine": "talker", "seed": self.seed}

    def generate(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        self.asked += requests
        for r in requests:
            if any("broken" in plan.video for plan in r.plans):
                raise InputError(f"{r.plans[0].video}: cannot be decoded")
        return [self._say(r) if self._say else self._words(r) for r in requests]

    def _words(self, r: Request) -> str:
        rng = random.Random(digest([self.seed, request_identity(r)]))
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 9))).capitalize() + "."


def reference(video: str, number: int) -> str:
    rng = random.Random(f"{video} {number}")
    return f"Here {' '.join(rng.choices(WORDS, k=6))} is told."


def items(*videos: str, questions: int = 1, **how: Any) -> list[Item]:
    """Videos of so many questions each, ids "<video>#<number>"."""
    return [
        Item(
            v,
            digest(["content", v]),
            questions=tuple(
                QARecord(f"{v}#{k}", v, f"What happens in part {k}?", reference(v, k), **how)
                for k in range(questions)
            ),
        )
        for v in videos
    ]


def context(config: PairsConfig, engine: Talker | None = None, **how: Any) -> Context:
    """What a method works with, asking ``engine`` directly."""
    engine = engine or Talker()
    made = Context(
        lambda requests, desc: engine.generate(requests, desc), None, QuestionReader(), config, 0, PromptPool(),
        {"engine": engine.provenance()},
    )  # fmt: skip
    return replace(made, **how)
