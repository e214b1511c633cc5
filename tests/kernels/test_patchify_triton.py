"""The Triton patchify against its torch twin, bit for bit: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1),
else skipped.

Sizes: patches that fill no power of two, more patches than a strip and fewer, several blocks per patch, odd counts of
frames, a single row. The interpreter cuts float32 to bfloat16 where a GPU rounds, so the expectation is cut there too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tempo_kernels import fused
from tempo_kernels.patchify import patchify

CUDA = torch.cuda.is_available()
if not (CUDA or fused.interpreted()):
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# patch, merge, temporal, frames, height, width
GEOMETRIES = [
    (14, 2, 2, 3, 28, 56),  # Qwen2-VL, an odd count of frames
    (16, 2, 2, 2, 32, 32),  # Qwen3-VL
    (20, 1, 1, 3, 20, 20),  # a frame is a row
    (27, 1, 1, 2, 27, 27),
    (3, 3, 4, 5, 9, 27),
    (14, 1, 2, 1, 14, 14),  # one row
    (1, 1, 1, 1, 1, 1),
]


def make(f: int, h: int, w: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (f, h, w, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def check(
    frames: Tensor, patch: int, merge: int, temporal: int, dtype: torch.dtype,
    view: Callable[[Tensor], Tensor] = lambda x: x, **options: Any,
) -> None:  # fmt: skip
    """Equal bits; ``view`` of the frames, so that strides survive the way to the device."""
    options = {"patch": patch, "merge": merge, "temporal": temporal, **CLIP, **options}
    expected = patchify(view(frames), impl="torch", **options)
    if dtype == torch.bfloat16 and not CUDA:
        expected = (expected.view(torch.int32) & -65536).view(torch.float32)
    found = patchify(view(frames.to(DEVICE)), dtype=dtype, impl="triton", **options)
    assert found.dtype == dtype and torch.equal(found.cpu(), expected.to(dtype))


@pytest.mark.parametrize(
    "geometry, dtype",
    [(geometry, dtype) for geometry in GEOMETRIES for dtype in (torch.float32, torch.bfloat16)]
    + [(GEOMETRIES[i], dtype) for i in (2, 4) for dtype in (torch.float16, torch.float64)],
)
def test_equals_the_twin(geometry: tuple[int, ...], dtype: torch.dtype) -> None:
    patch, merge, temporal, f, h, w = geometry
    check(make(f, h, w), patch, merge, temporal, dtype)


@pytest.mark.parametrize("geometry", [GEOMETRIES[2], GEOMETRIES[4], (5, 2, 2, 3, 10, 20)])
@pytest.mark.parametrize("with_index, with_blank", [(True, False), (False, True), (True, True)])
def test_chosen_and_black_frames(geometry: tuple[int, ...], with_index: bool, with_blank: bool) -> None:
    patch, merge, temporal, f, h, w = geometry
    g = torch.Generator().manual_seed(1)
    index = torch.tensor([f - 1, 0, 0, f - 1, f // 2]) if with_index else None
    shown = f if index is None else len(index)
    blank = torch.rand(shown, generator=g) < 0.5 if with_blank else None
    for dtype in (torch.float32, torch.bfloat16):
        check(make(f, h, w), patch, merge, temporal, dtype, index=index, blank=blank)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[::2], lambda x: x[1:, 3:11, 2:14], lambda x: x.transpose(1, 2), lambda x: x.expand(2, -1, -1, -1)],
    ids=["frames", "crop", "turned", "one frame twice"],
)
def test_strides(view: Callable[[Tensor], Tensor]) -> None:
    frames = make(1, 8, 16) if view(torch.zeros(1, 1, 1, 1)).shape[0] == 2 else make(3, 12, 16)
    check(frames, 4, 1, 2, torch.float32, view=view)


@pytest.mark.parametrize("seed", range(4))
def test_every_value_is_divided_as_torch_divides(seed: int) -> None:
    """All 256 values of each channel, by the families' constants and by random ones."""
    g = torch.Generator().manual_seed(seed)
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    random = {"mean": torch.rand(3, generator=g).tolist(), "std": (0.05 + torch.rand(3, generator=g)).tolist()}
    check(frames, 16, 1, 1, torch.float32, **(random if seed > 1 else [CLIP, HALF][seed]))


def test_a_frame_that_is_not_there_is_nan_where_it_cannot_be_checked() -> None:
    """An index on the device is not waited for."""
    if not CUDA:
        with pytest.raises(ValueError, match="outside the 3 frames"):
            patchify(make(3, 4, 4), patch=2, merge=2, temporal=1, index=torch.tensor([0, 3]), impl="triton", **CLIP)
        return
    index = torch.tensor([0, 3, -1, 2], device=DEVICE)
    found = patchify(make(3, 4, 4).to(DEVICE), patch=2, merge=2, temporal=1, index=index, **CLIP).view(4, -1)
    assert found.isnan().all(1).tolist() == [False, True, True, False]
    assert not found[[0, 3]].isnan().any()


def test_auto_takes_the_kernel_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from tempo_kernels.pixels import launch

    calls, run = [], launch.patchify
    monkeypatch.setattr(launch, "patchify", lambda *a, **k: calls.append(a) or run(*a, **k))
    for impl in ("auto", "torch"):
        patchify(make(1, 4, 4).to(DEVICE), patch=2, merge=2, temporal=1, impl=impl, **CLIP)
        assert len(calls) == 1


@pytest.mark.skipif(not CUDA, reason="needs gigabytes of a GPU")
def test_more_than_31_bits() -> None:
    """Offsets beyond 2^31 in what is read (3600 frames) and in what is written."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB")
    side = 448
    frames = torch.zeros(3600, side, side, 3, dtype=torch.uint8, device=DEVICE)
    last = make(2, side, side).to(DEVICE)
    frames[-2:] = last
    options = {"patch": 14, "merge": 2, "temporal": 2, "dtype": torch.bfloat16, **CLIP}
    found = patchify(frames, **options)
    assert frames.numel() > 2**31 and found.numel() > 2**31
    expected = patchify(last.cpu(), **options)
    assert torch.equal(found[-len(expected) :].cpu(), expected)
