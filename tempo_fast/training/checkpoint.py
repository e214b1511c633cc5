"""Checkpoints of a stage: complete or absent, refused when they belong to another configuration.

``<stage>/checkpoint-<step>/`` holds the engine's state (adapter weights, optimizer) and ``trainer_state.json``. Dropout
is seeded per step and data order is a function of the step, so nothing else is needed to resume bit-equal.
"""

from __future__ import annotations

import logging
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, new_folder, read_json, write_json, writing
from tempo_fast.runtime.ranks import Ranks

log = logging.getLogger("tempo_fast")

_NAME = re.compile(r"checkpoint-(\d+)$")


def list_checkpoints(stage_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, oldest first."""
    found = []
    for path in stage_dir.glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and (path / "trainer_state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def save_checkpoint(
    stage_dir: Path, step: int, state: dict[str, Any], identity: dict[str, Any], ranks: Ranks, *, keep: int
) -> None:
    """Write aside, sync, rename; then drop all but the ``keep`` newest. Every rank writes a state of its own."""
    # on a full disk the ranks that wait at a barrier are ended by the launcher, as for any failure of one rank
    aside = stage_dir / f".checkpoint-{step}.ranks"
    with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
        torch.save(state, aside / f"engine_rank{ranks.rank}.pt")
    ranks.barrier()
    if ranks.rank == 0:
        with new_folder(stage_dir / f"checkpoint-{step}") as tmp:
            for part in aside.iterdir():
                part.rename(tmp / part.name)
            write_json(tmp / "trainer_state.json", {"stage_step": step, "world": ranks.world, "identity": identity})
        aside.rmdir()
        for _, old in list_checkpoints(stage_dir)[:-keep]:
            shutil.rmtree(old)
    ranks.barrier()


def load_newest(stage_dir: Path, identity: dict[str, Any], ranks: Ranks) -> tuple[int, dict[str, Any]] | None:
    """The newest complete and undamaged checkpoint: (steps done, this rank's state), or None.

    Raises:
        InputError: it was written under another configuration (the differing field is named) or number of ranks.
    """
    for step, folder in reversed(list_checkpoints(stage_dir)):
        state = read_json(folder / "trainer_state.json")
        if state["world"] != ranks.world:
            raise InputError(f"{folder}: written by {state['world']} ranks, cannot be resumed on {ranks.world}")
        refuse_other(folder, state["identity"], identity)
        try:
            loaded = torch.load(folder / f"engine_rank{ranks.rank}.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
            log.warning("%s: damaged (%s), an older checkpoint is taken", folder, str(e).splitlines()[0])
            loaded = None
        # all ranks go back to the same one
        if all(ranks.all_gather_object(loaded is not None)):
            return step, loaded
    return None


def refuse_other(where: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise InputError naming the first field in which two identities differ."""
    old, new = _flat(stored), _flat(current)
    for name in sorted(set(old) | set(new)):
        if canonical_json(old.get(name)) != canonical_json(new.get(name)):
            raise InputError(
                f"{where}: belongs to another configuration: {name} is {new.get(name)!r} now and was "
                f"{old.get(name)!r}; use another output_dir, or delete it"
            )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, inner in value.items():
        out.update(_flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner})
    return out


def drop_checkpoints(stage_dir: Path) -> None:
    """Remove all checkpoints of a finished stage."""
    for path in stage_dir.glob("*checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
