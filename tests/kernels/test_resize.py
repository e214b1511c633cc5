"""The integer resize against torch's own on the CPU, bit for bit, in both memory formats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tempo_kernels.pixels.taps import make_taps
from tempo_kernels.resize import resize


def make(kind: str, f: int, h: int, w: int, seed: int) -> Tensor:
    """noise: every level; edges: 0 and 255 alone, which overshoot and are clamped."""
    x = torch.randint(0, 256, (f, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (x > 127).to(torch.uint8) * 255 if kind == "edges" else x


def by_torch(frames: Tensor, height: int, width: int, contiguous: bool) -> Tensor:
    x = frames.permute(0, 3, 1, 2)
    x = x.contiguous() if contiguous else x
    return F.interpolate(x, size=(height, width), mode="bicubic", antialias=True).permute(0, 2, 3, 1)


def check(frames: Tensor, height: int, width: int) -> None:
    found = resize(frames, height, width, impl="torch")
    assert found.dtype == torch.uint8 and found.shape == (len(frames), height, width, 3)
    assert torch.equal(found, by_torch(frames, height, width, contiguous=False))
    if width > 1:  # torch's contiguous format goes wrong on some CPUs there, see resize
        assert torch.equal(found, by_torch(frames, height, width, contiguous=True))


SIDE = st.one_of(st.integers(1, 5), st.integers(1, 80), st.integers(1, 300))


@settings(max_examples=150, deadline=None)
@given(
    h=SIDE, w=SIDE, height=SIDE, width=SIDE, keep=st.sampled_from(["", "", "h", "w"]),
    kind=st.sampled_from(["noise", "edges"]), seed=st.integers(0, 999),
)  # fmt: skip
def test_equals_torch(h: int, w: int, height: int, width: int, keep: str, kind: str, seed: int) -> None:
    height, width = h if keep == "h" else height, w if keep == "w" else width
    check(make(kind, 2, h, w, seed), height, width)


# as videos have them, and ratios at the ends of what can be
@pytest.mark.parametrize(
    "size, target",
    [
        ((720, 1280), (476, 840)), ((360, 640), (364, 644)), ((480, 854), (448, 448)), ((1080, 1920), (28, 56)),
        ((1, 2000), (1, 3)), ((2000, 1), (3, 1)), ((3, 2), (700, 1)), ((1, 1), (5, 900)), ((2048, 3), (2, 3)),
        ((99, 100), (100, 99)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["noise", "edges"])
def test_sizes_of_videos_and_extremes(size: tuple[int, int], target: tuple[int, int], kind: str) -> None:
    check(make(kind, 1, *size, seed=1), *target)


@settings(max_examples=100, deadline=None)
@given(n_in=st.integers(1, 3000), n_out=st.integers(1, 3000))
def test_taps(n_in: int, n_out: int) -> None:
    """Windows lie inside the input and move forward; weights are those of a mean, as exact as 16 bits allow."""
    first, weights, precision = make_taps(n_in, n_out)
    taps = weights.shape[0]
    assert weights.shape == (taps, n_out) and first.shape == (n_out,)
    assert int(first.min()) >= 0 and int(first.max()) + taps <= n_in and bool((first.diff() >= 0).all())
    total = weights.long().sum(0)
    assert int((total - 2**precision).abs().max()) <= taps / 2
    # one bit more would not fit, or would be more than there are
    assert precision == 22 or int(weights.max()) * 2 + 1 >= 2**15
    # the sums of the kernels stay in 32 bits
    assert int(weights.long().abs().sum(0).max()) * 255 + 2**precision < 2**31


def test_frames_that_are_not_contiguous() -> None:
    frames = make("noise", 4, 40, 30, 0)
    for part in (frames[::2], frames[:, 3:35, 5:25], frames.transpose(1, 2), frames.flip(-1)):
        assert torch.equal(resize(part, 17, 23), resize(part.contiguous(), 17, 23))


def test_the_same_size_is_no_work() -> None:
    frames = make("noise", 2, 9, 7, 0)
    assert resize(frames, 9, 7).data_ptr() == frames.data_ptr()


@pytest.mark.parametrize(
    "frames, height, width",
    [
        (torch.zeros(1, 4, 4, 3), 2, 2),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), 2, 2),
        (torch.zeros(1, 4, 4, 4, dtype=torch.uint8), 2, 2),
        (torch.zeros(1, 0, 4, 3, dtype=torch.uint8), 2, 2),
        (torch.zeros(1, 4, 4, 3, dtype=torch.uint8), 0, 2),
    ],
)
def test_what_cannot_be_resized_is_refused(frames: Tensor, height: int, width: int) -> None:
    with pytest.raises(ValueError):
        resize(frames, height, width)
