"""The constants each kernel is compiled with: one place for the launcher and for compiling without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from tempo_kernels.pixels import kernels

KERNELS = {
    "patchify": kernels.patchify_kernel,
    "resize_x": kernels.resize_x_kernel,
    "resize_y": kernels.resize_y_kernel,
}
POSITIONS = 512
"""Most positions of a program that has whole patches. With 64 per warp a thread has two neighbours, which keeps the
threads of a load close together; with eight, as the widest stores would have it, they would be all over the patch."""
STRIP = 8
LARGE = 1024
"""Positions of a program that has a part of a large patch, whose lines are long."""
LINES, BYTES = 8, 256
ELEMENT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def patchify_constants(
    patch: int, merge: int, temporal: int, *, index: bool, blank: bool,
    positions: int = POSITIONS, strip: int = STRIP, large: int = LARGE,
) -> dict[str, Any]:  # fmt: skip
    """constexpr arguments of `patchify_kernel`."""
    needed = temporal * patch * patch
    block, patches = (1 << (needed - 1).bit_length(), strip // merge) if needed <= positions else (large, 1)
    sizes = {"PATCH": patch, "MERGE": merge, "TEMPORAL": temporal, "BLOCK": block, "STRIP": merge * max(1, patches)}
    return {**sizes, "INDEXED": index, "BLANKED": blank}


def resize_constants(lines: int = LINES, block: int = BYTES) -> dict[str, Any]:
    """constexpr arguments of `resize_x_kernel` and `resize_y_kernel`."""
    return {"LINES": lines, "BLOCK": block}


def options(constexprs: dict[str, Any]) -> dict[str, int]:
    """What the compiler is told beside the constants."""
    return {"num_warps": 4 if "LINES" in constexprs else min(8, max(1, constexprs["BLOCK"] // 64))}


def signature(kind: str, dtype: torch.dtype, constexprs: dict[str, Any]) -> dict[str, str]:
    """Argument types of a launch, in Triton's spelling, for compiling without one; patchify writes ``dtype``."""
    pointers = {
        "frames_ptr": "*u8",
        "index_ptr": "*i64",
        "blank_ptr": "*u8",
        "out_ptr": f"*{ELEMENT[dtype]}" if kind == "patchify" else "*u8",
        "first_ptr": "*i32",
        "weights_ptr": "*i16",
    }
    types = {}
    for name in KERNELS[kind].arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        else:
            types[name] = pointers.get(name, "fp32" if name.startswith(("shift", "scale", "inverse")) else "i32")
    return types


def is_aligned(name: str, kind: str) -> bool:
    """Whether a launch takes an argument of this name and type for a multiple of 16."""
    return kind.startswith("*") and name not in kernels.ANYWHERE
