"""How the vocabulary is cut for the kernels, and which tile runs where."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_kernels.fused import tiles
from tempo_kernels.fused.tiles import (
    CANDIDATES,
    CAPPED,
    FILE_VARIABLE,
    KINDS,
    TABLE,
    Tile,
    architecture,
    slice_width,
    tile_of,
    tuned,
)


@given(
    rows=st.integers(1, 40_000),
    vocabulary=st.integers(1, 300_000),
    tile=st.sampled_from([Tile(128, 256, 64, 3, 8), Tile(64, 128, 32, 4, 8)]),
    programs=st.sampled_from([1, 108, 132, 148]),
)
def test_slices_are_whole_tiles_within_the_slab(rows: int, vocabulary: int, tile: Tile, programs: int) -> None:
    width = slice_width(rows, vocabulary, tile, programs)
    assert width > 0 and width % tile.cols == 0
    assert width < vocabulary + tile.cols
    # one tile is the least there can be
    assert width == tile.cols or rows * width * 2 <= tiles.SLAB_BYTES


@given(rows=st.integers(1, 4096), programs=st.integers(1, 200))
def test_no_cut_within_bounds_idles_less(rows: int, programs: int) -> None:
    tile, vocabulary = Tile(128, 256, 64, 3, 8), 152_064
    tiles_n, tiles_v = math.ceil(rows / 128), vocabulary // 256

    def waves(width: int) -> int:
        cuts = [min(width, vocabulary - first) for first in range(0, vocabulary, width)]
        return sum(math.ceil(math.ceil(cut / 256) * tiles_n / programs) for cut in cuts)

    chosen = slice_width(rows, vocabulary, tile, programs)
    largest = max(1, tiles.SLAB_BYTES // (2 * rows) // 256)
    fewest = math.ceil(tiles_v / largest)
    others = {math.ceil(tiles_v / k) * 256 for k in range(fewest, min(2 * fewest, tiles_v) + 1)}
    assert chosen in others and waves(chosen) == min(waves(other) for other in others)


def test_every_architecture_has_every_kernel() -> None:
    assert all(set(row) == set(KINDS) for row in TABLE.values())
    assert all(set(row) <= set(KINDS) for row in (*CAPPED.values(), *CANDIDATES.values()))
    # consumer Blackwell has neither tcgen05 nor room for large tiles
    rows = {(8, 0): "sm80", (8, 9): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100", (12, 0): "sm80"}
    assert {capability: architecture(capability) for capability in rows} == rows


@pytest.mark.parametrize("arch", list(TABLE))
def test_a_cap_changes_only_what_is_listed(arch: str) -> None:
    for kind in KINDS:
        assert tile_of(arch, kind, True) == CAPPED.get(arch, {}).get(kind, tile_of(arch, kind))


@pytest.fixture
def tiles_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "tiles.json"
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    tuned.cache_clear()
    yield path
    tuned.cache_clear()


def test_a_file_of_tuned_tiles_goes_before_the_table(tiles_file) -> None:
    tiles_file.write_text(json.dumps({"env": {}, "tiles": {"exp_slab": [64, 128, 64, 2, 4]}, "rows": []}))
    assert tile_of("sm90", "exp_slab") == Tile(64, 128, 64, 2, 4)
    assert tile_of("sm90", "gradient") == TABLE["sm90"]["gradient"]
    assert tile_of("sm90", "gradient", cap=True) == CAPPED["sm90"]["gradient"]


@pytest.mark.parametrize(
    "wrong", [{"exp_slab": [64, 128]}, {"slab": [64, 128, 64, 2, 4]}, {"exp_slab": [64, 96, 64, 2, 4]}]
)
def test_a_wrong_file_is_named(wrong, tiles_file) -> None:
    tiles_file.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=str(tiles_file)):
        tile_of("sm90", "exp_slab")
