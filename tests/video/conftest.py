"""Counter clips (see ``counter_clips``) for every test of the room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import counter_clips
import pytest


@pytest.fixture(scope="session")
def counter() -> Any:
    """Writing and reading counter clips."""

    class Counter:
        write = staticmethod(counter_clips.write_counter)
        read = staticmethod(counter_clips.read_counter)
        frame = staticmethod(counter_clips.counter_frame)

    return Counter


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of H.264 at 30 fps with B-frames, a keyframe every 12."""
    return counter_clips.write_counter(tmp_path_factory.mktemp("plain") / "plain.mp4", bframes=2)


@pytest.fixture(scope="session")
def geometry() -> Any:
    from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry

    return VideoGeometry(14, 2, 2, CLIP_MEAN, CLIP_STD)
