"""One video to its clips."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from tempo_fast.config import CurateConfig
from tempo_fast.curate.embed import make_embedder
from tempo_fast.curate.grouping import group_problem, group_shots, runs
from tempo_fast.curate.keyframes import keyframes, sharpness
from tempo_fast.curate.shots import Range, clean_shots, make_detector, middle
from tempo_fast.errors import InputError
from tempo_fast.schema import Clip, Clips
from tempo_fast.video.decode import Decoder, decoder_for, open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder
from tempo_fast.video.probe import VideoInfo, probe

_CHUNK = 32


class Unusable(InputError):
    """A video that can be read but that the method cannot use; ``reason`` says why, without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def curate_video(path: str | os.PathLike[str], config: CurateConfig, reader_backend: str | Decoder = "auto") -> Clips:
    """Find shots, group those that look alike, and cut the video into clips (TEMPLE's data engine).

    Every frame is decoded once, in order; then the middle frames of the shots that are left. No frame is kept.

    Args:
        path: the video.
        config: thresholds; also which detector and embedder.
        reader_backend: decoder, or its name.

    Raises:
        Unusable: too few or too many shots or clips, a shot too long, a scene that comes back too often.
        InputError: the file cannot be read (DecodeError), or a package or checkpoint is missing.
    """
    info = probe(path)
    decoder = open_decoder(reader_backend) if isinstance(reader_backend, str) else reader_backend
    decoder = decoder_for(decoder, info)
    times = [*info.pts_s, info.duration_s]
    found, contrast, scores = _survey(info, decoder, config)
    shots = clean_shots(found, times, contrast, config)
    problem = _shot_problem(shots, len(found), times, config)
    if problem:
        raise Unusable(info.path, problem)

    embeddings = make_embedder(config).embed([f for _, f in frames_of(decoder, info, [middle(*s) for s in shots])])
    groups = group_shots(embeddings @ embeddings.T, config.group_similarity)
    clips = []
    for first, last in runs(groups):
        start, end = shots[first][0], shots[last - 1][1]
        clips.append(
            Clip(
                start_frame=start,
                end_frame=end,
                start_s=round(times[start], 6),
                end_s=round(times[end], 6),
                group=groups[first],
                keyframes=keyframes(start, end, scores),
            )
        )
    problem = group_problem([c.group for c in clips], config.min_clips, config.max_group_runs)
    if problem:
        raise Unusable(info.path, problem)
    return Clips(
        video=info.path,
        digest=info.digest,
        n_frames=info.n_frames,
        duration_s=round(info.duration_s, 6),
        shots=[list(s) for s in shots],
        shot_groups=groups,
        clips=clips,
    )


def frames_of(decoder: Decoder, info: VideoInfo, ascending: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame number, uint8 [H, W, 3]) for ascending numbers, few in memory at a time."""
    if isinstance(decoder, PyAVDecoder):
        yield from decoder.iterate(info, ascending)
        return
    for at in range(0, len(ascending), _CHUNK):
        some = ascending[at : at + _CHUNK]
        yield from zip(some, decoder.decode(info.path, some).cpu().numpy(), strict=True)


def _survey(info: VideoInfo, decoder: Decoder, config: CurateConfig) -> tuple[list[Range], list[float], list[float]]:
    """One pass over all frames: (shots, grey contrast per frame, sharpness per frame)."""
    import cv2

    detector = make_detector(config, info.fps)
    contrast, scores = [], []
    for _, frame in frames_of(decoder, info, range(info.n_frames)):
        detector.feed(frame)
        grey = cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        low, high, _, _ = cv2.minMaxLoc(grey)
        contrast.append(high - low)
        scores.append(sharpness(grey))
    return detector.shots(), contrast, scores


def _shot_problem(shots: Sequence[Range], n_found: int, times: Sequence[float], config: CurateConfig) -> str:
    n = len(shots)
    dropped = f" ({n_found - n} too short or blank)" if n_found > n else ""
    what = f"{n} shot{'' if n == 1 else 's'}{dropped}"
    if n < config.min_shots:
        return f"{what}, fewer than curate.min_shots {config.min_shots}"
    if n > config.max_shots:
        return f"{what}, more than curate.max_shots {config.max_shots}"
    longest = max(times[e] - times[s] for s, e in shots)
    if longest > config.max_shot_s:
        return f"a shot of {longest:.1f} s, longer than curate.max_shot_s {config.max_shot_s:g}"
    return ""
