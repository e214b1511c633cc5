"""`python -m bench compile`: every configuration of the Triton kernels, compiled without a GPU, and what it would use.

Registers, stack and local memory are ptxas's own report (through the `cuobjdump` that Triton ships); shared memory is
Triton's; instructions are counted in the machine code. Blocks per multiprocessor follow from the three by the limits
of the architecture. Nothing is timed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import environment, write

LIMITS = {80: (164, 2048), 90: (228, 2048), 100: (228, 2048)}
"""KiB of shared memory and threads of a multiprocessor; 1 KiB per block is the system's. 65536 registers everywhere."""
INSTRUCTIONS = {
    "wgmma": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "mma": r"\bHMMA\b",
    "tma_load": r"\bUTMALDG\b",
    "tma_store": r"\bUTMASTG\b",
    "cp_async": r"\bLDGSTS\b",
    "local": r"\b(?:LDL|STL)\b",
}
NEEDED = {
    "sm80": {"mma": "mma", "cp_async": "cp.async"},
    "sm90": {"wgmma": "wgmma", "tma_load": "TMA"},
    "sm100": {"tcgen05": "tcgen05", "tma_load": "TMA"},
}
"""What a kernel that multiplies matrices must use, and what it is called."""
VARIANTS: dict[str, tuple[dict[str, bool], ...]] = {
    "exp_slab": ({"store": True}, {}),
    "statistics": ({}, {"bias": True, "cap": True}),
    "pair_statistics": ({}, {"cross": True}, {"cross": True, "bias": True, "cap": True}),
    "gradient": ({}, {"kl": True}, {"kl": True, "bias": True, "cap": True}),
    "pair_gradient": ({"kl": True}, {"kl": True, "bias": True, "cap": True}),
    "accumulate": ({"add": True}, {}),
}
"""The kernels of the loss head."""
PIXELS: dict[str, tuple[dict[str, Any], ...]] = {
    # Qwen2-VL's and Qwen3-VL's patches, frames that are rows; as they come, and chosen frames of which some are black
    "patchify": tuple(
        {"patch": patch, "merge": merge, "temporal": temporal, "index": chosen, "blank": chosen}
        for patch, merge, temporal in ((14, 2, 2), (16, 2, 2), (448, 1, 1))
        for chosen in (False, True)
    ),
    "resize_x": ({},),
    "resize_y": ({},),
}
"""The kernels of the pixel path, which multiply no matrices."""
KINDS = (*VARIANTS, *PIXELS)


class Case(NamedTuple):
    sm: int
    kind: str
    tile: Any
    """None for the kernels of the pixel path."""
    flags: dict[str, Any]
    candidate: bool


def cases(sms: list[int], kinds: list[str], candidates: bool) -> Iterator[Case]:
    """The table's configurations with every variant, then (``candidates``) what tuning would try, with the first."""
    from tempo_kernels.fused.tiles import CANDIDATES, tile_of

    for sm in sms:
        for kind in kinds:
            for flags in PIXELS.get(kind, ()):
                yield Case(sm, kind, None, flags, False)
            for flags in VARIANTS.get(kind, ()):
                yield Case(sm, kind, tile_of(f"sm{sm}", kind, flags.get("cap", False)), flags, False)
            for tile in CANDIDATES.get(f"sm{sm}", {}).get(kind, ()) if candidates else ():
                yield Case(sm, kind, tile, VARIANTS[kind][0], True)


class Build(NamedTuple):
    """What the compiler is given, and how the report calls it."""

    kernel: Any
    constexprs: dict[str, Any]
    signature: dict[str, str]
    is_aligned: Callable[[str, str], bool]
    options: dict[str, int]
    name: str
    shape: list[int]
    tile: str


def build(case: Case, dtype: torch.dtype) -> Build:
    """A case in the terms of its kernels' ``specs``."""
    if case.kind in PIXELS:
        from tempo_kernels.pixels import specs as pixel_specs

        flags, name, make = dict(case.flags), case.kind, pixel_specs.resize_constants
        if case.kind == "patchify":
            make = pixel_specs.patchify_constants
            name += f" {flags['patch']}x{flags['merge']}x{flags['temporal']}"
            name += "".join(f"+{flag}" for flag in ("index", "blank") if flags[flag])
        constexprs = make(**flags)
        signature = pixel_specs.signature(case.kind, dtype, constexprs)
        options = pixel_specs.options(constexprs)
        shape = [constexprs.get("LINES") or constexprs["STRIP"], constexprs["BLOCK"]]
        tile = "x".join(map(str, shape)) + f" w{options['num_warps']}"
        kernel, is_aligned = pixel_specs.KERNELS[case.kind], pixel_specs.is_aligned
        return Build(kernel, constexprs, signature, is_aligned, options, name, shape, tile)
    from tempo_kernels.fused import specs

    constexprs = specs.constants(case.kind, case.tile, dtype, case.sm >= 90, **case.flags)
    signature = specs.signature(case.kind, case.tile, dtype, constexprs)
    name = case.kind + "".join(f"+{flag}" for flag in case.flags) + (" (candidate)" if case.candidate else "")
    tile = "x".join(map(str, case.tile[:3])) + f" s{case.tile.stages} w{case.tile.warps}"
    kernel, options = specs.KERNELS[case.kind], specs.options(case.tile)
    return Build(kernel, constexprs, signature, specs.is_aligned, options, name, list(case.tile), tile)


def compile_case(case: Case, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """One row of the report. Raises what Triton raises where a configuration does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = build(case, dtype)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(made.signature.items())
        if made.is_aligned(name, kind)
    }
    source = ASTSource(fn=made.kernel, signature=made.signature, constexprs=made.constexprs, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", case.sm, 32), options=made.options)
    usage, code = _read(compiled.asm["cubin"])
    counts = {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()}
    shared_kib = compiled.metadata.shared / 1024
    return {
        "case": f"sm{case.sm}",
        "impl": made.name,
        "shape": made.shape,
        "tile": made.tile,
        "dtype": "uint8" if case.kind.startswith("resize") else str(dtype).removeprefix("torch."),
        "matrices": case.kind in VARIANTS,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "local_bytes": usage["LOCAL"],
        "shared_kib": round(shared_kib, 1),
        "blocks_per_sm": blocks_per_sm(case.sm, usage["REG"], shared_kib, 32 * made.options["num_warps"]),
        "instructions": counts,
    }


def _read(cubin: bytes) -> tuple[dict[str, int], str]:
    """(ptxas's resource report, machine code) of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "-res-usage", file.name)
        code = _output(tool, "-sass", file.name)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    if not {"REG", "STACK", "LOCAL"} <= set(found) or "EXIT" not in code:
        raise RuntimeError(f"{tool} reported nothing usable")
    return found, code


def _output(tool: Path, *arguments: str) -> str:
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def blocks_per_sm(sm: int, registers: int, shared_kib: float, threads: int) -> int:
    """Blocks that fit on a multiprocessor at once; registers are given out in eights per thread."""
    kib, most_threads = LIMITS[sm]
    by_registers = 65536 // (-(-registers // 8) * 8 * threads)
    return min(by_registers, int(kib // (shared_kib + 1)), most_threads // threads)


def verdict(row: dict[str, Any]) -> str:
    """What is wrong with a row: "" if nothing. The gate of the tests, for the configurations that are used."""
    counts = row["instructions"]
    wrong = []
    if row["stack_bytes"] or row["local_bytes"] or counts["local"]:
        wrong.append("uses local memory")
    needed = NEEDED[row["case"]] if row["matrices"] else {}
    if not all(counts[name] for name in needed):
        wrong.append("without " + " or ".join(needed.values()))
    if not row["blocks_per_sm"]:
        wrong.append("does not fit on a multiprocessor")
    return ", ".join(wrong)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench compile", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="ignored: no device is touched")
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100], choices=sorted(LIMITS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--candidates", action="store_true", help="also the tiles that tuning would try")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="triton")
    try:
        import triton  # noqa: F401
    except ImportError:
        print("bench compile: needs triton (Linux only)", file=sys.stderr)
        return 2
    rows, failed = [], 0
    line = "{:6} {:44} {:>18} {:>4} {:>6} {:>7} {:>6}  {}"
    print(line.format("arch", "kernel", "tile", "regs", "stack", "shared", "blocks", "instructions"))
    for case in cases(options.sm, options.kinds, options.candidates):
        row = compile_case(case)
        row["verdict"] = verdict(row)
        rows.append(row)
        failed += bool(row["verdict"]) and not case.candidate
        used = " ".join(f"{name} {count}" for name, count in row["instructions"].items() if count)
        shared = f"{row['shared_kib']:.0f}K"
        shown = (row["case"], row["impl"], row["tile"], row["registers"], row["stack_bytes"], shared)
        print(line.format(*shown, row["blocks_per_sm"], used + (f"  ! {row['verdict']}" if row["verdict"] else "")))
    write(options.json, environment("cpu"), rows)
    return 1 if failed else 0
