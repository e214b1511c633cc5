"""torchcodec: fast on the CPU, needs the release that fits torch and FFmpeg's shared libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError, reason
from tempo_fast.video.decoder import Item, check_refused, one_by_one, pick
from tempo_fast.video.probe import VideoInfo, check_indices, probe


class TorchCodecDecoder:
    """Exact seek mode; every frame's time must be nearest to the probe's for its number, since torchcodec's numbers go
    wrong where a container hides packets, and its seeks in damaged AVI. It applies quarter turns itself, mirror images
    it does not."""

    name = "torchcodec"
    route = "torchcodec"

    def __init__(self) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as e:
            raise InputError(
                "video.backend: torchcodec cannot be loaded; it takes the release that fits this torch, and FFmpeg's "
                f"shared libraries (apt install ffmpeg) ({reason(e)})"
            ) from e
        self._open = VideoDecoder

    def refuses(self, info: VideoInfo) -> str:
        """See ``Decoder.refuses``."""
        if info.has_edit_list:
            return "torchcodec counts the frames that an edit list hides"
        if info.mirrored:
            return "torchcodec does not mirror pictures"
        if info.video_streams > 1:
            return "torchcodec may take another of several video streams"
        if not info.indexed:
            return "torchcodec needs packets that are one shown frame each, with a time of its own"
        return ""

    def decode_many(self, items: Sequence[Item]) -> list[Tensor | DecodeError]:
        """See ``Decoder.decode_many``."""
        return one_by_one(self, items)

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """See ``Decoder.decode``."""
        info = probe(path)
        wanted = check_indices(info, indices)
        check_refused(self, info)
        distinct = sorted(set(wanted))
        try:
            # 0: as many threads as FFmpeg likes
            video = self._open(info.path, dimension_order="NHWC", seek_mode="exact", num_ffmpeg_threads=0)
            if video.metadata.num_frames != info.n_frames:
                raise DecodeError(
                    f"{info.path}: torchcodec counts {video.metadata.num_frames} frames where there are {info.n_frames}"
                )
            batch = video.get_frames_at(distinct)
            start = float(video.metadata.begin_stream_seconds_from_content or 0.0)
        except (RuntimeError, ValueError, IndexError) as e:
            raise DecodeError(f"{info.path}: torchcodec cannot decode it ({reason(e)})") from e
        times = np.asarray(info.pts_s)
        for index, seconds in zip(distinct, batch.pts_seconds.tolist(), strict=True):
            if np.abs(times - (seconds - start)).argmin() != index:
                raise DecodeError(f"{info.path}: torchcodec gave another frame for frame {index}")
        frames = batch.data
        if tuple(frames.shape[1:3]) != (info.height, info.width):
            raise DecodeError(f"{info.path}: torchcodec gave {tuple(frames.shape[1:3])} pixels, not its displayed size")
        return pick(frames, distinct, wanted)
