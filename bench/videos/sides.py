"""What reads a video in the video bench: ours on each decoder, and the floor. Peers are in ``bench.videos.peers``."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Any

import av
import torch
from torch import Tensor

from bench.measure import synchronize
from bench.videos.clips import Clip
from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry
from tempo_fast.video.probe import VideoInfo, probe
from tempo_fast.video.reader import FramePlan, VideoReader

GEOMETRY = VideoGeometry(patch=14, merge=2, temporal=2, mean=CLIP_MEAN, std=CLIP_STD)
"""Of Qwen2-VL and Qwen2.5-VL."""
Settings = dict[str, Any]


class Absent(Exception):
    """Why a side cannot run here."""


@dataclass(frozen=True)
class Case:
    """One file and how much of it: ``frames`` by linspace and round, in the pixel budget of ``budget``."""

    clip: Clip
    path: Path
    frames: int
    device: str = "cpu"
    threads: int = 1
    budget: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.clip.name}/{self.frames}"

    def config(self, backend: str = "pyav") -> VideoConfig:
        return VideoConfig(
            backend=backend, sampling="qwen_vl_utils", min_frames=self.frames, max_frames=self.frames, **self.budget
        )  # type: ignore[arg-type]

    @cached_property
    def info(self) -> VideoInfo:
        return probe(self.path)

    @cached_property
    def plan(self) -> FramePlan:
        return VideoReader(self.config(), GEOMETRY).plan(self.path)


class Sections:
    """Milliseconds by name of the functions wrapped; what an inner one takes is not counted for the outer."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ms: dict[str, float] = {}
        self._inner: list[float] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                out = function(*args, **kwargs)
                synchronize(self.device)
                return out
            finally:
                took = 1e3 * (time.perf_counter() - start)
                self.ms[name] = self.ms.get(name, 0.0) + took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        return call


class Read:
    """A side made ready for one case and one choice of its settings.

    ``indices`` are the frames that came out of the last call, as far as the side says.
    """

    route = ""
    indices: Sequence[int] = ()

    def __init__(self, case: Case, settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.sections = Sections(case.device)

    def __call__(self) -> Tensor | None:
        """Model input float32 [P, C * tp * p * p] on the case's device; None where the side makes none."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of what it holds outside memory."""


class Side:
    """A way from a file to model input. ``ours`` is this project's."""

    name = ""
    ours = False
    rule = "linspace, rounded"
    """How it chooses frames."""

    def choices(self, case: Case) -> list[Settings]:
        """Settings worth trying; the fastest is measured. Raises Absent."""
        return [{}]

    def open(self, case: Case, settings: Settings) -> Read:
        raise NotImplementedError


class _OurRead(Read):
    def __init__(self, case: Case, backend: str, cold: bool) -> None:
        super().__init__(case, {})
        try:
            self.reader: Any = VideoReader(case.config(backend), GEOMETRY, case.device)
        except InputError as problem:
            raise Absent(str(problem)) from problem
        self.plan = self.reader.plan(case.path)
        decoder = self.plan.rule.split("decoder=")[1].split(";")[0]
        if decoder != backend:
            raise Absent(f"{backend} refuses this file, so that {decoder} reads it")
        self.route = self.plan.rule.split("color=")[1].split(";")[0]
        self.indices = self.plan.indices
        timed = self.sections.timed
        self.reader.frames = timed("decode", self.reader.frames)
        self.pixels = timed("processor", self.reader.pixels)
        self.make_plan = timed("probe", self.reader.plan)
        # a name nobody has asked for yet is a file nobody has probed yet
        self.folder = Path(tempfile.mkdtemp(dir=case.path.parent)) if cold else None
        self.count = 0

    def __call__(self) -> Tensor:
        if self.folder is None:
            return self.pixels(self.plan)
        self.count += 1
        fresh = self.folder / f"{self.count}{self.case.path.suffix}"
        os.link(self.case.path, fresh)
        return self.pixels(self.make_plan(fresh))

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)


class Ours(Side):
    """``VideoReader(...).pixels(plan)``. ``cold`` takes a file it has not seen: with its probe, bytes hashed."""

    ours = True

    def __init__(self, backend: str, cold: bool = False) -> None:
        self.name = backend + ("_cold" if cold else "")
        self.backend, self.cold = backend, cold

    def open(self, case: Case, settings: Settings) -> Read:
        return _OurRead(case, self.backend, self.cold)


class _DecodeOnlyRead(Read):
    route = "pyav, no conversion"

    def __init__(self, case: Case, settings: Settings) -> None:
        super().__init__(case, settings)
        self.indices = case.plan.indices
        self.run = self.sections.timed("decode", self._run)

    def __call__(self) -> None:
        self.run()

    def _run(self) -> None:
        info = self.case.info
        groups: dict[int, set[int]] = {}
        for index in self.indices:
            groups.setdefault(bisect_right(info.keyframes, index) - 1, set()).add(info.ticks[index])
        with av.open(str(self.case.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for group, wanted in groups.items():
                container.seek(info.ticks[info.keyframes[group]], stream=stream)
                stream.codec_context.flush_buffers()
                self._group(container, stream, wanted)

    def _group(self, container: Any, stream: Any, wanted: set[int]) -> None:
        left = set(wanted)
        for packet in container.demux(stream):
            if self.settings["skip"] and packet.pts is not None:
                stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            for frame in packet.decode():
                left.discard(frame.pts)
                if not left:
                    return
        raise RuntimeError(f"frames at {sorted(left)} did not come out")


class DecodeOnly(Side):
    """The floor: PyAV decodes the frames that must be, each from the keyframe before it, and converts none.

    With ``skip`` also not those that no other frame refers to.
    """

    name = "decode_only"

    def choices(self, case: Case) -> list[Settings]:
        if not case.info.indexed:
            raise Absent("this file's frames cannot be found by timestamp")
        return [{"skip": False}, {"skip": True}]

    def open(self, case: Case, settings: Settings) -> Read:
        return _DecodeOnlyRead(case, settings)


OURS: tuple[Side, ...] = (
    Ours("pyav"), Ours("pyav", cold=True), Ours("torchcodec"), Ours("torchcodec", cold=True), Ours("dali-cpu"),
    Ours("dali-gpu"), DecodeOnly(),
)  # fmt: skip


# -- what came out ----------------------------------------------------------------------------------------------------


class Judge:
    """Ours on PyAV, against which every side is held: shape, frames, pixels."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._reader = VideoReader(case.config(), GEOMETRY)
        self._seen: dict[tuple[int, ...], Tensor] = {}

    def _pixels(self, indices: Sequence[int]) -> Tensor:
        last = self.case.info.n_frames - 1
        key = tuple(min(max(i, 0), last) for i in indices)
        if key not in self._seen:
            self._seen[key] = self._reader.pixels(self._reader.plan(self.case.path, key))
        return self._seen[key]

    def of(self, found: Tensor, indices: Sequence[int], rule: str) -> dict[str, Any]:
        """``shift`` of frame numbers where the side's rule is another; ``max`` and ``mean`` pixel differences in levels
        of 255 at the side's own frame numbers; ``wrong`` is a sentence where the input is not what it should be.

        A frame is a wrong one when it is nearer to ours before or after it than to ours of its number: colour routes
        differ by some levels, but by the same ones for all three.
        """
        plan = self.case.plan
        rows, columns = plan.grid.t * plan.grid.h * plan.grid.w, 3 * GEOMETRY.temporal * GEOMETRY.patch**2
        if tuple(found.shape) != (rows, columns):
            return {"wrong": f"shape {tuple(found.shape)}, not {(rows, columns)}"}
        if len(indices) != self.case.frames:
            return {"wrong": f"{len(indices)} frames, not {self.case.frames}"}
        shift = max(abs(a - b) for a, b in zip(indices, plan.indices, strict=True))
        out: dict[str, Any] = {"shift": shift}
        if shift and rule == Side.rule:
            return {**out, "wrong": f"frames {list(indices)[:4]}..., not {list(plan.indices)[:4]}..."}
        here, before, after = (self._frame_differences(found, [i + by for i in indices]) for by in (0, -1, 1))
        out |= {"max": here[1], "mean": here[0].mean().item()}
        off = (here[0] > torch.minimum(before[0], after[0])).nonzero().flatten().tolist()
        if off:
            out["wrong"] = f"other pictures for frames {[indices[k] for k in off][:4]} ({len(off)} of {len(indices)})"
        return out

    def _frame_differences(self, found: Tensor, indices: Sequence[int]) -> tuple[Tensor, float]:
        """Mean difference per frame [F], and the largest of all, in levels."""
        std = 255 * torch.tensor(GEOMETRY.std).view(3, 1, 1)
        split = (self.case.plan.grid.t, -1, 3, GEOMETRY.temporal, GEOMETRY.patch**2)
        off = ((found.cpu().float() - self._pixels(indices)).view(split).abs_()).mul_(std)
        return off.mean((1, 2, 4)).flatten()[: len(indices)], off.max().item()
