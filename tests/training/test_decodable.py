"""Which videos decode: found out once, by worker threads where there are any; running out of time is no verdict."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_fast.config import LoaderConfig
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.decodable import DecodeCheck
from tempo_fast.video.container import DecodeError, DecodeTimeout
from tempo_fast.video.loader import WORKER


@dataclass(frozen=True)
class Plan:
    key: str

    @property
    def path(self) -> str:
        return f"{self.key}.mp4"


class Source:
    """Decodes all but "broken"; "late" has not enough time until there is ``time``."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.time = False

    def pixels(self, plan: Plan) -> torch.Tensor:
        self.asked.append(plan.key)
        self.threads.add(threading.current_thread().name)
        if plan.key == "broken":
            raise DecodeError("broken.mp4: is damaged")
        if plan.key == "late" and not self.time:
            raise DecodeTimeout("late.mp4: took longer than 1 s")
        return torch.zeros(1)


PLANS = [Plan(key) for key in ("good", "broken", "late", "kept", "good")]


def failures(journal: Path, source: Source, loader: LoaderConfig | None) -> dict[str, Any]:
    check = DecodeCheck(journal, source, Ranks(), decoded=lambda key: key == "kept", loader=loader)
    return check.failures(PLANS, lambda: None)


@pytest.mark.parametrize("workers", [None, 0, 1, 3])
def test_what_cannot_be_decoded_is_named_and_remembered(tmp_path: Path, workers: int | None) -> None:
    loader = None if workers is None else LoaderConfig(workers=workers, ahead=2)
    source, journal = Source(), tmp_path / "decoded.jsonl"
    found = failures(journal, source, loader)
    assert found["broken"] == {"video": "broken.mp4", "reason": "broken.mp4: is damaged"}
    assert "took longer" in found["late"]["reason"] and set(found) == {"broken", "late"}
    assert sorted(source.asked) == ["broken", "good", "late"]  # each once, and not what has been decoded before
    assert (WORKER in source.threads) == bool(workers)
    assert {json.loads(line)["plan"] for line in journal.read_text().splitlines()} == {"good", "broken", "kept"}


def test_a_video_that_was_too_slow_is_tried_again(tmp_path: Path) -> None:
    source, journal = Source(), tmp_path / "decoded.jsonl"
    assert "late" in failures(journal, source, None)
    source.time = True
    source.asked.clear()
    assert set(failures(journal, source, None)) == {"broken"} and source.asked == ["late"]
    source.asked.clear()
    assert set(failures(journal, source, None)) == {"broken"} and source.asked == []
