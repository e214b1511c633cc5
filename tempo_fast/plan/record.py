"""What a record holds: frames, their size, tokens; assumed from the video settings, or read from a file of pairs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.models.family import Grid, VideoGeometry
from tempo_fast.plan.shapes import Shape
from tempo_fast.video.sampling import sample_frames, smart_resize, video_max_pixels

log = logging.getLogger("tempo_fast")

SOURCE_FPS = 30.0
CHARACTERS_PER_TOKEN = 4.0
"""Assumed of English text where there is no tokenizer to count with."""
PROBED = 64
"""Videos of a file of pairs that are looked at."""
TIMESTAMP_TOKENS = 9
"""Of Qwen3-VL, before and behind each temporal patch: <, four digits and a point, " seconds", >, start and end."""


@dataclass(frozen=True)
class Record:
    """One record, by averages; sizes in pixels. ``longest`` is the visual tokens of the longest video seen."""

    frames: int
    height: int
    width: int
    grid: Grid
    visual: int
    words: int
    answers: int
    answer: float
    longest: int = 0

    @property
    def prompt(self) -> int:
        return self.visual + self.words

    @property
    def responses(self) -> int:
        return round(self.answers * self.answer)

    @property
    def tokens(self) -> int:
        """Of its tree: the prompt once and every answer."""
        return self.prompt + self.responses

    @property
    def patches(self) -> int:
        return self.grid.t * self.grid.h * self.grid.w

    @property
    def pairs(self) -> int:
        return max(1, self.answers - 1)

    def rows(self, trees: bool) -> int:
        """Tokens of the record as the model runs it: one tree, or a row for each answer."""
        return self.tokens if trees else self.answers * self.prompt + self.responses


@dataclass(frozen=True)
class Amount:
    """How much data there is: records (videos with their pairs) of each difficulty, and of SFT."""

    records: dict[int, int]
    sft: int
    known: bool
    """Counted in files, not said on the command line."""


def frames_of(config: VideoConfig, geometry: VideoGeometry, seconds: float, height: int, width: int) -> Record:
    """The video of a record without words: the family's own sampling rule and resize, as for a file at 30 fps.

    Raises:
        InputError: a video that the rules refuse.
    """
    rule = geometry.sampling if config.sampling == "auto" else config.sampling
    total = max(1, round(seconds * SOURCE_FPS))
    n = len(
        sample_frames(
            rule, total, SOURCE_FPS, fps=config.fps, min_frames=config.min_frames, max_frames=config.max_frames,
            temporal=geometry.temporal,
        )
    )  # fmt: skip
    return resized(config, geometry, n, height, width)


def resized(config: VideoConfig, geometry: VideoGeometry, n: int, height: int, width: int) -> Record:
    """``n`` frames of so many pixels as the model takes them. Raises InputError for a shape it refuses."""
    if geometry.side:
        h = w = geometry.side
    else:
        try:
            h, w = smart_resize(
                height, width, factor=geometry.factor, min_pixels=config.min_pixels,
                max_pixels=video_max_pixels(config, n, geometry),
            )  # fmt: skip
        except ValueError as e:
            raise InputError(f"--size: {e}") from e
    grid = geometry.grid(n, h, w)
    return Record(n, h, w, grid, geometry.tokens(grid), 0, 1, 0.0)


def with_words(record: Record, shape: Shape, words: int, answers: int, answer: float) -> Record:
    """The record with its prompt's words and its answers."""
    extra = TIMESTAMP_TOKENS * record.grid.t if shape.family.name == "qwen3_vl" else 0
    return replace(record, words=words + extra, answers=answers, answer=answer)


def from_pairs(
    path: Path, rs: Sequence[int], config: VideoConfig, shape: Shape, count: Any = None
) -> tuple[Record, dict[int, int]]:
    """The average record of a file of pairs, and how many there are of each r.

    Args:
        path: a file in any format that ``pairs convert`` reads, which then stands for every stage, or a folder with
            ``r<r>.jsonl`` of each.
        count: text to its number of tokens; None takes a quarter of its characters.

    Raises:
        InputError: nothing to read there.
    """
    from tempo_fast.pairs.formats import iter_pairs

    files = {r: path / f"r{r}.jsonl" for r in rs} if path.is_dir() else dict.fromkeys(rs, path)
    tokens = count or (lambda text: len(text) / CHARACTERS_PER_TOKEN)
    amounts: dict[int, int] = {}
    videos: dict[str, None] = {}
    words = answers = answer = n = 0.0
    done: dict[Path, int] = {}
    for r, file in files.items():
        if file not in done:
            done[file] = 0
            for record in iter_pairs(file, r=r):
                done[file] += 1
                videos.setdefault(record.video)
                texts = [record.chosen, *(x.text for x in record.rejected)]
                n, words, answers = n + 1, words + tokens(record.prompt), answers + len(texts)
                answer += sum(tokens(text) + 1 for text in texts)
        amounts[r] = done[file]
    video = _video_of([v for v in videos if v], config, shape.geometry, path)
    made = with_words(video, shape, round(words / n) + 20, max(2, round(answers / n)), answer / max(1.0, answers))
    return made, amounts


def _video_of(videos: Sequence[str], config: VideoConfig, geometry: VideoGeometry, path: Path) -> Record:
    """The video of median tokens among some of the files; says so where none can be read."""
    from tempo_fast.video.probe import probe

    step = max(1, len(videos) // PROBED)
    found: list[Record] = []
    for name in videos[::step][:PROBED]:
        try:
            info = probe(name)
            found.append(frames_of(config, geometry, info.duration_s, info.height, info.width))
        except (InputError, OSError):
            continue
    if not found:
        raise InputError(
            f"{path}: none of its videos can be read here; leave --pairs out and give --records, --seconds and --size"
        )
    found.sort(key=lambda r: r.visual)
    return replace(found[len(found) // 2], longest=found[-1].visual)
