"""Which implementation walks the vocabulary: three functions with one signature each, see sweep.py and pairs.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tempo_kernels import pairs, sweep


class Backend(NamedTuple):
    name: str
    sweep_head: Callable[..., sweep.Swept]
    pair_forward: Callable[..., pairs.PairStats]
    pair_backward: Callable[..., tuple[Any, Any, Any]]


TORCH = Backend("torch", sweep.sweep_head, pairs.pair_forward, pairs.pair_backward)


def backend(hidden: Tensor, weight: Tensor) -> Backend:
    """The backend for hidden [N, D] under weight [V, D]."""
    return TORCH
