"""The gate on the Triton kernels where there is no GPU: each configuration in use compiles for its architecture, stays
in registers, and, where it multiplies matrices, uses the tensor cores and copies that its architecture has for it."""

from __future__ import annotations

import os

import pytest
import torch

from bench.compile import KINDS, blocks_per_sm, cases, compile_case, verdict

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)


@pytest.fixture(autouse=True)
def _today_s_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_configuration_in_use(sm: int, kind: str) -> None:
    for case in cases([sm], [kind], candidates=False):
        row = compile_case(case)
        assert verdict(row) == "", row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patches_of_other_dtypes(dtype: torch.dtype) -> None:
    for case in cases([80, 90], ["patchify"], candidates=False):
        row = compile_case(case, dtype)
        assert verdict(row) == "" and row["dtype"] in str(dtype), row


def test_what_the_gate_catches() -> None:
    counts = {"wgmma": 4, "tcgen05": 0, "mma": 0, "tma_load": 6, "tma_store": 1, "cp_async": 0, "local": 0}
    good = {"case": "sm90", "stack_bytes": 0, "local_bytes": 0, "blocks_per_sm": 1, "instructions": counts}
    good |= {"matrices": True}
    assert verdict(good) == ""
    assert "local memory" in verdict(good | {"stack_bytes": 8})
    assert "local memory" in verdict(good | {"instructions": counts | {"local": 2}})
    assert "wgmma" in verdict(good | {"instructions": counts | {"tma_load": 0}})
    assert "wgmma" in verdict(good | {"instructions": counts | {"wgmma": 0, "mma": 64}})
    assert "tcgen05" in verdict(good | {"case": "sm100"})
    assert "cp.async" in verdict(good | {"case": "sm80"})
    assert "fit" in verdict(good | {"blocks_per_sm": 0})
    pixels = good | {"matrices": False, "instructions": dict.fromkeys(counts, 0)}
    assert verdict(pixels) == "" and "wgmma" in verdict(pixels | {"matrices": True})
    assert "local memory" in verdict(pixels | {"local_bytes": 16})


def test_a_tile_that_spills_is_seen() -> None:
    """The counts above come from real machine code: a tile too large for the registers must fail."""
    from tempo_kernels.fused.tiles import Tile

    case = next(iter(cases([90], ["pair_statistics"], candidates=False)))
    row = compile_case(case._replace(tile=Tile(128, 256, 64, 2, 8)))
    assert "local memory" in verdict(row)


def test_blocks_per_multiprocessor() -> None:
    assert blocks_per_sm(90, 255, 100, 256) == 1  # 256 registers of 256 threads are all there are
    assert blocks_per_sm(90, 128, 100, 256) == 2
    assert blocks_per_sm(90, 32, 113, 128) == 2 and blocks_per_sm(90, 32, 114, 128) == 1
    assert blocks_per_sm(80, 32, 113, 128) == 1
    assert blocks_per_sm(80, 32, 1, 1024) == 2
