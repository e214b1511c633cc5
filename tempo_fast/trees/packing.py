"""Trees into rows of at most a budget of tokens. Nothing is ever cut."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from tempo_fast.errors import InputError


def pack(
    lengths: Sequence[int], budget: int, *, order: Sequence[int] | None = None, ids: Sequence[str] | None = None
) -> list[list[int]]:
    """Best fit: each item, in ``order``, goes to the fullest row that still takes it (the oldest of equals).

    Deterministic, and O(n log n + n·moves). Every index of ``order`` is in exactly one row; rows stand in the order in
    which they were opened, items in the order in which they came.

    Args:
        lengths: tokens of each item, >= 1.
        budget: most tokens of a row.
        order: indices into ``lengths`` to pack, in this order; None takes all as they come.
        ids: names of the items for the message.

    Raises:
        InputError: an item is longer than the budget; names it, its length and the budget.
    """
    order = range(len(lengths)) if order is None else order
    check_budget([lengths[i] for i in order], budget, ids=[ids[i] for i in order] if ids is not None else None)
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for i in order:
        n = lengths[i]
        at = bisect_left(free, (n, -1))
        if at == len(free):
            rows.append([i])
            insort(free, (budget - n, len(rows) - 1))
            continue
        left, row = free.pop(at)
        rows[row].append(i)
        insort(free, (left - n, row))
    return rows


def check_budget(lengths: Sequence[int], budget: int, *, ids: Sequence[str] | None = None) -> None:
    """Before any decoding: raises InputError that names the first item longer than ``budget``, and how many are."""
    over = [i for i, n in enumerate(lengths) if n > budget]
    if over:
        name = ids[over[0]] if ids is not None else f"number {over[0]}"
        more = f" (and {len(over) - 1} more)" if len(over) > 1 else ""
        raise InputError(
            f"record {name}: {lengths[over[0]]} tokens exceed train.max_tokens {budget}{more};"
            " lower video.total_pixels or video.max_frames, or raise the budget"
        )
