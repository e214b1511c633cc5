"""A head split over the vocabulary on two ranks gives the values and gradients of one process.

Two real processes over gloo, for an even split and an odd one, each path, and labels on both sides of the border.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tempo_kernels.head import linear_logp

HERE = Path(__file__).resolve().parent


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("vocab_parallel_worker", HERE / "vocab_parallel_worker.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ranks") / "out"
    env = os.environ | {"PYTHONPATH": str(HERE.parents[1] / "kernels"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(HERE / "vocab_parallel_worker.py"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("dtype", worker.DTYPES)
@pytest.mark.parametrize("case", worker.CASES)
@pytest.mark.parametrize("split", worker.SPLITS)
def test_two_ranks_equal_one(split: str, case: str, dtype: str, ranks: list[dict[str, Any]]) -> None:
    one = worker.run(case, dtype, slice(None), {})
    first, second = (rank[f"{split}-{case}-{dtype}"] for rank in ranks)
    assert first.keys() == second.keys() == one.keys()
    for name, whole in one.items():
        if name in ("d_weight", "d_bias"):
            found = torch.cat([first[name], second[name]])  # each rank has its rows' gradient
        else:
            assert torch.equal(first[name], second[name]), name
            found = first[name]
        assert found.dtype == whole.dtype
        # one rounding of the result's dtype, and float32 sums in another order
        rtol = 2 * torch.finfo(found.dtype).eps + 1e-5
        torch.testing.assert_close(found, whole, rtol=rtol, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", worker.CASES)
def test_equal_policy_and_reference_give_exactly_zero(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for split in worker.SPLITS:
            zeros = rank[f"{split}-{case}-float32"]["zeros"]
            assert zeros.numel() and not zeros.any()


@pytest.mark.parametrize("impl", ["one_pass", "recompute"])
def test_shards_with_a_gap_are_refused_on_every_rank(impl: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "vocab_start" in rank[f"gap-{impl}"]


def test_a_distributed_tensor_is_refused_in_a_sentence() -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        weight, labels = torch.randn(20, 4), torch.tensor([1, 2, 3])
        split = DTensor.from_local(weight, mesh, [Shard(0)])
        hidden = torch.randn(3, 4)
        for arguments in ((hidden, split), (DTensor.from_local(hidden, mesh, [Shard(0)]), weight)):
            with pytest.raises(ValueError, match=r"full_tensor\(\).*to_local\(\)"):
                linear_logp(*arguments, labels)
        whole = linear_logp(hidden, split.full_tensor(), labels)
        here = linear_logp(hidden, split.to_local(), labels, group=mesh.get_group())
        assert torch.equal(whole.logp, here.logp)
    finally:
        if started:
            dist.destroy_process_group()


def test_eager_knows_no_group() -> None:
    class Alone:
        group_name = "alone"

        def rank(self) -> int:
            return 0

    with pytest.raises(ValueError, match="'eager' knows no group"):
        linear_logp(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), impl="eager", group=Alone())  # type: ignore[arg-type]
