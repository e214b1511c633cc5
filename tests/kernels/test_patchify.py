"""patchify against a loop over patches and pixels written from the layout's definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempo_kernels.patchify import patchify

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def slow(frames: Tensor, patch: int, merge: int, temporal: int) -> list[list[float]]:
    """Rows over (time, block row, block column, row in block, column in block); values over (channel, frame, y, x)."""
    f, height, width, _ = frames.shape
    pixel = frames.tolist()
    rows = []
    for t in range(-(-f // temporal)):
        for top in range(0, height, patch * merge):
            for left in range(0, width, patch * merge):
                for my in range(merge):
                    for mx in range(merge):
                        row = []
                        for c in range(3):
                            for k in range(temporal):
                                image = pixel[min(t * temporal + k, f - 1)]
                                for y in range(patch):
                                    for x in range(patch):
                                        value = image[top + my * patch + y][left + mx * patch + x][c]
                                        row.append((value / 255 - MEAN[c]) / STD[c])
                        rows.append(row)
    return rows


def random_frames(f: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (f, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=20, deadline=None)
@given(
    f=st.integers(1, 5), h=st.integers(1, 3), w=st.integers(1, 3), patch=st.sampled_from([1, 2, 3]),
    merge=st.sampled_from([1, 2]), temporal=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99),
)
def test_equals_the_loop(f: int, h: int, w: int, patch: int, merge: int, temporal: int, seed: int) -> None:
    frames = random_frames(f, h * patch * merge, w * patch * merge, seed)
    found = patchify(frames, patch=patch, merge=merge, temporal=temporal, mean=MEAN, std=STD)
    expected = torch.tensor(slow(frames, patch, merge, temporal), dtype=torch.float64)
    assert found.shape == (-(-f // temporal) * h * w * merge * merge, 3 * temporal * patch * patch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_round_the_float32_result_once(dtype: torch.dtype) -> None:
    frames = random_frames(3, 12, 8)
    options = {"patch": 2, "merge": 2, "temporal": 2, "mean": MEAN, "std": STD}
    exact = patchify(frames, **options)
    assert torch.equal(patchify(frames, dtype=dtype, **options), exact.to(dtype))


def test_frames_that_are_not_contiguous() -> None:
    frames = random_frames(4, 8, 12)
    turned = frames.transpose(1, 2)
    options = {"patch": 2, "merge": 2, "temporal": 2, "mean": MEAN, "std": STD}
    assert torch.equal(patchify(turned, **options), patchify(turned.contiguous(), **options))
    assert torch.equal(patchify(frames[::2], **options), patchify(frames[::2].clone(), **options))


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(2, 8, 8, 3),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(2, 8, 10, 3, dtype=torch.uint8),
        torch.zeros(0, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_what_cannot_be_cut_is_refused(frames: Tensor) -> None:
    with pytest.raises(ValueError):
        patchify(frames, patch=2, merge=2, temporal=2, mean=MEAN, std=STD)


@settings(max_examples=30, deadline=None)
@given(
    f=st.integers(1, 4), shown=st.integers(1, 7), temporal=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), blanks=st.booleans(),
)  # fmt: skip
def test_chosen_and_black_frames(
    f: int, shown: int, temporal: int, seed: int, dtype: torch.dtype, blanks: bool
) -> None:
    """As if the frames had been copied in that order and blackened first."""
    frames, g = random_frames(f, 8, 12, seed), torch.Generator().manual_seed(seed)
    index = torch.randint(0, f, (shown,), generator=g)
    blank = torch.rand(shown, generator=g) < 0.4 if blanks else None
    copied = frames[index]
    if blank is not None:
        copied[blank] = 0
    options = {"patch": 2, "merge": 2, "temporal": temporal, "mean": MEAN, "std": STD, "dtype": dtype}
    found = patchify(frames, index=index, blank=blank, **options)
    assert torch.equal(found, patchify(copied, **options))


def test_black_without_an_index() -> None:
    frames = random_frames(3, 4, 4)
    options = {"patch": 2, "merge": 2, "temporal": 2, "mean": MEAN, "std": STD}
    found = patchify(frames, blank=torch.tensor([False, False, True]), **options)
    assert torch.equal(found[:4], patchify(frames[:2], **options))
    # the last frame is black and fills the patch: one value per channel
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    torch.testing.assert_close(found[4:].view(4, 3, 8), black.view(1, 3, 1).expand(4, 3, 8))


class Memory(TorchDispatchMode):
    """Bytes of each storage that an operation brought into the world."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.kept.append(tensor)  # so that no address is used twice
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", [False, True])
def test_memory_is_the_result_and_one_temporal_patch(dtype: torch.dtype, chosen: bool) -> None:
    frames = random_frames(16, 32, 48)
    index = torch.arange(15, -1, -1) if chosen else None
    with Memory() as memory:
        out = patchify(frames, patch=4, merge=2, temporal=2, mean=MEAN, std=STD, dtype=dtype, index=index)
    del memory.sizes[frames.untyped_storage().data_ptr()]  # its views
    result = memory.sizes.pop(out.untyped_storage().data_ptr())
    assert result == out.numel() * out.element_size()
    part = frames[:2].numel()
    # the bytes of two frames, cut, and their float32 where the result is something else
    assert sum(memory.sizes.values()) < part * (1 if dtype == torch.float32 else 5) + 1000


def test_wrong_choices_are_refused() -> None:
    frames = random_frames(3, 4, 4)
    options = {"patch": 2, "merge": 2, "temporal": 2, "mean": MEAN, "std": STD}
    with pytest.raises(ValueError, match="index 3 is outside the 3 frames"):
        patchify(frames, index=torch.tensor([0, 3]), **options)
    with pytest.raises(ValueError, match="index -1 is outside the 3 frames"):
        patchify(frames, index=torch.tensor([-1, 2]), **options)
    for index in (torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="int64 index"):
            patchify(frames, index=index, **options)
    for blank in (torch.tensor([True, False]), torch.tensor([0, 0, 1])):
        with pytest.raises(ValueError, match=r"bool blank \[3\]"):
            patchify(frames, blank=blank, **options)
    with pytest.raises(ValueError, match="impl must be one of"):
        patchify(frames, impl="cuda", **options)
    with pytest.raises(ValueError, match="not possible: the frames are on cpu"):
        patchify(frames, impl="triton", **options)
