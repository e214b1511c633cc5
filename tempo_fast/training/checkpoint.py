"""Checkpoints of a stage: complete or absent, verified when read, refused when they belong to another configuration.

``<stage>/checkpoint-<step>/`` holds a file per rank, ``engine_rank<k>.pt`` (that rank's part of what trains and of the
optimizer; frozen weights are left out), and ``trainer_state.json``: step, stage, identity (also of the reference), the
schedule, and the files' digests. Dropout is seeded per step and data order is a function of the step, so that no
generator's state is needed to resume bit-equal. Any number of ranks can go on from it (``runtime/pieces.py``).
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tempo_fast.errors import InputError
from tempo_fast.files import canonical_json, file_digest, new_folder, read_json, write_json, writing
from tempo_fast.runtime.ranks import Ranks

log = logging.getLogger("tempo_fast")

FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)$")
_PATIENCE_S = 600.0  # of the first rank for the parts of the others, written in the background
_POLL_S = 0.05


def list_checkpoints(stage_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the complete checkpoints, oldest first."""
    found = []
    for path in stage_dir.glob("checkpoint-*"):
        match = _NAME.match(path.name)
        if match and (path / "trainer_state.json").is_file():
            found.append((int(match[1]), path))
    return sorted(found)


class Checkpoints:
    """The checkpoints of one stage. All ranks make one and call its methods in the same order.

    Args:
        stage_dir: the stage's folder, which all ranks see.
        identity: what decides the stage's result; a checkpoint with another one is refused.
        keep: newest checkpoints kept.
        background: ``save`` returns at once; see there.
        about: more for ``trainer_state.json``, for people and scripts.
    """

    def __init__(
        self,
        stage_dir: Path,
        identity: dict[str, Any],
        ranks: Ranks,
        *,
        keep: int,
        background: bool = False,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.stage_dir, self.identity, self.ranks = stage_dir, identity, ranks
        self.keep, self.background, self.about = keep, background, about or {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if ranks.is_main:
            for left in stage_dir.glob(".checkpoint-*"):  # by a killed process
                shutil.rmtree(left, ignore_errors=True)
        # parts that an earlier start has left are not taken for ours
        self._token = ranks.all_gather_object(uuid.uuid4().hex[:8])[0]

    # -- writing -----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write aside, sync, rename; then drop all but the ``keep`` newest. Every rank writes a state of its own.

        In the background a thread of each rank does so, and the caller may go on: ``state["engine"]`` must be a copy
        (``state_dict`` gives one). An earlier save is waited for, so that there is one copy at a time.

        Raises:
            InputError: full disk, missing permission; of an earlier save in the background too.
        """
        self.wait()
        aside = self.stage_dir / f".checkpoint-{step}.{self._token}.ranks"
        state = {"engine": state["engine"], "own": copy.deepcopy({k: v for k, v in state.items() if k != "engine"})}
        if self.background:
            self._thread = threading.Thread(
                target=self._save_behind, args=(step, aside, state), name="checkpoint", daemon=True
            )
            self._thread.start()
            return
        # on a full disk the ranks that wait at a barrier are ended by the launcher, as for any failure of one rank
        self._write_part(aside, state)
        self.ranks.barrier()
        if self.ranks.is_main:
            self._publish(step, aside)
        self.ranks.barrier()

    def check(self) -> None:
        """Raise what a save in the background has failed with. Call it in every step."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until this rank's part of the last save is done (on the first rank: all of it). Raises as ``check``."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def drop(self, keep: int = 0) -> None:
        """Remove all checkpoints of a finished stage but the newest ``keep``. The first rank's call alone counts."""
        if not self.ranks.is_main:
            return
        done = [path for _, path in list_checkpoints(self.stage_dir)]
        for path in [*done[: len(done) - keep], *self.stage_dir.glob(".checkpoint-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _save_behind(self, step: int, aside: Path, state: dict[str, Any]) -> None:
        try:
            try:
                self._write_part(aside, state)
            except BaseException:
                if not self.ranks.is_main:
                    _leave_word(aside / f"rank{self.ranks.rank}.failed")
                raise
            if self.ranks.is_main:
                self._await_parts(aside)
                self._publish(step, aside)
        except BaseException as e:  # noqa: BLE001 - raised in the main thread
            self._error = e

    def _write_part(self, aside: Path, state: dict[str, Any]) -> None:
        rank = self.ranks.rank
        path = aside / f"engine_rank{rank}.pt"
        with writing(aside):
            aside.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
        # a rename: where this file is, the part is whole
        write_json(aside / f"rank{rank}.json", {"name": path.name, "sha256": file_digest(path)})

    def _await_parts(self, aside: Path) -> None:
        # no collective here: the main thread has its own
        deadline = time.monotonic() + _PATIENCE_S
        while missing := [r for r in range(self.ranks.world) if not (aside / f"rank{r}.json").is_file()]:
            if failed := [r for r in missing if (aside / f"rank{r}.failed").is_file()]:
                raise InputError(f"{aside}: rank {failed[0]} could not write its part; its own message says why")
            if time.monotonic() > deadline:
                raise InputError(
                    f"{aside}: the part of rank {missing[0]} has not come for {_PATIENCE_S:.0f} s;"
                    " do all machines share output_dir?"
                )
            time.sleep(_POLL_S)

    def _publish(self, step: int, aside: Path) -> None:
        with new_folder(self.stage_dir / f"checkpoint-{step}") as tmp:
            files = {}
            for rank in range(self.ranks.world):
                part = read_json(aside / f"rank{rank}.json")
                (aside / part["name"]).rename(tmp / part["name"])
                files[part["name"]] = part["sha256"]
            about = {"format": FORMAT, "stage_step": step, "world": self.ranks.world, **self.about}
            write_json(tmp / "trainer_state.json", {**about, "files": files, "identity": self.identity})
        shutil.rmtree(aside, ignore_errors=True)
        for _, old in list_checkpoints(self.stage_dir)[: -self.keep]:
            shutil.rmtree(old)

    # -- reading -----------------------------------------------------------------------------------------------------

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest complete and undamaged checkpoint: (steps done, state), or None.

        ``state["engine"]`` gives the parts of all ranks that wrote it, this rank's own first, each read when it is
        asked for; the rest of the state is this rank's own (where there was no such rank, another's).

        Raises:
            InputError: it was written under another configuration (the differing field is named), or version.
        """
        for step, folder in reversed(list_checkpoints(self.stage_dir)):
            files, trouble = self._sound(folder)
            # all ranks go back to the same one
            troubles = [t for t in self.ranks.all_gather_object(trouble) if t]
            if troubles:
                log.warning("%s: damaged (%s), an older checkpoint is taken", folder, troubles[0])
                continue
            world = len(files)
            if world != self.ranks.world:
                log.info(
                    "%s: written at world size %d, goes on at %d: losses equal up to rounding, dropout's draws differ",
                    folder, world, self.ranks.world,
                )  # fmt: skip
            first = self.ranks.rank % world
            order = [folder / f"engine_rank{(first + k) % world}.pt" for k in range(world)]
            return step, {"engine": _parts(order), **_load(order[0])["own"]}
        return None

    def _sound(self, folder: Path) -> tuple[dict[str, str], str]:
        """The digests of a checkpoint's files, and what is wrong with it or with this rank's share of the files."""
        try:
            state = read_json(folder / "trainer_state.json")
        except InputError as e:
            return {}, str(e)
        if state.get("format") != FORMAT:
            raise InputError(
                f"{folder}: its format is {state.get('format')}, this version reads {FORMAT}; go on with the version"
                " that wrote it, or delete it"
            )
        refuse_other(folder, state["identity"], self.identity)
        files: dict[str, str] = state["files"]
        for name in sorted(files)[self.ranks.rank :: self.ranks.world]:
            try:
                if file_digest(folder / name) != files[name]:
                    return files, f"the bytes of {name} are not those that were written"
            except InputError as e:
                return files, str(e)
        return files, ""


def _leave_word(path: Path) -> None:
    try:
        path.touch()
    except OSError:
        pass  # then the first rank finds out by waiting


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _parts(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield _load(path)["engine"]


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
