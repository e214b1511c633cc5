"""Edits over frames: against a python loop, frame by frame, on random pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_fast.perturb import EDITS, KINDS, ClipOrder, perturb
from tempo_fast.video.edit import decode_once, edit_frames, spread_edit

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

kinds = st.sampled_from(KINDS + EDITS)
rs = st.sampled_from([2, 4, 8, 16])
relaxed = settings(deadline=None)


def draw(kind: str, n: int, r: int = 4, seed: int = 0, other: int | None = None) -> ClipOrder:
    edit = perturb(kind, n, r, seed, other=n if other is None else other)
    assert edit is not None
    return edit


def pixels(seed: int, n: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)  # no frame is black


def slow(frames: Tensor, edit: ClipOrder, other: Tensor) -> list[Tensor]:
    shown = []
    for k, i in enumerate(edit.order):
        if edit.blank and edit.blank[k]:
            shown.append(torch.zeros_like(frames[0]))
        else:
            shown.append(frames[i] if i < edit.n else other[i - edit.n])
    return shown


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["contiguous", "every second", "channels first", "flipped", "cropped", "expanded"])
@relaxed
@given(kind=kinds, n=st.integers(3, 20), r=rs, seed=st.integers(0, 1000), h=st.integers(1, 5), w=st.integers(1, 7))
def test_edit_frames_is_the_slow_loop(layout: str, device: str, kind: str, n: int, r: int, seed: int, h: int, w: int):
    """Whatever the strides of the input; the input is left alone."""

    def lay(x: Tensor) -> Tensor:
        if layout == "every second":
            return x.repeat_interleave(2, 0)[::2]
        if layout == "channels first":
            return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        if layout == "flipped":
            return x.flip(2).transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "cropped":
            return torch.nn.functional.pad(x, (0, 0, 2, 1, 1, 3))[:, 1:-3, 2:-1]
        return x[:1].expand(len(x), -1, -1, -1) if layout == "expanded" else x

    frames, other = lay(pixels(seed, n, h, w).to(device)), lay(pixels(seed + 1, n + 3, h, w).to(device))
    before = frames.clone()
    edit = draw(kind, n, r, seed, len(other))
    got = edit_frames(frames, edit, other)
    assert got.dtype == torch.uint8 and got.device == frames.device and got.shape == (len(edit.order), h, w, 3)
    assert torch.equal(got, torch.stack(slow(frames, edit, other)))
    assert torch.equal(frames, before)


@relaxed
@given(kind=kinds, lengths=st.lists(st.integers(1, 6), min_size=3, max_size=16), r=rs, seed=st.integers(0, 1000))
def test_spread_shows_each_clip_whole(kind: str, lengths: list[int], r: int, seed: int) -> None:
    """Clips of different lengths: the frames of the edited clips, one clip after the other, blank where the clip is."""
    n = len(lengths)
    other = [1 + (7 * i + seed) % 5 for i in range(n)]
    edit = draw(kind, n, r, seed)
    spread = spread_edit(edit, lengths, other)
    names = [(i, j) for i, length in enumerate([*lengths, *other]) for j in range(length)]
    shown = [(names[f], bool(spread.blank) and spread.blank[k]) for k, f in enumerate(spread.order)]
    expected = []
    for k, i in enumerate(edit.order):
        length = lengths[i] if i < n else other[i - n]
        expected += [((i, j), bool(edit.blank) and edit.blank[k]) for j in range(length)]
    assert shown == expected
    assert (spread.n, spread.kind, spread.r, spread.seed) == (sum(lengths), kind, r, seed)
    assert 0 <= spread.broken <= 1 and 0 <= spread.kept <= 1
    if max(edit.order) < n:
        assert spread_edit(edit, lengths) == spread
    if kind in KINDS:
        assert not spread.blank


@relaxed
@given(kind=kinds, n=st.integers(3, 40), seed=st.integers(0, 1000))
def test_spread_over_clips_of_one_frame_is_the_edit(kind: str, n: int, seed: int) -> None:
    edit = draw(kind, n, 4, seed)
    assert spread_edit(edit, [1] * n, [1] * n) == edit


@relaxed
@given(kind=kinds, lengths=st.lists(st.integers(1, 4), min_size=3, max_size=8), seed=st.integers(0, 1000))
def test_decoded_once_is_enough(kind: str, lengths: list[int], seed: int) -> None:
    """Indexing the distinct visible frames of both videos, and blanking, gives the edited video; none is in vain."""
    edit = spread_edit(draw(kind, len(lengths), 4, seed), lengths, lengths)
    frames, other = pixels(seed, edit.n, 2, 3), pixels(seed + 1, edit.n, 2, 3)
    needed, index = decode_once(edit)
    assert needed == sorted(set(needed)) and len(index) == len(edit.order)
    blank = torch.tensor(edit.blank or [False] * len(index))
    assert {k for k, hidden in zip(index, blank.tolist(), strict=True) if not hidden} == set(range(len(needed)))
    decoded = torch.cat([frames, other])[needed]
    assert torch.equal(decoded[index].masked_fill(blank[:, None, None, None], 0), edit_frames(frames, edit, other))


def test_wrong_lengths_are_named() -> None:
    edit = draw("splice", 6, 2, 0)
    with pytest.raises(ValueError, match="5 lengths for 6 clips"):
        spread_edit(edit, [2] * 5, [2] * 6)
    with pytest.raises(ValueError, match="at least one frame"):
        spread_edit(edit, [2, 2, 0, 2, 2, 2], [2] * 6)
    with pytest.raises(ValueError, match="splice needs .* clips of another video, got 0 other_lengths"):
        spread_edit(edit, [2] * 6)


def test_wrong_frames_are_named() -> None:
    frames = pixels(0, 6, 4, 4)
    splice, mask = draw("splice", 6, 2, 0), draw("mask", 6, 2, 0)
    for bad in (frames.float(), frames[0], frames.permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            edit_frames(bad, mask)
        with pytest.raises(ValueError, match="other must be uint8"):
            edit_frames(frames, splice, bad)
    with pytest.raises(ValueError, match="5 frames for an edit over 6"):
        edit_frames(frames[:5], mask)
    with pytest.raises(ValueError, match="splice.*other is None"):
        edit_frames(frames, splice)
    needed = max(splice.order) - 5
    with pytest.raises(ValueError, match=f"at least {needed} frames"):
        edit_frames(frames, splice, frames[: needed - 1])
    with pytest.raises(ValueError, match="splice needs"):
        edit_frames(frames, splice, pixels(1, 6, 4, 5))
