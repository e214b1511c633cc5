"""The manifest of a reference's folder: whose statistics these are, for people and for refusing a mix-up."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, read_json, write_json
from tempo_fast.reference.shard import FORMAT

log = logging.getLogger("tempo_fast")

NAME = "manifest.json"


def check_manifest(root: Path, fields: Mapping[str, Any], compatible: Mapping[str, Any]) -> None:
    """Write the manifest where there is none, or a damaged one; refuse another reference's.

    Raises:
        InputError: another format, or a field that differs, by name.
    """
    path = root / NAME
    ours = {"format": FORMAT, "fields": fields, "compatible": compatible}
    if not path.is_file():
        write_json(path, ours)
        return
    try:
        stored = read_json(path)
        known = dict(stored["fields"])
    except (InputError, KeyError, TypeError, ValueError):
        log.warning("%s: damaged, written again (every shard carries its own identity)", path)
        write_json(path, ours)
        return
    if stored.get("format") != FORMAT:
        raise InputError(f"{path}: field 'format' is {stored.get('format')!r}, this version reads {FORMAT}")
    for name in sorted(set(known) | set(fields)):
        if canonical_json(known.get(name)) != canonical_json(fields.get(name)):
            raise InputError(
                f"{path}: field '{name}' is {known.get(name)!r} there and {fields.get(name)!r} in this run;"
                " the statistics belong to another reference, use another reference.store"
            )
    for name in sorted(set(compatible) & set(stored.get("compatible") or {})):
        if stored["compatible"][name] != compatible[name]:
            log.info(
                "%s: filled with %s %s, this run has %s; equal within rounding",
                path, name, stored["compatible"][name], compatible[name],
            )  # fmt: skip
    touch(path)


def touch(path: Path) -> None:
    """A file's time says when it was last used; where it cannot be written, nothing."""
    try:
        os.utime(path)
    except OSError:
        pass
