"""`python -m bench tune`: the tiles of the Triton kernels that are fastest on this GPU, for one shape.

Each kernel is run with the table's tile and with every candidate, interleaved; the file written by --json is what
TEMPO_KERNELS_TILES may name. A candidate must be 2 % faster than the table's tile to replace it: less is noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.measure import environment, interleaved, write

GAIN = 0.98


def runs(n: int, v: int, d: int, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """A call per kernel in which that kernel takes the time."""
    from tempo_kernels.fused import launch

    g = torch.Generator().manual_seed(0)
    x, ref = (torch.randn(n, d, generator=g).to(device, dtype) for _ in range(2))
    w = (torch.randn(v, d, generator=g) / d**0.5).to(device, dtype)
    y = torch.randint(v, (n,), generator=g).to(device)
    ones = torch.ones(n, device=device)
    lse = launch.pair_forward(x, ref, w, y, None, None, False)

    def gradient(reference: torch.Tensor | None) -> Any:
        return launch.pair_backward(
            x, reference, w, y, None, None, lse.lse, lse.ref_lse, ones, None if reference is None else ones,
            want_hidden=False, want_weight=False, want_bias=False,
        )  # fmt: skip

    return {
        "exp_slab": lambda: launch.sweep_head(x, w, y, want_mean=True),
        "statistics": lambda: launch.pair_forward(x, None, w, y, None, None, False),
        "pair_statistics": lambda: launch.pair_forward(x, ref, w, y, None, None, True),
        "gradient": lambda: gradient(None),
        "pair_gradient": lambda: gradient(ref),
    }


@dataclass
class WithTile:
    """One call with a tile in the table's place, as `interleaved` times it: all of it is forward."""

    row: dict[str, Any]
    kind: str
    tile: Any
    call: Callable[[], Any]

    def forward(self) -> torch.Tensor:
        self.row[self.kind] = self.tile
        self.call()
        return torch.empty(0)

    def backward(self, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()


def tune(kinds: list[str], arch: str, calls: dict[str, Callable[[], Any]], repetitions: int, device: str) -> Any:
    """(rows of the report, tiles by kernel that beat the table's). Raises ValueError where a file names the tiles."""
    from tempo_kernels.fused import tiles

    if tiles.tuned():
        raise ValueError(f"{tiles.FILE_VARIABLE} is set, and its tiles would run in place of every candidate: unset it")
    rows, better = [], {}
    for kind in kinds:
        table = tiles.tile_of(arch, kind)
        choices = [table, *tiles.CANDIDATES.get(arch, {}).get(kind, ())]

        steps = [WithTile(tiles.TABLE[arch], kind, tile, calls[kind]) for tile in choices]
        try:
            for step in steps:  # compile
                step.forward()
            laps = [times.forward for times in interleaved(steps, repetitions, device)]
        finally:
            tiles.TABLE[arch][kind] = table
        for tile, lap in zip(choices, laps, strict=True):
            rows.append({"case": kind, "impl": "x".join(map(str, tile)), "repetitions": len(lap.wall), **lap.summary()})
            print("{case:16} {impl:20} {ms:9.3f} ms  ({ms_min:.3f} to {ms_max:.3f})".format(**rows[-1]))
        medians = [lap.summary()["ms"] for lap in laps]
        best = min(range(len(choices)), key=medians.__getitem__)
        if medians[best] < GAIN * medians[0]:
            better[kind] = list(choices[best])
    return rows, better


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tune", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda"])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--v", type=int, default=152064)
    parser.add_argument("--d", type=int, default=3584)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench tune: needs a CUDA device", file=sys.stderr)
        return 2
    from tempo_kernels.fused.tiles import architecture

    calls = runs(options.n, options.v, options.d, "cuda", torch.bfloat16)
    arch = architecture(torch.cuda.get_device_capability())
    try:
        rows, better = tune(list(calls), arch, calls, options.repetitions, "cuda")
    except ValueError as problem:
        parser.error(str(problem))
    print(f"faster than the table: {better or 'none'}")
    write(options.json, environment("cuda"), rows, tiles=better)
    return 0
