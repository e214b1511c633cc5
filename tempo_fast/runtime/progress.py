"""Progress bars with rate and remaining time, on stderr, for people only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any


def progress(iterable_or_total: Iterable[Any] | int, desc: str = "", unit: str = "it") -> Any:
    """A tqdm bar over an iterable, or over a total that the caller advances with ``update(n)``.

    Silent, but otherwise the same object, when stderr is no terminal or this is not rank 0.
    """
    from tqdm import tqdm

    quiet = not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0"
    known: dict[str, Any] = (
        {"total": iterable_or_total} if isinstance(iterable_or_total, int) else {"iterable": iterable_or_total}
    )
    return tqdm(**known, desc=desc, unit=unit, disable=quiet, dynamic_ncols=True, file=sys.stderr)
