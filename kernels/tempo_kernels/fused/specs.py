"""The constants each kernel is compiled with: one place for the launcher and for compiling without a GPU."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from tempo_kernels.fused import kernels
from tempo_kernels.fused.tiles import Tile

KERNELS = {
    "exp_slab": kernels.exp_slab_kernel,
    "statistics": kernels.pair_statistics_kernel,
    "pair_statistics": kernels.pair_statistics_kernel,
    "gradient": kernels.grad_slab_kernel,
    "pair_gradient": kernels.grad_slab_kernel,
    "accumulate": kernels.accumulate_kernel,
}
SLAB = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def constants(
    kind: str, tile: Tile, dtype: torch.dtype, tma: bool, *,
    store: bool = False, cross: bool = False, kl: bool = False, bias: bool = False, cap: bool = False,
    add: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A kernel's constexpr arguments. `store`: exp_slab; `cross`: statistics; `kl`: gradients; `add`: accumulate."""
    # the interpreter and tests alone use float32: nothing but full precision will do there
    shared: dict[str, Any] = {"TMA": tma, "PRECISION": "ieee" if dtype == torch.float32 else "tf32"}
    if kind == "accumulate":
        return {"BN": tile.rows, "BD": tile.cols, "BC": tile.depth, "ADD": add, **shared}
    shared |= {"BN": tile.rows, "BV": tile.cols, "BK": tile.depth}
    if kind == "exp_slab":
        return {"STORE": store, "SLAB": SLAB[dtype], **shared}
    shared |= {"PAIR": kind.startswith("pair"), "BIAS": bias, "CAP": cap}
    if kind in ("statistics", "pair_statistics"):
        return {"CROSS": cross, **shared}
    return {"KL": kl, "SLAB": SLAB[dtype], **shared}


def options(tile: Tile) -> dict[str, int]:
    """What the compiler is told beside the constants."""
    return {"num_stages": tile.stages, "num_warps": tile.warps}


def signature(kind: str, tile: Tile, dtype: torch.dtype, constexprs: dict[str, Any]) -> dict[str, str]:
    """Argument types of a launch, in Triton's spelling, for compiling without one."""
    element = str(SLAB[dtype])
    blocks = {
        "x": (tile.rows, tile.depth),
        "r": (tile.rows, tile.depth),
        "a": (tile.rows, tile.depth),
        "w": (tile.depth, tile.cols) if kind == "accumulate" else (tile.cols, tile.depth),
        "slab": (tile.rows, tile.cols),
    }
    types = {}
    for name in KERNELS[kind].arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in blocks:
            rows, cols = blocks[name]
            types[name] = f"tensordesc<{element}[{rows}, {cols}]>" if constexprs["TMA"] else f"*{element}"
        elif name == "labels_ptr":
            types[name] = "*i64"
        elif name == "bias_ptr":
            types[name] = f"*{element}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            types[name] = "fp32" if name == "softcap" else "i32"
    return types


ALIGNED = ("d", "slab_stride", "stride")
"""Integers that are multiples of 16 for every real head: a launch sees it, a compile without one must be told."""


def is_aligned(name: str, kind: str) -> bool:
    """Whether a launch takes an argument of this name and type for a multiple of 16."""
    return name in ALIGNED or (kind.startswith("*") and name not in kernels.ANYWHERE)
