"""The benched loss heads, ours and others'. Peers are imported when they run, never rewritten."""

from __future__ import annotations

from collections.abc import Sequence

from bench.impls import cce, liger, ours, quack, torch_heads, trl
from bench.impls.base import Impl

ALL: dict[str, Impl] = {
    impl.name: impl for module in (ours, torch_heads, liger, cce, trl, quack) for impl in module.implementations()
}


def select(names: Sequence[str] | None) -> list[Impl]:
    """Those asked for, each once, in their order; a name that is none stands for all that begin with it and "_".

    ``liger_chunked`` is all four of its settings, ``liger_flce`` only itself. None is all. Raises ValueError.
    """
    if not names:
        return list(ALL.values())
    found: dict[str, Impl] = {}
    for name in names:
        hits = [name] if name in ALL else [key for key in ALL if key.startswith(name + "_")]
        if not hits:
            raise ValueError(f"no implementation {name!r}; there are {', '.join(ALL)}")
        found.update((hit, ALL[hit]) for hit in hits)
    return list(found.values())
