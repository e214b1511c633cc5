"""A host's trainer class with one of our mixins before it, made when it is asked for and not before."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def drop_in(mixin: type, module: str, name: str) -> type:
    """``name`` of ``module`` with ``mixin`` in front, under the same name; the same class at each call.

    Raises ImportError when the host is not installed, or has no such class.
    """
    try:
        host = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{module}.{name} is not there to build on: {error}") from error
    return type(name, (mixin, host), {"__module__": mixin.__module__, "__doc__": mixin.__doc__})
