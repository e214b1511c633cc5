"""Every draw has a generator of its own, seeded by what it is for, so that nothing depends on the order of calls."""

from __future__ import annotations

from typing import Any

import torch

from tempo_fast.files import digest


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) from any JSON-like values: equal parts, equal seed, on every machine."""
    return int(digest(list(parts))[:16], 16) >> 1


def generator(*parts: Any) -> torch.Generator:
    """A private CPU generator seeded by ``seed_of(*parts)``."""
    return torch.Generator().manual_seed(seed_of(*parts))
