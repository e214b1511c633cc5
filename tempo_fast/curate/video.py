"""One video to its clips."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tempo_fast.config import CurateConfig
from tempo_fast.curate import shots as rules
from tempo_fast.curate.embed import make_embedder
from tempo_fast.curate.grouping import group_problem, group_shots, runs
from tempo_fast.curate.keyframes import keyframes, sharpness, windows
from tempo_fast.curate.shots import Range
from tempo_fast.errors import InputError
from tempo_fast.schema import Clip, Clips
from tempo_fast.video.decode import Decoder, decoder_for, open_decoder
from tempo_fast.video.decode_pyav import PyAVDecoder, Scale
from tempo_fast.video.preprocess import resize
from tempo_fast.video.probe import VideoInfo, probe

_CHUNK = 32


class Unusable(InputError):
    """A video that can be read but that the method cannot use; ``reason`` says why, without the path."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


def curate_video(path: str | os.PathLike[str], config: CurateConfig, reader_backend: str | Decoder = "auto") -> Clips:
    """Find shots, group those that look alike, and cut the video into clips (TEMPLE's data engine).

    Frames are decoded once, in order and small, to find the shots, and no further than to a shot that makes the video
    unusable. Of usable shots the middle frames are decoded in full size, and on the way (decoding is what costs) the
    sharpness of the frames around their thirds is taken; those around the thirds of clips of several shots follow when
    the clips are known.

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
    found, blank = _find_shots(info, decoder, times, config)
    shots = [s for s in rules.long_enough(found, times, config) if not blank(*s)]
    problem = rules.shot_problem(shots, len(found), times, config)
    if problem:
        raise Unusable(info.path, problem)
    pictures: dict[int, np.ndarray] = {}
    sharp: dict[int, float] = {}
    middles, near = {rules.middle(*s) for s in shots}, {i for s in shots for window in windows(*s) for i in window}
    for i, frame in frames_of(decoder, info, sorted(middles | near)):
        if i in middles:
            pictures[i] = frame
        if i in near:
            sharp[i] = sharpness(frame)
    embeddings = make_embedder(config).embed([pictures[rules.middle(*s)] for s in shots])
    pictures.clear()
    groups = group_shots(embeddings @ embeddings.T, config.group_similarity)
    spans = [(shots[first][0], shots[last - 1][1], groups[first]) for first, last in runs(groups)]
    problem = group_problem([group for *_, group in spans], config.min_clips, config.max_group_runs)
    if problem:
        raise Unusable(info.path, problem)
    near = {i for start, end, _ in spans for window in windows(start, end) for i in window} - sharp.keys()
    sharp |= {i: sharpness(frame) for i, frame in frames_of(decoder, info, sorted(near))}
    clips = [
        Clip(
            start_frame=start,
            end_frame=end,
            start_s=round(times[start], 6),
            end_s=round(times[end], 6),
            group=group,
            keyframes=keyframes(start, end, sharp),
        )
        for start, end, group in spans
    ]
    return Clips(
        video=info.path,
        digest=info.digest,
        n_frames=info.n_frames,
        duration_s=round(info.duration_s, 6),
        shots=[list(s) for s in shots],
        shot_groups=groups,
        clips=clips,
    )


def frames_of(
    decoder: Decoder, info: VideoInfo, ascending: Sequence[int], scale: Scale | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (frame number, uint8 [H, W, 3]) for ascending numbers, few in memory at a time; of the size of ``scale``
    where it is given (decoders that cannot scale give their frames to torch's bicubic filter)."""
    if not ascending:
        return
    if isinstance(decoder, PyAVDecoder):
        yield from decoder.iterate(info, ascending, scale=scale)
        return
    for at in range(0, len(ascending), _CHUNK):
        some = ascending[at : at + _CHUNK]
        frames = decoder.decode(info.path, some)
        if scale is not None:
            frames = resize(frames, scale.height, scale.width)
        yield from zip(some, frames.cpu().numpy(), strict=True)


def _find_shots(
    info: VideoInfo, decoder: Decoder, times: Sequence[float], config: CurateConfig
) -> tuple[list[Range], Callable[[int, int], bool]]:
    """One pass over the frames, small: the shots, and a function of a shot that says whether it is blank
    (``scene_detect``: its grey levels, over all its frames, lie closer together than ``min_contrast``).

    A scaled picture averages the frame, so that it varies no more than the frame does (bicubic: little more). A shot
    whose small pictures vary by twice the limit is not blank; others are looked at in full size, until one is not.

    Raises:
        Unusable: as soon as a shot that is not blank is too long, where the detector tells shots as they begin.
    """
    detector = rules.make_detector(config, info.fps)
    scale = detector.scale(info.height, info.width)
    sure = config.min_contrast * (1 if scale is None else 2)
    low, high = np.empty(info.n_frames, np.uint8), np.empty(info.n_frames, np.uint8)

    def varies(start: int, end: int) -> int:
        return int(high[start:end].max()) - int(low[start:end].min())

    for i, frame in frames_of(decoder, info, range(info.n_frames), scale):
        begun = detector.feed(frame)
        low[i], high[i] = rules.grey_range(frame)
        if begun is not None and rules.too_long(begun, i + 1, times, config) and varies(begun, i + 1) >= sure:
            raise Unusable(info.path, rules.TOO_LONG.format(config.max_shot_s))

    def blank(start: int, end: int) -> bool:
        if scale is None or varies(start, end) >= sure:
            return varies(start, end) < config.min_contrast
        least, most = 255, 0
        for _, frame in frames_of(decoder, info, range(start, end)):
            darkest, lightest = rules.grey_range(frame)
            least, most = min(least, darkest), max(most, lightest)
            if most - least >= config.min_contrast:
                return False
        return True

    return detector.shots(), blank
