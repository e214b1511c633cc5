"""NVIDIA DALI: the same graph on the GPU (NVDEC) and on the CPU.

``dali-cpu`` reads VP8, VP9 and MJPEG only; it is there so that the graph can be tested without a GPU, and is slower
than PyAV. ``dali-gpu`` is the same graph with its decoder on ``mixed``; it has not been run on a GPU yet, so its speed
and its colour conversion are unknown.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError, reason
from tempo_fast.video.probe import VideoInfo, check_indices, probe

_CPU_CODECS = {"vp8", "vp9", "mjpeg", "libvpx", "libvpx-vp9"}


class DaliDecoder:
    """One pipeline of one sample: the file's bytes and the frame numbers in, uint8 frames out.

    DALI fills frame numbers out of range with black by default (``pad_mode='none'`` is set), counts hidden packets of
    an edit list, and was never seen with a display matrix; such files are refused. An error leaves a DALI pipeline
    unusable, so that it is built anew for the next file.
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
        self._device_id = (device.index or 0) if gpu else None
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """See ``Decoder.decode``. The frames lie on the GPU for ``dali-gpu``."""
        info = probe(path)
        wanted = check_indices(info, indices)
        self._refuse(info)
        distinct = sorted(set(wanted))
        try:
            data = np.fromfile(info.path, dtype=np.uint8)
            with self._lock:
                pipe = self._built()
                pipe.feed_input("file", [data])
                pipe.feed_input("frames", [np.asarray(distinct, dtype=np.int32)])
                (out,) = pipe.run()
                frames = self._to_torch(out)
        except (RuntimeError, OSError) as e:
            self._pipeline = None
            raise DecodeError(f"{info.path}: DALI cannot decode it ({reason(e)})") from e
        if tuple(frames.shape) != (len(distinct), info.height, info.width, 3):
            raise DecodeError(f"{info.path}: DALI gave {tuple(frames.shape)} for {len(distinct)} frames")
        row = {index: k for k, index in enumerate(distinct)}
        return frames if wanted == distinct else frames[[row[i] for i in wanted]]

    def _refuse(self, info: VideoInfo) -> None:
        if not self._gpu and info.codec not in _CPU_CODECS:
            raise DecodeError(
                f"{info.path}: dali-cpu reads VP8, VP9 and MJPEG only, not {info.codec}; use pyav or dali-gpu"
            )
        if info.rotation or info.mirrored:
            raise DecodeError(f"{info.path}: it is shown turned or mirrored, which {self.name} may ignore; use pyav")
        if info.has_edit_list:
            raise DecodeError(f"{info.path}: its edit list hides frames, which {self.name} gets wrong; use pyav")

    def _built(self) -> Any:
        if self._pipeline is None:
            fn, types = self._fn, self._types
            pipe = self._pipeline_class(batch_size=1, num_threads=2, device_id=self._device_id, prefetch_queue_depth=1)
            with pipe:
                file = fn.external_source(name="file", device="cpu", dtype=types.UINT8, ndim=1)
                frames = fn.external_source(name="frames", device="cpu", dtype=types.INT32, ndim=1)
                device = "mixed" if self._gpu else "cpu"
                pipe.set_outputs(fn.decoders.video(file, frames=frames, pad_mode="none", device=device))
            pipe.build()
            self._pipeline = pipe
        return self._pipeline

    def _to_torch(self, out: Any) -> Tensor:
        if self._gpu:
            # The pipeline reuses its buffer, hence the copy.
            return torch.from_dlpack(out[0]).clone()
        return torch.from_numpy(np.array(out.at(0)))
