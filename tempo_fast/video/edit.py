"""A perturbation laid over frames: which decoded frame stands at each place, and which places are blank.

All of it is index arithmetic, so that each needed frame is decoded and resized once and then indexed where it is.
An edited video is told as if its frames came evenly at the sampled rate, as ``VideoReader.plan_clips`` tells it: shown
frame k at k / fps seconds. Its timestamps ascend whatever is shown, and do not give the edit away.

Shapes: F frames, S frames shown, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tempo_fast.perturb import ClipOrder


def spread_edit(edit: ClipOrder, lengths: Sequence[int], other_lengths: Sequence[int] = ()) -> ClipOrder:
    """An edit over clips as one over their frames, each clip's frames in order.

    An edit of ``perturb.EDITS`` shows n clips; as many frames as before only where the clips it exchanges are as long.

    Args:
        edit: over n clips.
        lengths: frames of each clip, n numbers >= 1. Frame j of clip i is frame lengths[0] + ... + lengths[i-1] + j.
        other_lengths: likewise of the other video's clips, as many as the edit needs; their frames come after.

    Returns:
        The edit over n = sum(lengths) frames, of the same kind, r and seed; its ``broken`` and ``kept`` count frames.

    Raises:
        ValueError: a wrong number of lengths, a length below 1, or too few clips of the other video.
    """
    if len(lengths) != edit.n:
        raise ValueError(f"{len(lengths)} lengths for {edit.n} clips")
    counts = [*lengths, *other_lengths]
    if any(count < 1 for count in counts):
        raise ValueError(f"a clip has at least one frame, got lengths {counts}")
    if max(edit.order) >= len(counts):
        needed = max(edit.order) - edit.n + 1
        raise ValueError(f"{edit.kind} needs {needed} clips of another video, got {len(other_lengths)} other_lengths")
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    order = tuple(frame for i in edit.order for frame in range(starts[i], starts[i + 1]))
    blank = tuple(hidden for i, hidden in zip(edit.order, edit.blank, strict=False) for _ in range(counts[i]))
    return replace(edit, n=sum(lengths), order=order, blank=blank)


def decode_once(edit: ClipOrder) -> tuple[list[int], list[int]]:
    """What to decode for an edit over frames, and where each shown frame is found in it.

    Returns:
        (needed, index): the distinct source frames that are visible, ascending, the other video's (n + j) hence last;
        and per shown frame its place among them, 0 where it is blank.
    """
    needed = sorted(edit.visible)
    place = {frame: k for k, frame in enumerate(needed)}
    blank = edit.blank or (False,) * len(edit.order)
    return needed, [0 if hidden else place[i] for i, hidden in zip(edit.order, blank, strict=True)]


def edit_frames(frames: Tensor, edit: ClipOrder, other: Tensor | None = None) -> Tensor:
    """The edited video: frames in the edit's order, blank ones black (zero).

    Args:
        frames: uint8 [F, H, W, 3], F = edit.n, on any device.
        edit: over frames, by any kind of ``perturb.KINDS`` or ``perturb.EDITS``, or by ``spread_edit``.
        other: uint8 [F', H, W, 3] on the same device, the other video of a splice.

    Returns:
        uint8 [S, H, W, 3], a new tensor on the device of ``frames``.

    Raises:
        ValueError: a wrong dtype or shape, F != edit.n, or the other video missing, too short, or of another size or
            device.
    """
    _check("frames", frames)
    if len(frames) != edit.n:
        raise ValueError(f"{len(frames)} frames for an edit over {edit.n}")
    foreign = [k for k, i in enumerate(edit.order) if i >= edit.n]
    shown = frames.index_select(0, _index([i if i < edit.n else 0 for i in edit.order], frames))
    if foreign:
        needed = max(edit.order) - edit.n + 1
        if other is None:
            raise ValueError(f"{edit.kind}: the edit shows frames of another video, and other is None")
        _check("other", other)
        if len(other) < needed or other.shape[1:] != frames.shape[1:] or other.device != frames.device:
            raise ValueError(
                f"other is {list(other.shape)} on {other.device}, {edit.kind} needs at least {needed} frames of "
                f"{list(frames.shape[1:])} on {frames.device}"
            )
        source = other.index_select(0, _index([edit.order[k] - edit.n for k in foreign], frames))
        shown.index_copy_(0, _index(foreign, frames), source)
    return shown.index_fill_(0, _index([k for k, hidden in enumerate(edit.blank) if hidden], frames), 0)


def _check(name: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"{name} must be uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}")


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=like.device)
