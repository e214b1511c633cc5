"""A curriculum on the random tiny model, with records and videos that need no file."""

import json
from pathlib import Path

from tempo_fast.config import EvalConfig, LoraConfig, RunConfig, StageConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.schema import PreferenceRecord, Rejected, SFTRecord
from tempo_fast.training.curriculum import Curriculum
from tempo_fast.training.decodable import DecodeCheck
from tempo_fast.training.loop import Context
from tempo_fast.trees.vision import FeatureCache

CHOSEN = ["A red circle moves left. It appears at last.", "Then a blue square grows.", "A green triangle moves right."]


def told(i: int) -> str:
    return CHOSEN[i] if i < len(CHOSEN) else f"{CHOSEN[i % 3]} It appears {i}."


def records(r: int, videos: int = 3) -> list[PreferenceRecord]:
    """One per video: a shuffled and a dropped answer."""
    return [
        PreferenceRecord(
            id=f"v{i}-r{r}",
            video=f"v{i}",
            prompt="Describe.",
            chosen=told(i),
            rejected=[Rejected(f"It moves {r} right.", "shuffle", r), Rejected(f"A circle {i} {r}.", "drop", r)],
            r=r,
        )
        for i in range(videos)
    ]


class Reader:
    """Plans without files on top of the shared fake reader."""

    def __init__(self, inner, plan_type, missing: tuple[str, ...] = ()) -> None:
        self.inner, self.plan_type, self.missing = inner, plan_type, missing

    def plan(self, video: str):
        if video in self.missing:
            raise InputError(f"{video}: cannot be read")
        return self.plan_type(video, 4)

    def pixels(self, plan):
        return self.inner.pixels(plan)


class Never:
    def check(self) -> None:
        return None


class After(Never):
    def __init__(self, looks: int) -> None:
        self.left = looks

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stopped", 75)


def curriculum(
    tmp_path: Path, tiny_path: str, reader, plan_type, *, stopper=None, missing=(), sft=True, videos=3, **changes
):
    config = RunConfig(output_dir=str(tmp_path), eval=EvalConfig())
    config.model.path, config.model.dtype, config.model.device = tiny_path, "float32", "cpu"
    config.reference.kl = "always"
    t = config.train
    t.stages = [StageConfig(r=4, learning_rate=2e-3), StageConfig(r=2)]
    t.lora = LoraConfig(r=4, alpha=8, dropout=0.0)
    t.batch_size, t.learning_rate, t.gradient_checkpointing, t.save_steps = 2, 1e-3, False, 1
    t.sft.batch_size = 2
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    source = Reader(reader, plan_type, missing)
    checked = DecodeCheck(tmp_path / "train" / "decoded.jsonl", source, Ranks())
    ctx = Context(config.train, 0, tmp_path / "train", source, FeatureCache(), Ranks(), stopper or Never(), checked)
    exchanges = [SFTRecord(f"s{i}", f"v{i}", "What happened?", told(i)) for i in range(videos)] if sft else None
    return Curriculum(config, ctx, lambda r: records(r, videos), exchanges)


def rows_of(tmp_path: Path, stage: str) -> list[dict]:
    """The metrics of a stage."""
    return [json.loads(line) for line in (tmp_path / "train" / stage / "metrics.jsonl").read_text().splitlines()]


def first_row(tmp_path: Path, stage: str) -> dict:
    return rows_of(tmp_path, stage)[0]
