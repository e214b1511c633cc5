"""Which tile each kernel runs with, and how the vocabulary is cut. Plain numbers, no Triton."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import NamedTuple

FILE_VARIABLE = "TEMPO_KERNELS_TILES"


class Tile(NamedTuple):
    rows: int
    """Tokens."""
    cols: int
    """Vocabulary columns (`accumulate`: hidden columns)."""
    depth: int
    """Of the inner sum, per step."""
    stages: int
    """Steps in flight."""
    warps: int


KINDS = ("exp_slab", "statistics", "pair_statistics", "gradient", "pair_gradient", "accumulate")

TABLE: dict[str, dict[str, Tile]] = {
    # cp.async and mma
    "sm80": {
        "exp_slab": Tile(128, 256, 32, 3, 8),
        "statistics": Tile(128, 256, 32, 3, 8),
        "pair_statistics": Tile(64, 128, 32, 4, 8),
        "gradient": Tile(128, 128, 32, 4, 8),
        "pair_gradient": Tile(64, 128, 32, 4, 8),
        "accumulate": Tile(128, 128, 32, 4, 8),
    },
    # wgmma and TMA: the largest accumulator that stays in registers, two of half the rows for pairs
    "sm90": {
        "exp_slab": Tile(128, 256, 64, 3, 8),
        "statistics": Tile(128, 256, 64, 3, 8),
        "pair_statistics": Tile(64, 256, 64, 3, 8),
        "gradient": Tile(128, 256, 64, 3, 8),
        "pair_gradient": Tile(64, 256, 64, 3, 8),
        "accumulate": Tile(128, 128, 64, 4, 8),
    },
    # a 128 x 256 tile spills in the epilogue there
    "sm100": {
        "exp_slab": Tile(128, 128, 64, 4, 8),
        "statistics": Tile(128, 128, 64, 4, 8),
        "pair_statistics": Tile(128, 128, 64, 3, 8),
        "gradient": Tile(128, 128, 64, 4, 8),
        "pair_gradient": Tile(128, 128, 64, 3, 8),
        "accumulate": Tile(128, 128, 64, 4, 8),
    },
    # small enough that tests meet ragged edges and several tiles
    "interpreter": {kind: Tile(32, 64, 32, 1, 1) for kind in KINDS},
}

CAPPED: dict[str, dict[str, Tile]] = {
    "sm80": {"statistics": Tile(128, 128, 32, 4, 8)},
    "sm90": {
        "statistics": Tile(128, 128, 64, 4, 8),
        "gradient": Tile(128, 128, 64, 4, 8),
        "pair_gradient": Tile(64, 128, 64, 4, 8),
    },
    "sm100": {"pair_statistics": Tile(64, 128, 64, 4, 8), "pair_gradient": Tile(64, 128, 64, 4, 8)},
}
"""Under a softcap the scores and their cap are alive together: where the table's tile would spill, a smaller one."""

CANDIDATES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm90": {
        "exp_slab": (Tile(128, 128, 64, 4, 8), Tile(64, 256, 64, 4, 4)),
        "statistics": (Tile(128, 128, 64, 4, 8), Tile(128, 256, 64, 4, 8)),
        "pair_statistics": (Tile(128, 128, 64, 3, 8), Tile(64, 256, 64, 4, 8)),
        "gradient": (Tile(128, 128, 64, 4, 8), Tile(64, 256, 64, 4, 4)),
        "pair_gradient": (Tile(128, 128, 64, 3, 8), Tile(64, 128, 64, 4, 4)),
        "accumulate": (Tile(128, 64, 64, 4, 4), Tile(64, 256, 64, 3, 8)),
    },
}
"""What tuning tries beside the table."""

SLAB_BYTES = 32 << 20
"""A slab this large stays in the 50 MB L2 cache of Hopper beside the tiles in flight."""
ROWS = 4096
"""Most rows of a slab; the head is read once per block of rows, which 4096 rows hide twenty times over."""


def architecture(capability: tuple[int, int]) -> str:
    """Row of the table for a compute capability; consumer Blackwell (12.x) has mma.sync as sm_80 has."""
    return {9: "sm90", 10: "sm100", 11: "sm100"}.get(capability[0], "sm80")


def tile_of(arch: str, kind: str, cap: bool = False) -> Tile:
    """The tile of a kernel on a row of the table, `cap`: under a softcap. What tuning found goes before the table."""
    if kind in tuned() and not cap:
        return tuned()[kind]
    return CAPPED.get(arch, {}).get(kind, TABLE[arch][kind]) if cap else TABLE[arch][kind]


@functools.cache
def tuned() -> dict[str, Tile]:
    """Tiles by kernel from the JSON file that TEMPO_KERNELS_TILES names, as `python -m bench tune` writes it.

    Raises ValueError for a kernel or a tile that cannot be, naming the file.
    """
    path = os.environ.get(FILE_VARIABLE)
    if not path:
        return {}
    with open(path) as file:
        found = json.load(file)
    tiles = {}
    for kind, numbers in found.get("tiles", found).items():
        if kind not in KINDS or len(numbers) != 5 or any(not isinstance(x, int) or x < 1 for x in numbers):
            raise ValueError(f"{path}: {kind}: {numbers} is no tile (rows, cols, depth, stages, warps) of {KINDS}")
        if any(x & (x - 1) for x in numbers[:3]) or numbers[4] & (numbers[4] - 1):
            raise ValueError(f"{path}: {kind}: rows, cols, depth and warps must be powers of two, got {numbers}")
        tiles[kind] = Tile(*numbers)
    return tiles


def slice_width(rows: int, vocabulary: int, tile: Tile, programs: int, itemsize: int = 2) -> int:
    """Columns per slice, a multiple of the tile's: within the slab's size, and filling whole waves of programs.

    Among cuts into k0 to 2·k0 slices (k0: as few as the slab allows) the one that leaves the fewest programs idle.
    """
    tiles_n = math.ceil(rows / tile.rows)
    largest = max(1, min(SLAB_BYTES // (rows * itemsize), vocabulary + tile.cols - 1) // tile.cols)
    tiles_v = math.ceil(vocabulary / tile.cols)
    fewest = math.ceil(tiles_v / largest)

    def waves(slices: int) -> int:
        width = math.ceil(tiles_v / slices)
        full, rest = divmod(tiles_v, width)
        return full * math.ceil(width * tiles_n / programs) + math.ceil(rest * tiles_n / programs)

    best = min(range(fewest, min(2 * fewest, tiles_v) + 1), key=lambda k: (waves(k), k))
    return math.ceil(tiles_v / best) * tile.cols
