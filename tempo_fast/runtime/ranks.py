"""Who we are among the processes. One process is the rule; ``torchrun`` makes several."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tempo_fast.errors import InputError

TIMEOUT_S = 1800  # a rank may decode a long video while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process: its rank, how many there are, and its device. With one process every collective is a no-op."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, in place; returns ``value``."""
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.SUM)
        return value

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """Maximum over ranks, in place; returns ``value``."""
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value

    def all_gather_object(self, value: Any) -> list[Any]:
        """What every rank passed, by rank. For small things: it is pickled."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def init_ranks(config: Any = None) -> Ranks:
    """Join the process group when ``torchrun`` (or SLURM through it) started us; otherwise one process, no group.

    Args:
        config: a RunConfig (``model.device`` decides the device, ``train.engine`` must be deepspeed for several
            processes), or None.

    Raises:
        InputError: several processes with an engine for one, a CUDA device that is not there.
    """
    world, rank, local = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    wanted = config.model.device if config is not None else "auto"
    if world > 1 and config is not None and config.train.engine != "deepspeed":
        raise InputError(
            f"train.engine: {config.train.engine} runs one process and {world} were started; use deepspeed"
        )
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("model.device: cuda was asked for and torch finds no CUDA device")
    use_cuda = wanted.startswith("cuda") or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device(wanted if ":" in wanted else f"cuda:{local}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"model.device: rank {rank} wants {device} and there are {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=TIMEOUT_S))
    return Ranks(rank, world, device)


def current_ranks() -> Ranks:
    """The ranks of the process group that was joined, or the single process; the device is where collectives run."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
