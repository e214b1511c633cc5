"""torchcodec: fast on the CPU, needs the release that fits torch and FFmpeg's shared libraries."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from tempo_fast.errors import InputError
from tempo_fast.video.container import DecodeError, reason
from tempo_fast.video.probe import check_indices, probe


class TorchCodecDecoder:
    """Exact seek mode; every frame's timestamp is held against the probe's, since torchcodec's frame numbers go wrong
    where a container hides packets. Such files are refused. It applies quarter turns itself, mirror images it does not,
    so those are refused too."""

    name = "torchcodec"
    route = "torchcodec"

    def __init__(self) -> None:
        try:
            from torchcodec.decoders import VideoDecoder
        except (ImportError, OSError, RuntimeError) as e:
            raise InputError(
                f"video.backend: torchcodec cannot be loaded beside this torch and FFmpeg ({reason(e)})"
            ) from e
        self._open = VideoDecoder

    def decode(self, path: str | os.PathLike[str], indices: Sequence[int]) -> Tensor:
        """See ``Decoder.decode``."""
        info = probe(path)
        wanted = check_indices(info, indices)
        if info.has_edit_list or info.mirrored:
            what = "its edit list hides frames" if info.has_edit_list else "it is shown mirrored"
            raise DecodeError(f"{info.path}: {what}, which torchcodec gets wrong; use video.backend pyav")
        distinct = sorted(set(wanted))
        try:
            video = self._open(info.path, dimension_order="NHWC", seek_mode="exact")
            if video.metadata.num_frames != info.n_frames:
                raise DecodeError(
                    f"{info.path}: torchcodec counts {video.metadata.num_frames} frames where there are {info.n_frames}"
                )
            batch = video.get_frames_at(distinct)
            start = float(video.metadata.begin_stream_seconds_from_content or 0.0)
        except (RuntimeError, ValueError, IndexError) as e:
            raise DecodeError(f"{info.path}: torchcodec cannot decode it ({reason(e)})") from e
        tolerance = 0.4 * info.duration_s / info.n_frames
        for index, seconds in zip(distinct, batch.pts_seconds.tolist(), strict=True):
            if abs(seconds - start - info.pts_s[index]) > tolerance:
                raise DecodeError(f"{info.path}: torchcodec gave another frame for frame {index}")
        frames = batch.data
        if tuple(frames.shape[1:3]) != (info.height, info.width):
            raise DecodeError(f"{info.path}: torchcodec gave {tuple(frames.shape[1:3])} pixels, not its displayed size")
        row = {index: k for k, index in enumerate(distinct)}
        return frames if wanted == distinct else frames[[row[i] for i in wanted]]
