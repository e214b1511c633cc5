"""Two ranks of the TRL drop-in under DDP train as one, although the head works outside the wrapper's forward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BOUND = 1e-5
"""As for the steps beside TRL; the sums over pairs are split between the ranks, which is one more rounding."""


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    root = HERE.parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]), "OMP_NUM_THREADS": "1"}
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if ranks == 2 else []
        command = [sys.executable, *launch, str(HERE / "trl_worker.py"), str(tmp_path), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert set(one) == {"lora", "full"}
    for case, (losses, moved) in one.items():
        assert (losses - losses[0]).abs().max() > 100 * BOUND
        assert (two[case][0] - losses).abs().max() <= BOUND, case
        assert (two[case][1] - moved).norm() <= BOUND * moved.norm(), case
