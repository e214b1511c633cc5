"""Which implementation walks the vocabulary: four functions with one signature each, see sweep.py and pairs.py."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from tempo_kernels import fused, pairs, sweep


class Backend(NamedTuple):
    name: str
    sweep_head: Callable[..., sweep.Swept]
    sweep_pair: Callable[..., tuple[sweep.Swept, sweep.Swept]]
    pair_forward: Callable[..., pairs.PairStats]
    pair_backward: Callable[..., tuple[Any, Any, Any]]


TORCH = Backend("torch", sweep.sweep_head, sweep.sweep_pair, pairs.pair_forward, pairs.pair_backward)


logger = logging.getLogger(__name__)
_said: set[str] = set()


def backend(hidden: Tensor, weight: Tensor, reference: Tensor | None = None) -> Backend:
    """The backend for hidden and reference [N, D] under weight [V, D]: Triton where it can, else torch."""
    reason = fused.supported(hidden, weight)
    if reason is None and reference is not None and reference.dtype != weight.dtype:
        reason = f"the reference's hidden states are {reference.dtype} and the head is {weight.dtype}"
    if reason is None:
        return _triton()
    if weight.is_cuda and reason not in _said:  # on a GPU that is slower than it need be, so it is said
        _said.add(reason)
        logger.warning(f"linear_logp: the Triton kernels are not used because {reason}")
    return TORCH


@functools.cache
def _triton() -> Backend:
    from tempo_kernels.fused import launch

    return Backend("triton", launch.sweep_head, launch.sweep_pair, launch.pair_forward, launch.pair_backward)
