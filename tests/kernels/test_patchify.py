"""patchify against a loop over patches and pixels written from the layout's definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
