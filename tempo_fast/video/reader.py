"""From a file and frame numbers to the patches a model takes, by way of a plan that costs no decoding.

Shapes: F frames, P patches, C channels, tp and p temporal and spatial patch size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.models.family import Grid, Timing, VideoGeometry
from tempo_fast.video.augment import Augmentation, augment, draw_augmentation
from tempo_fast.video.container import Deadline, DecodeError
from tempo_fast.video.decode import decoder_for, open_decoder
from tempo_fast.video.decoder import Decoder, in_batches, pick
from tempo_fast.video.preprocess import fit, to_patches
from tempo_fast.video.probe import VideoInfo, check_indices, probe
from tempo_fast.video.sampling import sample_frames, smart_resize, thin, video_max_pixels


@dataclass(frozen=True)
class FramePlan:
    """What will be read: everything that decides the pixels, before any is decoded.

    ``indices`` frame numbers in the order shown, ``blank`` which of them are shown black (empty: none); ``timestamps``
    seconds, ascending; ``fps`` frames over the seconds they stand for; ``height`` and ``width`` pixels after resizing;
    ``rule`` sampling, resize, the decoder and colour route really used for this file, and pixel budget, as text;
    ``augment`` what is done to every frame instead of resizing it whole.
    """

    path: str
    digest: str
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    fps: float
    height: int
    width: int
    grid: Grid
    rule: str
    blank: tuple[bool, ...] = ()
    augment: Augmentation | None = None

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of all of the above but the path: the same bytes under another name are the same video."""
        times = [round(t, 6) for t in self.timestamps]
        size = [self.height, self.width, list(self.grid)]
        blank = [self.blank] if any(self.blank) else []
        augmented = [{"augment": self.augment._asdict()}] if self.augment is not None else []
        return digest([self.digest, self.indices, times, round(self.fps, 6), *size, self.rule, *blank, *augmented])

    @property
    def timing(self) -> Timing:
        """What the model may be told of time."""
        return Timing(self.timestamps, self.fps)


class VideoReader:
    """Plans and reads videos by one configuration and one model geometry. Several threads may share it.

    A file that the decoder refuses (``Decoder.refuses``) is decoded by PyAV.

    Args:
        config: sampling rule, rates and pixel budget.
        geometry: the model family's patches.
        device: where frames are resized and patches land.
        timeout_s: as ``open_decoder``'s.
        dtype: of the patches, unless a caller says otherwise: the vision tower's.

    Raises:
        InputError: the decoder asked for is missing.
    """

    def __init__(
        self,
        config: VideoConfig,
        geometry: VideoGeometry,
        device: str | torch.device = "cpu",
        timeout_s: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.geometry = geometry
        self.device = torch.device(device)
        self.sampling = geometry.sampling if config.sampling == "auto" else config.sampling
        self.timeout_s = timeout_s
        self.dtype = dtype
        self.decoder = open_decoder(config.backend, self.device, timeout_s)

    @property
    def settings(self) -> list[Any]:
        """Everything but a file that decides its pixels, for digests."""
        return [self.config, self.geometry, self.sampling, self.decoder.name]

    def info(self, path: str | os.PathLike[str]) -> VideoInfo:
        """The file's facts (cached). Raises DecodeError."""
        return probe(path)

    def plan(self, path: str | os.PathLike[str], indices: Sequence[int] | None = None) -> FramePlan:
        """Plan the given frames in the given order, or the sampled frames of the whole file.

        Given frames that run backwards somewhere are told as if they came at the configured rate.
        """
        info = probe(path)
        if indices is None:
            return self._plan_sampled(info, 0, info.n_frames, self.config.min_frames)
        chosen = check_indices(info, indices)
        times = [info.pts_s[i] for i in chosen]
        if any(b < a for a, b in zip(times, times[1:], strict=False)):
            return self._make(info, chosen, self._even_times(len(chosen)), self.config.fps)
        lasts = times[-1] - times[0]
        return self._make(info, chosen, times, (len(chosen) - 1) / lasts if lasts > 0 else self.config.fps)

    def plan_range(self, path: str | os.PathLike[str], start_frame: int, end_frame: int) -> FramePlan:
        """Plan one clip [start_frame, end_frame): its frames at ``config.fps``, at least one temporal patch of them."""
        info = probe(path)
        self._check_range(info, start_frame, end_frame)
        return self._plan_sampled(info, start_frame, end_frame, self.geometry.temporal)

    def plan_clips(
        self, path: str | os.PathLike[str], ranges: Sequence[tuple[int, int]], blank: Sequence[bool] = ()
    ) -> FramePlan:
        """Plan clips one after the other, in the order given: the perturbed video. ``blank`` ones are shown black.

        Each clip is sampled as in ``plan_range``; more than ``max_frames`` in all are thinned evenly. Timestamps run on
        at the sampled rate, so that they do not give the perturbation away.
        """
        info = probe(path)
        shown: list[tuple[int, bool]] = []
        for (start, end), black in zip(ranges, blank or [False] * len(ranges), strict=True):
            self._check_range(info, start, end)
            shown += [(i, black) for i in self._sample(info, start, end, self.geometry.temporal)]
        if not shown:
            raise InputError(f"{info.path}: no clips to show")
        most = max(self.geometry.temporal, self.config.max_frames // self.geometry.temporal * self.geometry.temporal)
        indices, black_ones = zip(*thin(shown, most), strict=True)
        plan = self._make(info, indices, self._even_times(len(indices)), self.config.fps)
        return replace(plan, blank=black_ones) if any(black_ones) else plan

    def plan_frames(
        self, path: str | os.PathLike[str], order: Sequence[int], blank: Sequence[bool] = ()
    ) -> FramePlan:
        """Plan the sampled frames of a whole file in another order: ``order`` holds places among them, ``blank`` says
        which of the shown ones are black.

        Timestamps stay those of the places, from the first on, so that they do not give it away. Fewer frames than
        sampled may be larger, as the pixel budget has it.

        Raises:
            InputError: an order that is empty, longer than the sampled frames or not of them, or another number of
                blanks.
        """
        plan = self.plan(path)
        n = len(plan.indices)
        if not 0 < len(order) <= n or not all(0 <= k < n for k in order) or len(blank) not in (0, len(order)):
            told = f"an order of {len(order)} and {len(blank)} blanks for {n} sampled frames"
            raise InputError(f"{plan.path}: {told}, or places that are not among them")
        shown = tuple(plan.indices[k] for k in order)
        if len(shown) < n:
            plan = self._make(probe(path), shown, plan.timestamps[: len(shown)], plan.fps)
        return replace(plan, indices=shown, blank=tuple(blank) if any(blank) else ())

    def plan_sparse(self, path: str | os.PathLike[str], n_frames: int, augment_seed: int | None = None) -> FramePlan:
        """Plan few frames of a whole file: ``n_frames`` of the sampled ones, evenly from the first to the last (the
        first alone), as LeanPO takes them.

        With a seed they are augmented (``video.augment``) to squares as large as the whole frames would be, in pixels.
        """
        if n_frames < 1:
            raise InputError(f"{path}: a plan of {n_frames} frames")
        whole = self.plan(path).indices
        n = min(n_frames, len(whole))
        plan = self.plan(path, [whole[i * (len(whole) - 1) // max(1, n - 1)] for i in range(n)])
        if augment_seed is None:
            return plan
        info, side = probe(path), round(math.sqrt(plan.height * plan.width))
        if not self.geometry.side:
            c, g = self.config, self.geometry
            budget = video_max_pixels(c, n, g)
            side, _ = smart_resize(side, side, factor=g.factor, min_pixels=c.min_pixels, max_pixels=budget)
        return replace(
            plan,
            height=side,
            width=side,
            grid=self.geometry.grid(n, side, side),
            augment=draw_augmentation(augment_seed, info.height, info.width),
        )

    def frames(self, plan: FramePlan) -> Tensor:
        """uint8 [F, H, W, 3] at native size, on the decoder's device. Raises DecodeError."""
        (out,) = self.frames_many([plan])
        if isinstance(out, DecodeError):
            raise out
        return out

    def frames_many(self, plans: Sequence[FramePlan]) -> list[Tensor | DecodeError]:
        """``frames`` of each plan, in order, a failure as a value in its place.

        Plans of one file share one decode of all their frames, and are picked from it on the decoder's device: so the
        clean and the perturbed video cost what one of them costs.
        """
        out: list[Any] = [None] * len(plans)
        for k, frames in self._decoded(plans):
            out[k] = frames
        return out

    def _decoded(self, plans: Sequence[FramePlan]) -> Iterator[tuple[int, Tensor | DecodeError]]:
        """``frames_many``, each with its place in ``plans``, as they come out of the decoders."""
        files: dict[str, list[int]] = {}
        for k, plan in enumerate(plans):
            files.setdefault(plan.path, []).append(k)
        jobs: dict[str, tuple[Decoder, list[tuple[tuple[str, list[int]], int]]]] = {}
        for path, places in files.items():
            try:
                info = self._unchanged(path, [plans[k].digest for k in places])
            except DecodeError as e:
                yield from ((k, e) for k in places)
                continue
            together = sorted({i for k in places for i in plans[k].indices})
            decoder = decoder_for(self.decoder, info, self.timeout_s)
            n_bytes = len(together) * info.height * info.width * 3
            jobs.setdefault(decoder.name, (decoder, []))[1].append(((path, together), n_bytes))
        for decoder, items in jobs.values():
            for batch in in_batches(items):
                for (path, together), frames in zip(batch, decoder.decode_many(batch), strict=True):
                    for k in files[path]:
                        yield k, frames if isinstance(frames, DecodeError) else pick(frames, together, plans[k].indices)

    def pixels(self, plan: FramePlan, dtype: torch.dtype | None = None) -> Tensor:
        """``dtype`` (None: the reader's) [P, C * tp * p * p] on the reader's device, normalised. Raises DecodeError."""
        seen = _seen(plan)
        return self._patches(plan, seen, self.frames(seen), dtype)

    def pixels_many(
        self, plans: Sequence[FramePlan], dtype: torch.dtype | None = None
    ) -> list[Tensor | DecodeError]:
        """``pixels`` of each plan, in order, a failure as a value in its place.

        Plans of one file share one decode, and a decoder gets several files at once, up to ``decoder.MOST_BYTES`` of
        frames: no more than these are held at their native size.
        """
        out: list[Any] = [None] * len(plans)
        seen = [_seen(plan) for plan in plans]
        for k, frames in self._decoded(seen):
            out[k] = frames if isinstance(frames, DecodeError) else self._patches(plans[k], seen[k], frames, dtype)
        return out

    def resized(self, plan: FramePlan) -> Tensor:
        """uint8 [F, plan.height, plan.width, 3] on the reader's device: what the model sees. Raises DecodeError."""
        seen = _seen(plan)
        frames, index, blank = self._fitted(plan, seen, self.frames(seen))
        shown = frames if index is None else frames[index.to(frames.device)]
        return shown if blank is None else shown.masked_fill(blank.to(frames.device)[:, None, None, None], 0)

    def _patches(self, plan: FramePlan, seen: FramePlan, frames: Tensor, dtype: torch.dtype | None) -> Tensor:
        frames, index, blank = self._fitted(plan, seen, frames)
        return to_patches(frames, self.geometry, dtype or self.dtype, index=index, blank=blank)

    def _fitted(
        self, plan: FramePlan, seen: FramePlan, frames: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Resized frames, which of them stands at each place (None: all in order), and which places are black (None:
        none). ``frames`` are those of ``seen``."""
        frames = frames.to(self.device)
        if plan.augment is not None:
            frames = augment(frames, plan.augment, plan.height, plan.width)
        else:
            frames = fit(frames, plan.height, plan.width, crop=self.geometry.crop)
        place = {i: k for k, i in enumerate(seen.indices)}
        index = None if plan.indices == seen.indices else torch.tensor([place.get(i, 0) for i in plan.indices])
        return frames, index, torch.tensor(plan.blank) if any(plan.blank) else None

    @staticmethod
    def _check_range(info: VideoInfo, start: int, end: int) -> None:
        if not 0 <= start < end <= info.n_frames:
            raise InputError(f"{info.path}: clip [{start}, {end}) is not inside its {info.n_frames} frames")

    def _plan_sampled(self, info: VideoInfo, start: int, end: int, min_frames: int) -> FramePlan:
        indices = self._sample(info, start, end, min_frames)
        # as transformers' VideoMetadata.sampled_fps
        fps = len(indices) / (end - start) * info.fps
        return self._make(info, indices, [info.pts_s[i] for i in indices], fps)

    def _sample(self, info: VideoInfo, start: int, end: int, min_frames: int) -> list[int]:
        indices = sample_frames(
            self.sampling,
            end - start,
            info.fps,
            fps=self.config.fps,
            min_frames=min_frames,
            max_frames=max(min_frames, self.config.max_frames),
            temporal=self.geometry.temporal,
        )
        return [start + i for i in indices]

    def _even_times(self, n: int) -> list[float]:
        return [i / self.config.fps for i in range(n)]

    def _make(self, info: VideoInfo, indices: Sequence[int], times: Sequence[float], fps: float) -> FramePlan:
        c, g = self.config, self.geometry
        h, w, size = self._size(info, len(indices))
        decoder = decoder_for(self.decoder, info, self.timeout_s)
        rule = (
            f"sampling={self.sampling};fps={c.fps:g};resize=bicubic-antialias-u8;decoder={decoder.name};"
            f"color={decoder.route}:{info.color_space}:{info.color_range};"
            f"pixels={size};patch={g.patch}x{g.merge}x{g.temporal}"
        )
        return FramePlan(
            path=info.path,
            digest=info.digest,
            indices=tuple(indices),
            timestamps=tuple(times),
            fps=fps,
            height=h,
            width=w,
            grid=g.grid(len(indices), h, w),
            rule=rule,
        )

    def _size(self, info: VideoInfo, n_frames: int) -> tuple[int, int, str]:
        """(height, width) of a resized frame, and how they came about."""
        c, g = self.config, self.geometry
        if g.side:
            return g.side, g.side, f"{'crop' if g.crop else 'squeeze'}:{g.side}"
        budget = video_max_pixels(c, n_frames, g)
        try:
            h, w = smart_resize(info.height, info.width, factor=g.factor, min_pixels=c.min_pixels, max_pixels=budget)
        except ValueError as e:
            raise InputError(f"{info.path}: {e}") from e
        return h, w, f"{c.min_pixels}..{budget}"

    def _unchanged(self, path: str, digests: Sequence[str]) -> VideoInfo:
        info = probe(path, Deadline(self.timeout_s))
        if any(d != info.digest for d in digests):
            raise DecodeError(f"{path}: the file has changed since it was planned")
        return info


def _seen(plan: FramePlan) -> FramePlan:
    """What must be decoded: a frame that is seen several times once, one that is never seen not at all."""
    black = plan.blank or (False,) * len(plan.indices)
    distinct = sorted({i for i, dark in zip(plan.indices, black, strict=True) if not dark}) or [plan.indices[0]]
    return replace(plan, indices=tuple(distinct), blank=())
