"""One way to say what a value must be."""

from __future__ import annotations

from typing import Any

from tempo_fast.errors import InputError


def require(ok: bool, key: str, rule: str, value: Any) -> None:
    """Raise InputError unless ``ok``: "config: KEY must be RULE, got VALUE"."""
    if not ok:
        raise InputError(f"config: {key} must be {rule}, got {value!r}")
