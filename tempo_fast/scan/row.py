"""What is found out about one file, and its repair: the part of a scan that runs in worker processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.models.family import VideoGeometry
from tempo_fast.scan.rows import Row
from tempo_fast.video.container import DecodeError, open_video
from tempo_fast.video.frames import intact_frames, not_of_the_file
from tempo_fast.video.probe import VideoInfo
from tempo_fast.video.reader import VideoReader
from tempo_fast.video.repair import RepairConfig, longest_gop, repair
from tempo_fast.video.sampling import thin

Decode = Literal["none", "sampled", "all"]
TRIED_FRAMES = 16
"""Most of the sampled frames that are decoded to find damage and to measure: all would cost what an epoch costs."""


class Job(NamedTuple):
    """A file to look at, or with ``repair`` to copy for the reason ``why`` ("": it is damaged)."""

    path: str
    repair: bool = False
    why: str = ""
    limit_s: float = 60.0


@dataclass(frozen=True)
class Shared:
    """What every job needs."""

    video: VideoConfig
    geometry: VideoGeometry
    decode: Decode
    repair: RepairConfig
    folder: str = ""
    scratch: str = ""


def work(job: Job, shared: Shared, report: Callable[[Row], None]) -> Row:
    """One job in a worker; raises InputError only for what is wrong with the whole scan, such as a full disk."""
    torch.set_num_threads(1)
    if not job.repair:
        return scan_video(job.path, VideoReader(shared.video, shared.geometry), decode=shared.decode, report=report)
    made = repair(job.path, shared.folder, job.why, shared.repair, scratch=shared.scratch)
    row = {"fix": made.kind, "fixed": made.path, "fix_reason": made.reason}
    return row | ({"fix_failure": made.failure} if made.failure else {})


def scan_video(
    path: str | os.PathLike[str],
    reader: VideoReader,
    *,
    decode: Decode = "sampled",
    report: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Facts of the file, its cost in tokens and decoding, ``ok``, and ``reason`` where it is not; ``failure`` where
    that is not about the file's bytes: "io", "memory", or "refused" by the model's rules.

    ``frames_to_decode`` are the most frames that a decoder goes through to reach the sampled ones (some leave out those
    that no other refers to), and ``decode_s`` the seconds that this takes here, with conversion to RGB: measured on up
    to 16 of them and the last frame of the file, and scaled. It is measured while other workers run, each with the
    threads that FFmpeg takes for large pictures: an upper bound too. ``decode`` "all" also decodes every frame; "none"
    decodes nothing more than the probe does. ``report`` is given the row as it is before decoding.
    """
    path = os.fspath(path)
    row: Row = {"video": path, "ok": False, "reason": ""}
    if not _can_be_listed(path):
        return row | {"reason": "has a name that a text file with one path a line cannot hold"}
    try:
        stat = os.stat(path)
        row |= {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    except OSError:  # the probe says what it is
        pass
    try:
        info = reader.info(path)
        row |= {
            "codec": info.codec, "profile": info.profile, "width": info.width, "height": info.height,
            "fps": round(info.fps, 3), "frames": info.n_frames, "duration_s": round(info.duration_s, 3),
            "rotation": info.rotation, "mirrored": info.mirrored, "edit_list": info.has_edit_list, "vfr": info.vfr,
            "has_audio": info.has_audio, "color_space": info.color_space, "color_range": info.color_range,
            "longest_gop": longest_gop(info), "digest": info.digest,
        }  # fmt: skip
        plan = reader.plan(path)
        cost = frames_to_decode(info, plan.indices)
        row |= {
            "sampled_frames": len(plan.indices), "resized": [plan.width, plan.height],
            "tokens": reader.geometry.tokens(plan.grid), "frames_to_decode": cost,
        }  # fmt: skip
        if decode != "none":
            report(row)
            tried = sorted({*thin(plan.indices, TRIED_FRAMES), info.n_frames - 1})
            began = time.perf_counter()
            reader.frames(reader.plan(path, tried))
            took = time.perf_counter() - began
            row["decode_s"] = round(took * cost / frames_to_decode(info, tried), 4)
        if decode == "all":
            _decode_all(info)
        row["ok"] = True
    except (InputError, OSError, MemoryError) as e:
        if isinstance(e, InputError):
            row["reason"] = str(e).removeprefix(f"{path}: ")
        else:
            row["reason"] = f"cannot be read ({e.strerror})" if isinstance(e, OSError) else "does not fit into memory"
        # "refused": whole, but nothing for this model: an aspect ratio of 1000
        failure = not_of_the_file(e) or ("" if isinstance(e, DecodeError) else "refused")
        row |= {"failure": failure} if failure else {}
    return row


def _can_be_listed(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8
        return False
    return path.splitlines() == [path]


def frames_to_decode(info: VideoInfo, indices: Sequence[int]) -> int:
    """Most frames decoded to reach the given ones in order: from the keyframe before each, or on from the last one
    reached where no keyframe lies between; from the start where frames have no index."""
    distinct = sorted(set(indices))
    if not info.indexed:
        return distinct[-1] + 1
    total, at, keys = 0, -1, list(info.keyframes)
    key = 0
    for index in distinct:
        while key + 1 < len(keys) and keys[key + 1] <= index:
            key += 1
        start = max(keys[key], at + 1)
        total += index - start + 1
        at = index
    return total


def _decode_all(info: VideoInfo) -> None:
    n = 0
    try:
        with open_video(info.path) as (container, stream):
            for _ in intact_frames(info.path, container, stream):
                n += 1
    except DecodeError as e:
        said = str(e).removeprefix(f"{info.path}: ")
        raise DecodeError(f"{info.path}: is damaged after {n} of {info.n_frames} frames ({said})") from e
    if n != info.n_frames:
        raise DecodeError(f"{info.path}: is damaged ({n} of {info.n_frames} frames can be decoded)")
