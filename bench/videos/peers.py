"""The peers of the video bench, each through its own package, at the best of the settings it offers."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import av
import torch
from torch import Tensor

from bench.videos.sides import GEOMETRY, Absent, Case, Read, Settings, Side
from tempo_fast.video.sampling import video_max_pixels

_SCHEMAS = """
nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor
roi_align(Tensor input) -> Tensor
qroi_align(Tensor input) -> Tensor
_roi_align_backward(Tensor grad) -> Tensor
ps_roi_align(Tensor input) -> (Tensor, Tensor)
_ps_roi_align_backward(Tensor grad) -> Tensor
roi_pool(Tensor input) -> (Tensor, Tensor)
_roi_pool_backward(Tensor grad) -> Tensor
ps_roi_pool(Tensor input) -> (Tensor, Tensor)
_ps_roi_pool_backward(Tensor grad) -> Tensor
deform_conv2d(Tensor input) -> Tensor
_deform_conv2d_backward(Tensor grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
"""
_library: torch.library.Library | None = None


def load(module: str) -> Any:
    """The module. Raises Absent with the first line of what went wrong."""
    try:
        return importlib.import_module(module)
    except Exception as problem:  # a package that is broken is as good as none
        raise Absent(f"{module}: {(str(problem).splitlines() or [type(problem).__name__])[0]}") from problem


def load_torchvision() -> Any:
    """torchvision, also one built for another torch: its detection operators then exist in name only, which the video
    processors never notice, and it cannot be imported without them."""
    global _library
    if importlib.util.find_spec("torchvision") is None:
        raise Absent("torchvision is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as problem:
        if _library is not None or "torchvision::" not in str(problem):
            raise Absent(f"torchvision: {problem}") from problem
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.strip().splitlines():
        _library.define(schema)
    return load("torchvision")


def processor(case: Case, *, resize: bool) -> Callable[[Any], Tensor]:
    """Hugging Face's video processor of Qwen2-VL: frames (a tensor or PIL images) to model input."""
    load_torchvision()
    config = case.config()
    size = {"shortest_edge": config.min_pixels, "longest_edge": video_max_pixels(config, case.frames, GEOMETRY)}
    make = load("transformers.models.qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor(
        size=size, cap_pixels_per_frame=False
    )

    def call(video: Any) -> Tensor:
        out = make(
            videos=[video], do_resize=resize, do_sample_frames=False, return_tensors="pt",
            **({"device": case.device} if case.device != "cpu" else {}),
        )  # fmt: skip
        return out["pixel_values_videos"].to(case.device)

    return call


def linspace(total: int, n: int) -> list[int]:
    """qwen-vl-utils' frames."""
    return torch.linspace(0, total - 1, n).round().long().tolist()


def thread_counts(case: Case) -> list[int]:
    return sorted({1, case.threads})


# -- qwen-vl-utils ----------------------------------------------------------------------------------------------------


class _QwenRead(Read):
    def __init__(self, case: Case, settings: Settings, backend: str) -> None:
        super().__init__(case, settings)
        self.utils = load("qwen_vl_utils.vision_process")
        self.backend, self.route = backend, f"qwen-vl-utils/{backend}"
        budget = case.config()
        self.video = {
            "video": str(case.path), "nframes": case.frames, "min_pixels": budget.min_pixels,
            "max_pixels": budget.max_pixels, "total_pixels": budget.total_pixels,
        }  # fmt: skip
        readers = self.utils.VIDEO_READER_BACKENDS
        self.original = getattr(readers[backend], "__wrapped__", readers[backend])
        self.decode = self.sections.timed("decode", self.original)
        self.fetch = self.sections.timed("resize", self._fetch)
        self.process = self.sections.timed("processor", processor(case, resize=False))

    def _fetch(self) -> Tensor:
        utils, environment = self.utils, {k: str(v) for k, v in self.settings.items()}
        utils.get_video_reader_backend = lambda: self.backend  # its own choice is kept for good
        utils.VIDEO_READER_BACKENDS[self.backend] = self.decode
        os.environ.update(environment)
        utils.logger.setLevel(logging.ERROR)
        try:
            video, told = utils.fetch_video(self.video, return_video_metadata=True)
        finally:
            for key in environment:
                del os.environ[key]
            utils.VIDEO_READER_BACKENDS[self.backend] = self.original
        if told["video_backend"] != self.backend:  # it falls back in silence
            raise RuntimeError(f"qwen-vl-utils' {self.backend} reader failed, and it took {told['video_backend']}")
        self.indices = [int(i) for i in told["frames_indices"]]
        return video

    def __call__(self) -> Tensor:
        return self.process(self.fetch())


class Qwen(Side):
    """``fetch_video``, then the processor without its own resizing, as the README of qwen-vl-utils has it."""

    def __init__(self, backend: str) -> None:
        self.name, self.backend = f"qwen_{backend}", backend

    def choices(self, case: Case) -> list[Settings]:
        load_torchvision()
        load("qwen_vl_utils.vision_process")
        if self.backend == "torchvision":
            if not hasattr(load("torchvision.io"), "read_video"):
                found = importlib.metadata.version("torchvision")
                raise Absent(f"torchvision {found} has no io.read_video, which ended with 0.25")
            return [{}]
        load("torchcodec.decoders" if self.backend == "torchcodec" else self.backend)
        if self.backend == "torchcodec":
            return [{"TORCHCODEC_NUM_THREADS": n} for n in sorted({*thread_counts(case), 8})]  # 8 is its default
        return [{}]

    def open(self, case: Case, settings: Settings) -> Read:
        return _QwenRead(case, settings, self.backend)


# -- decoders alone, with the processor -------------------------------------------------------------------------------


class _PlainRead(Read):
    def __init__(self, case: Case, settings: Settings, route: str, decode: Callable[[_PlainRead], Any]) -> None:
        super().__init__(case, settings)
        self.route = route
        self.decode = self.sections.timed("decode", lambda: decode(self))
        self.process = self.sections.timed("processor", processor(case, resize=True))

    def __call__(self) -> Tensor:
        return self.process(self.decode())


class TorchCodec(Side):
    """torchcodec and the processor."""

    name = "torchcodec_hf"

    def choices(self, case: Case) -> list[Settings]:
        load("torchcodec.decoders")
        modes = itertools.product(("exact", "approximate"), thread_counts(case))
        plain: list[Settings] = [{"seek_mode": mode, "num_ffmpeg_threads": n} for mode, n in modes]
        return plain + ([{"device": "cuda"}] if case.device == "cuda" else [])

    def open(self, case: Case, settings: Settings) -> Read:
        make = load("torchcodec.decoders").VideoDecoder

        def decode(read: _PlainRead) -> Tensor:
            video = make(str(case.path), **settings)
            read.indices = linspace(len(video), case.frames)
            return video.get_frames_at(read.indices).data

        return _PlainRead(case, settings, "torchcodec", decode)


class Decord(Side):
    """decord and the processor."""

    name = "decord_hf"

    def choices(self, case: Case) -> list[Settings]:
        load("decord")
        return [{"num_threads": n} for n in (0, *thread_counts(case))]  # 0 is its own choice

    def open(self, case: Case, settings: Settings) -> Read:
        make = load("decord").VideoReader

        def decode(read: _PlainRead) -> Tensor:
            video = make(str(case.path), **settings)
            read.indices = linspace(len(video), case.frames)
            return torch.from_numpy(video.get_batch(read.indices).asnumpy()).permute(0, 3, 1, 2)

        return _PlainRead(case, settings, "decord", decode)


class PyAVAll(Side):
    """PyAV through the whole file, the sampled frames kept as PIL images, and the processor."""

    name = "pyav_all_hf"

    def choices(self, case: Case) -> list[Settings]:
        return [{"thread_type": name} for name in ("SLICE", "AUTO")]  # SLICE is PyAV's default

    def open(self, case: Case, settings: Settings) -> Read:
        def decode(read: _PlainRead) -> list[Any]:
            with av.open(str(case.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = settings["thread_type"]
                read.indices = linspace(stream.frames, case.frames)
                wanted = set(read.indices)
                return [frame.to_image() for k, frame in enumerate(container.decode(stream)) if k in wanted]

        return _PlainRead(case, settings, "pyav/PIL", decode)


class LlamaFactory(Side):
    """LLaMA-Factory's own function: PyAV through the whole file, PIL images, resized by Pillow and by the processor."""

    name = "llama_factory"
    rule = "linspace, truncated"

    def choices(self, case: Case) -> list[Settings]:
        load_torchvision()
        self._plugin()
        return [{}]

    @staticmethod
    def _plugin() -> Any:
        if importlib.util.find_spec("llamafactory") is None:
            raise Absent("llamafactory is not installed")
        load("transformers.processing_utils")  # asks for torchaudio by name before the next line makes one up
        if importlib.util.find_spec("torchaudio") is None:  # imported at the top of the module, for audio alone
            sys.modules["torchaudio"] = types.ModuleType("torchaudio")
        try:
            return load("llamafactory.data.mm_plugin").Qwen2VLPlugin(None, "<|video_pad|>", None)
        finally:
            if getattr(sys.modules.get("torchaudio"), "__spec__", None) is None:
                sys.modules.pop("torchaudio", None)

    def open(self, case: Case, settings: Settings) -> Read:
        plugin, plan = self._plugin(), case.plan
        rate = (case.frames + 0.5) / case.info.duration_s
        limits = {
            "image_max_pixels": plan.height * plan.width, "image_min_pixels": 1, "video_maxlen": case.frames,
            "video_fps": rate,
        }  # fmt: skip

        def decode(read: _PlainRead) -> list[Any]:
            told = plugin._regularize_videos([str(case.path)], **limits)
            read.indices = [round(at * case.info.fps / rate) for at in told["frames_indices"][0]]
            return told["videos"][0]

        return _PlainRead(case, settings, "llamafactory/PIL", decode)


PEERS: tuple[Side, ...] = (
    Qwen("torchvision"), Qwen("torchcodec"), Qwen("decord"), LlamaFactory(), PyAVAll(), TorchCodec(), Decord(),
)  # fmt: skip
