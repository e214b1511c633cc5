"""Looking after a store's folder: what is in it, what is damaged, what can go.

What can go: leftovers of killed writers, answers that stand elsewhere with what the KL needs, copies of the same
answer, and what was not used for long. What stays of small shards is written into larger ones, which open faster.

A reference that a process has open is left alone. For the others, in this order: new shards are written; old ones are
moved aside; whether a process has come in between is looked up, and then all is put back; else they are deleted. A
process that opens the store meanwhile sees an answer in one place or the other, or computes it again. See holders.py.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tempo_fast.errors import InputError
from tempo_fast.files import file_digest, read_json, write_atomic, writing
from tempo_fast.reference.holders import EXPIRES_S, FOLDER, holders
from tempo_fast.reference.manifest import NAME
from tempo_fast.reference.shard import MEAN, SCALARS, SUFFIX, Header, Mapped, Row, digest_of, encode, read_header

log = logging.getLogger("tempo_fast")

SMALL = 8 * 2**20
"""Bytes below which shards are merged,"""
LARGE = 64 * 2**20
"""and which the merged ones do not exceed."""
_ASIDE = "dropped"
_THREADS = 8


@dataclass
class Shard:
    """One file: its header, and when it was last used (written, or verified by a process that opened it)."""

    path: Path
    header: Header
    used: float


@dataclass
class Folder:
    """One reference of a store."""

    root: Path
    shards: dict[str, Shard] = field(default_factory=dict)
    """By name."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Name -> why."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Empty where it is damaged or missing."""

    @staticmethod
    def read(root: Path) -> Folder:
        """From the headers alone."""
        out = Folder(root)
        try:
            stored = read_json(root / NAME)
            out.manifest = stored if isinstance(stored, dict) else {}
        except InputError:
            pass
        paths = sorted(p for p in (root / "shards").glob("*" + SUFFIX) if p.name[0] != ".")
        with ThreadPoolExecutor(_THREADS) as pool:
            for path, found in zip(paths, pool.map(_shard, paths), strict=True):
                if isinstance(found, Shard):
                    out.shards[path.name] = found
                elif not isinstance(found, FileNotFoundError):
                    out.unreadable[path.name] = str(found)
        return out

    @property
    def fields(self) -> dict[str, Any]:
        """Of the manifest, or of a shard where that is damaged."""
        fields = self.manifest.get("fields")
        if isinstance(fields, dict):
            return fields
        return next((json.loads(s.header.fields) for s in self.shards.values()), {})

    @property
    def bytes(self) -> int:
        return sum(s.header.size for s in self.shards.values())

    @property
    def used(self) -> float:
        """When it was last opened or written; seconds since the epoch."""
        times = [s.used for s in self.shards.values()]
        try:
            times.append((self.root / NAME).stat().st_mtime)
        except OSError:
            pass
        return max(times, default=0.0)

    def answers(self) -> dict[str, tuple[int, int]]:
        """Form -> distinct answers and their tokens, each under the best form that holds it."""
        forms: dict[str, dict[str, int]] = {}
        for shard in self.shards.values():
            forms.setdefault(shard.header.form, {}).update({key: n for key, _, n in shard.header.rows})
        out: dict[str, tuple[int, int]] = {}
        seen: set[str] = set()
        for form in sorted(forms, key=lambda f: (f == SCALARS, f != MEAN, f)):
            new = {key: n for key, n in forms[form].items() if key not in seen}
            seen |= set(new)
            out[form] = (len(new), sum(new.values()))
        return out


def folders(store: Path) -> list[Path]:
    """The references of a store, or the folder of one.

    Raises:
        InputError: it holds none.
    """
    if (store / "shards").is_dir() or (store / NAME).is_file():
        return [store]
    found = sorted(p for p in store.glob("*") if (p / "shards").is_dir() or (p / NAME).is_file())
    if not found:
        what = "holds no reference statistics" if store.is_dir() else "is not a folder"
        raise InputError(f"{store}: {what}; name reference.store of a run, or <output_dir>/reference")
    return found


def damaged(folder: Folder) -> Iterator[tuple[str, str]]:
    """(shard name, what is wrong) of each damaged one; reads every byte."""
    yield from folder.unreadable.items()
    names = list(folder.shards)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for name, wrong in zip(names, pool.map(lambda n: _wrong(folder.shards[n].path), names), strict=True):
            if wrong:
                yield name, wrong


def _wrong(path: Path) -> str:
    try:
        return "" if file_digest(path) == digest_of(path.name) else "its bytes do not have the digest of its name"
    except InputError as e:
        return str(e) if path.exists() else ""


def _shard(path: Path) -> Shard | Exception:
    try:
        return Shard(path, read_header(path), path.stat().st_mtime)
    except (OSError, ValueError) as e:
        return e


# -- collecting -------------------------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What ``collect`` did to a reference, or would do."""

    root: Path
    held: int = 0
    """Processes that have it open: nothing was done."""
    leftovers: int = 0
    dropped: int = 0
    """Shards for their age, for room, or because they cannot be read."""
    merged: int = 0
    """Shards that went into ``written`` new ones, without the entries that are ``superseded``."""
    written: int = 0
    superseded: int = 0
    freed: int = 0
    """Bytes."""
    came_back: bool = False
    """A process opened it meanwhile, and all was put back."""


def collect(
    store: Path, *, keep_days: float | None = None, max_bytes: int | None = None, dry_run: bool = False
) -> list[Collected]:
    """Clean up every reference of a store.

    Args:
        keep_days: drop what was not used for so long.
        max_bytes: then drop the least recently used until the whole store is no larger.
        dry_run: only say what would be done.

    Raises:
        InputError: no store there, a full disk, no permission.
    """
    now = time.time()
    read = [Folder.read(root) for root in folders(store)]
    out = {f.root: Collected(f.root, held=holders(f.root, sweep=not dry_run)) for f in read}
    going: dict[Path, set[str]] = {f.root: set() for f in read}
    free = [f for f in read if not out[f.root].held]
    if keep_days is not None:
        for f in free:
            going[f.root] |= {name for name, s in f.shards.items() if now - s.used > keep_days * 86_400}
    if max_bytes is not None:
        total = sum(f.bytes for f in read) - sum(f.shards[n].header.size for f in free for n in going[f.root])
        by_age = sorted((s.used, name, f.root, s.header.size) for f in free for name, s in f.shards.items())
        for _, name, root, size in by_age:
            if total > max_bytes and name not in going[root]:
                going[root].add(name)
                total -= size
    for f in read:
        result = out[f.root]
        result.leftovers = _leftovers(f.root, now, dry_run)
        if not result.held:
            _collect(f, going[f.root], result, now, keep_days, dry_run)
    return list(out.values())


def _leftovers(root: Path, now: float, dry_run: bool) -> int:
    found = 0
    for path in [*root.glob(".*.tmp"), *root.glob("shards/.*.tmp")]:
        try:
            if now - path.stat().st_mtime > EXPIRES_S:
                found += 1
                if not dry_run:
                    path.unlink()
        except OSError:  # another process was faster
            pass
    return found


def _collect(f: Folder, going: set[str], result: Collected, now: float, keep_days: float | None, dry_run: bool) -> None:
    left = {name: s for name, s in f.shards.items() if name not in going}
    plan, result.superseded = _plan(left)
    written: list[Path] = []
    old = {name for group, _ in plan for name in group}
    result.dropped, result.merged = len(going) + len(f.unreadable), len(old)
    before = sum(f.shards[n].header.size for n in (*going, *old))
    if dry_run:
        result.written = sum(bool(rows) for _, rows in plan)
        result.freed = before - sum(_size(left, rows) for _, rows in plan)
        return
    for group, rows in plan:
        path = _merge(f.root, left, group, rows)
        if path is not None:
            written.append(path)
    if _remove(f.root, going.union(old, f.unreadable) - {p.name for p in written}):
        result.written = len(written)
        result.freed = before - sum(p.stat().st_size for p in written if p.is_file())
        aged = keep_days is not None and now - f.used > keep_days * 86_400
        if aged and not (set(f.shards) - going):
            _forget(f.root)
    else:
        result.came_back = True
        result.dropped = result.merged = result.superseded = 0


Kept = list[tuple[str, Row]]
"""(shard, row) in the order in which they are written."""


def _plan(shards: dict[str, Shard]) -> tuple[list[tuple[list[str], Kept]], int]:
    """(groups of shards with the rows that stay of them, number of rows that do not).

    A shard whose rows all stay and that is large is in no group; nor is a group of one that would be written as it is.
    """
    first: dict[tuple[str, str, str], str] = {}  # (fields, form, key) -> the shard it is taken from
    rich: dict[tuple[str, str], set[str]] = {}  # (fields, key) -> forms with what the KL needs
    for name in sorted(shards):
        header = shards[name].header
        for key, _, _ in header.rows:
            first.setdefault((header.fields, header.form, key), name)
            if header.form != SCALARS:
                rich.setdefault((header.fields, key), set()).add(header.form)
    superseded = 0
    by_kind: dict[tuple[str, str], list[tuple[str, Kept]]] = {}
    for name in sorted(shards, key=lambda n: (shards[n].used, n)):  # what was used together stays together
        header = shards[name].header
        kept: Kept = []
        for row in header.rows:
            better = header.form == SCALARS and (header.fields, row[0]) in rich
            if better or first[header.fields, header.form, row[0]] != name:
                superseded += 1
            else:
                kept.append((name, row))
        if header.size < SMALL or len(kept) < len(header.rows):
            by_kind.setdefault((header.fields, header.form), []).append((name, kept))
    groups: list[tuple[list[str], Kept]] = []
    for members in by_kind.values():
        names: list[str] = []
        rows: Kept = []
        size = 0
        for name, kept in members:
            share = _size(shards, kept)
            if names and size + share > LARGE:
                groups.append((names, rows))
                names, rows, size = [], [], 0
            names, rows, size = [*names, name], rows + kept, size + share
        groups.append((names, rows))
    whole = lambda names, rows: len(names) == 1 and len(rows) == len(shards[names[0]].header.rows)  # noqa: E731
    return [(names, rows) for names, rows in groups if not whole(names, rows)], superseded


def _size(shards: dict[str, Shard], rows: Kept) -> int:
    """About the bytes of these rows."""
    out = 0.0
    for name, (_, _, n) in rows:
        header = shards[name].header
        out += header.size * n / max(1, header.tokens)
    return int(out)


def _merge(root: Path, shards: dict[str, Shard], group: Sequence[str], rows: Kept) -> Path | None:
    """Write these rows as one shard; None where nothing is left of them. Damaged shards are left out: they go with the
    others, and their answers are computed again."""
    bad = {name for name in group if _wrong(shards[name].path)}
    for name in sorted(bad):
        log.warning("%s: damaged, dropped; its answers are computed again", shards[name].path)
    rows = [(name, row) for name, row in rows if name not in bad]
    if not rows:
        return None
    header = shards[group[0]].header
    mapped = {name: Mapped(shards[name].path, shards[name].header) for name in dict.fromkeys(n for n, _ in rows)}
    tensors = {
        name: torch.cat([mapped[shard].tensors[name][start : start + n] for shard, (_, start, n) in rows])
        for name in header.places
    }
    told: list[Row] = []
    start = 0
    for _, (key, _, n) in rows:
        told.append((key, start, n))
        start += n
    shard = encode(header.form, header.fields, told, tensors)
    path = root / "shards" / shard.name
    write_atomic(path, shard.write)
    used = max(shards[n].used for n in mapped)
    os.utime(path, (used, used))  # merging is no use of it
    return path


def _remove(root: Path, names: Iterable[str]) -> bool:
    """Delete shards unless a process opens the store meanwhile; whether they are gone."""
    aside = root / _ASIDE
    with writing(aside):
        aside.mkdir(parents=True, exist_ok=True)
        moved = []
        for name in sorted(names):
            try:
                os.replace(root / "shards" / name, aside / name)
                moved.append(name)
            except FileNotFoundError:
                pass
        if holders(root, sweep=False):
            for name in moved:
                os.replace(aside / name, root / "shards" / name)
            return False
        for path in aside.iterdir():  # and what a killed one had moved
            path.unlink(missing_ok=True)
        aside.rmdir()
    return True


def _forget(root: Path) -> None:
    """Delete a reference's folder of which nothing is left; what another process has put there meanwhile stays."""
    try:
        (root / NAME).unlink(missing_ok=True)
        for path in (root / "shards", root / FOLDER, root):
            if path.is_dir():
                path.rmdir()
    except OSError:
        pass
