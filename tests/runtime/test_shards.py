"""Who takes what: from launchers' variables to parts that cover everything once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.runtime.shards import Shard, parse_shard, this_shard

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    "environ, shard",
    [
        ({}, Shard(0, 1)),
        (TORCHRUN, Shard(2, 4)),
        (ARRAY, Shard(2, 8)),
        (STEP, Shard(1, 2)),
        (SCRIPT, Shard(0, 1)),  # sbatch without srun
        ({**ARRAY, **SCRIPT}, Shard(2, 8)),
        ({**ARRAY, **STEP}, Shard(5, 16)),
        ({**ARRAY, **STEP, **TORCHRUN}, Shard(2, 4)),
        ({"RANK": "1"}, Shard(0, 1)),  # half a launcher is none
    ],
)
def test_launchers(environ, shard):
    assert this_shard(environ) == shard


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "x", "WORLD_SIZE": "4"},
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"},  # --array=1,5,9
    ],
)
def test_what_contradicts_itself_is_refused(environ):
    with pytest.raises(InputError, match=next(iter(environ))):
        this_shard(environ)


@given(st.integers(1, 40), st.lists(st.text(), max_size=50))
def test_shards_cover_everything_once(count, names):
    shards = [Shard(k, count) for k in range(count)]
    for number, name in enumerate(names):
        assert sum(s.holds(digest(name)) for s in shards) == 1
        assert sum(s.takes(number) for s in shards) == 1


def test_digests_spread_over_shards():
    held = [sum(Shard(k, 8).holds(digest(i)) for i in range(8000)) for k in range(8)]
    assert all(abs(n - 1000) < 5 * 1000**0.5 for n in held)


def test_a_shard_by_hand():
    assert parse_shard("3/16") == Shard(3, 16)
    for text in ("3", "16/16", "a/b", "-1/2", "0/0"):
        with pytest.raises(InputError, match="shard"):
            parse_shard(text)
