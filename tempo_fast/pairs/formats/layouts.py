"""The foreign formats by name, in the order in which a row is asked whether it is one of theirs."""

from __future__ import annotations

from tempo_fast.errors import InputError
from tempo_fast.pairs.formats.llama_factory import LLAMA_FACTORY
from tempo_fast.pairs.formats.llava_hound import LLAVA_HOUND
from tempo_fast.pairs.formats.ms_swift import MS_SWIFT
from tempo_fast.pairs.formats.rrpo import RRPO
from tempo_fast.pairs.formats.trl import TRL

LAYOUTS = {layout.name: layout for layout in (RRPO, LLAMA_FACTORY, TRL, LLAVA_HOUND, MS_SWIFT)}
FORMATS = ("native", *LAYOUTS)


def known(fmt: str) -> None:
    """Raises InputError for a name that is no format."""
    if fmt not in FORMATS:
        raise InputError(
            f"unknown format of preference data {fmt!r}; known: {', '.join(FORMATS)} (Parquet, JSON arrays and folders "
            "are told by a file's content on reading, by its name on writing)"
        )
