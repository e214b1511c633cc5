"""NVIDIA DALI: the same graph on the GPU (NVDEC) and on the CPU.

``dali-cpu`` reads VP8, VP9 and MJPEG only; it is there so that the graph can be tested without a GPU, and is slower
than PyAV. ``dali-gpu`` is the same graph with its decoder on ``mixed``; it has not been run on a GPU yet, so its speed
and its colour conversion are unknown, and what its source leaves in doubt is refused.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError, reason
from tempo_fast.video.decoder import Item, check_refused, in_batches, pick
from tempo_fast.video.probe import VideoInfo, check_indices, probe

_CPU_CODECS = {"vp8", "vp9", "mjpeg"}
_GPU_CODECS = {"h264", "hevc", "vp8", "vp9", "av1"}
_BATCH = 8


class _Job(NamedTuple):
    place: int
    info: VideoInfo
    wanted: list[int]
    distinct: list[int]

    @property
    def n_bytes(self) -> int:
        return len(self.distinct) * self.info.height * self.info.width * 3


class DaliDecoder:
    """One pipeline: bytes and frame numbers of several files in, their uint8 frames out, turned upright by us.

    DALI fills frame numbers out of range with black by default (``pad_mode='none'`` is set) and ignores display
    matrices. An error leaves a pipeline unusable: it is built anew, and the files of that run are decoded one by one,
    so that only the bad one fails.
    """

    def __init__(self, gpu: bool, device: torch.device) -> None:
        try:
            import nvidia.dali.fn as fn
            import nvidia.dali.types as types
            from nvidia.dali import Pipeline
        except (ImportError, OSError) as e:
            raise InputError(f"video.backend: DALI cannot be loaded ({reason(e)})") from e
        self.name = "dali-gpu" if gpu else "dali-cpu"
        self.route = f"{self.name}/rgb"
        self._gpu, self._fn, self._types, self._pipeline_class = gpu, fn, types, Pipeline
        self._device = device
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def refuses(self, info: VideoInfo) -> str:
        """See ``Decoder.refuses``. Its index has one frame per packet, sorted by time, without those before time 0."""
        if info.has_edit_list:
            return f"{self.name} counts the frames that an edit list hides"
        if info.video_streams > 1:
            return f"{self.name} may take another of several video streams"
        why = self._refuses_on_gpu(info) if self._gpu else self._refuses_on_cpu(info)
        if not why and (not info.indexed or info.ticks[0] < 0):
            why = f"{self.name} needs packets that are one shown frame each, from time 0 on"
        return why

    def _refuses_on_cpu(self, info: VideoInfo) -> str:
        return "" if info.codec in _CPU_CODECS else f"dali-cpu reads VP8, VP9 and MJPEG only, not {info.codec}"

    def _refuses_on_gpu(self, info: VideoInfo) -> str:
        if info.codec not in _GPU_CODECS:
            return f"dali-gpu is not trusted with {info.codec}"
        if info.pix_fmt not in ("yuv420p", "yuvj420p") or info.width % 2 or info.height % 2:
            return "dali-gpu is trusted with 8 bits, 4:2:0 and even sides only"
        # It hands out packet times to decoded pictures first in, first out: a picture that a packet does not code, or
        # that is dropped after a seek, would shift all that follow.
        if info.shows_again or (info.codec == "hevc" and info.open_gop):
            return f"dali-gpu may miscount {info.codec} whose packets show earlier pictures or cross keyframes"
        if info.dense_keyframes:
            return "dali-gpu may seek past keyframes that are coded before the one before them is shown"
        return ""

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """See ``Decoder.decode``. The frames lie on the GPU for ``dali-gpu``."""
        (out,) = self.decode_many([(path, indices)])
        if isinstance(out, DecodeError):
            raise out
        return out

    def decode_many(self, items: Sequence[Item]) -> list[Tensor | DecodeError]:
        """See ``Decoder.decode_many``: up to 8 files and ``decoder.MOST_BYTES`` a run."""
        out: list[Any] = [None] * len(items)
        jobs = []
        for place, (path, indices) in enumerate(items):
            try:
                info = probe(path)
                wanted = check_indices(info, indices)
                check_refused(self, info)
                jobs.append(_Job(place, info, wanted, sorted(set(wanted))))
            except DecodeError as e:
                out[place] = e
        for batch in in_batches(((job, job.n_bytes) for job in jobs), _BATCH):
            for job, result in zip(batch, self._run_safely(batch), strict=True):
                out[job.place] = result
        return out

    def _run_safely(self, jobs: Sequence[_Job]) -> list[Tensor | DecodeError]:
        try:
            return list(self._run(jobs))
        except (RuntimeError, OSError) as e:
            if len(jobs) == 1:
                return [DecodeError(f"{jobs[0].info.path}: DALI cannot decode it ({reason(e)})")]
        return [result for job in jobs for result in self._run_safely([job])]

    def _run(self, jobs: Sequence[_Job]) -> list[Tensor | DecodeError]:
        data = [np.fromfile(job.info.path, dtype=np.uint8) for job in jobs]
        with self._lock:
            pipe, self._pipeline = self._pipeline or self._built(), None
            pipe.feed_input("file", data)
            pipe.feed_input("frames", [np.asarray(job.distinct, dtype=np.int32) for job in jobs])
            (out,) = pipe.run()
            frames = [self._to_torch(out, k) for k in range(len(jobs))]
            if self._gpu:  # the next run must not fill the buffer while it is still being copied
                torch.cuda.current_stream(frames[0].device).synchronize()
            self._pipeline = pipe  # only a run without an error leaves it usable
        return [self._finished(job, x) for job, x in zip(jobs, frames, strict=True)]

    def _finished(self, job: _Job, frames: Tensor) -> Tensor | DecodeError:
        info = job.info
        stored = (len(job.distinct), *info.display.size(info.height, info.width), 3)
        if tuple(frames.shape) != stored:
            return DecodeError(f"{info.path}: DALI gave {tuple(frames.shape)} where {stored} is stored")
        return pick(info.display.apply_to_frames(frames), job.distinct, job.wanted)

    def _built(self) -> Any:
        fn, types = self._fn, self._types
        device_id = None
        if self._gpu:  # "cuda" is the device of this thread
            device_id = torch.cuda.current_device() if self._device.index is None else self._device.index
        pipe = self._pipeline_class(batch_size=_BATCH, num_threads=2, device_id=device_id, prefetch_queue_depth=1)
        with pipe:
            file = fn.external_source(name="file", device="cpu", dtype=types.UINT8, ndim=1)
            frames = fn.external_source(name="frames", device="cpu", dtype=types.INT32, ndim=1)
            device = "mixed" if self._gpu else "cpu"
            pipe.set_outputs(fn.decoders.video(file, frames=frames, pad_mode="none", device=device))
        pipe.build()
        return pipe

    def _to_torch(self, out: Any, place: int) -> Tensor:
        # The pipeline reuses its buffer, hence the copy.
        if self._gpu:
            return torch.from_dlpack(out[place]).clone()
        return torch.from_numpy(np.array(out.at(place)))
