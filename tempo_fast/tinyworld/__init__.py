"""tinyworld: real little videos with known events, and a small video LLM that knows what happens in them but not when.

`generate_world` writes videos with their truth; `load_base` gives the model; `rebuild` makes it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempo_fast.tinyworld.base import load_base as load_base
    from tempo_fast.tinyworld.base import rebuild as rebuild
    from tempo_fast.tinyworld.generate import generate_world as generate_world

_WHERE = {"generate_world": "generate", "load_base": "base", "rebuild": "base"}
__all__ = ["generate_world", "load_base", "rebuild"]


def __getattr__(name: str) -> Any:
    # late, because torch, transformers and av are not needed to know that the room is there
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(name)
