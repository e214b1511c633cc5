"""Joining what the ranks of a vocabulary-parallel head found, each for its rows of the head.

Inside custom operators a process group travels by its name. All ranks call these together with equal shapes, and get
equal results. Shapes: N tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


def _named(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(cast(Any, group))


def add(values: Tensor, group: str) -> Tensor:
    """Sum over the ranks of the group, in place; returns ``values``."""
    dist.all_reduce(values, op=dist.ReduceOp.SUM, group=_named(group))
    return values


def join_lse(lse: Tensor, group: str) -> Tensor:
    """logsumexp over the ranks of each rank's lse [N]; a new tensor."""
    highest = lse.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=_named(group))
    return highest + torch.log(add(torch.exp(lse - highest), group))


def join_target(target: Tensor, labels: Tensor, rows: int, group: str) -> Tensor:
    """The label's logit [N] from the rank that holds the label; ``labels`` [N] count from this rank's first row.

    When a label lies in no rank's rows, or in those of several: raises ValueError on the CPU, on all ranks; on a GPU,
    which the host would have to wait for, its logit is NaN.
    """
    lost = add(((labels >= 0) & (labels < rows)).to(target.dtype), group) != 1
    if target.device.type == "cpu" and bool(lost.any()):
        raise ValueError(
            "some labels lie in no rank's rows of the head, or in those of several: vocab_start and the ranks' "
            "shards must cover the vocabulary once; gather the valid positions (label != -100) first"
        )
    return add(target, group).masked_fill_(lost, torch.nan)
