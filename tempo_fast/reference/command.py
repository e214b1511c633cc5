"""``tempo-fast reference ls|verify|gc STORE``."""

from __future__ import annotations

import time
from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.reference.collect import Collected, Folder, collect, damaged, folders
from tempo_fast.reference.holders import holders
from tempo_fast.reference.sizes import readable


def ls_command(store: Path) -> None:
    """Print what a store holds. Raises InputError where there is none."""
    read = [Folder.read(root) for root in folders(store)]
    for f in sorted(read, key=lambda f: -f.used):
        print("\n".join(_described(f, store)))
    total = sum(f.bytes for f in read)
    print(f"{store}: {len(read)} references, {sum(len(f.shards) for f in read)} shards, {readable(total)}")


def _described(f: Folder, store: Path) -> list[str]:
    held = holders(f.root, sweep=False)
    use = f"in use by {held}" if held else f"last used {_ago(time.time() - f.used)}"
    name = f.root.name if f.root != store else str(f.root)
    rows = [f"{name}  {readable(f.bytes)} in {len(f.shards)} shards, {use}"]
    for key, value in f.fields.items():
        rows.append(f"  {key:<16} {value}")
    known = f.manifest.get("compatible")
    if known:
        rows.append(f"  {'filled with':<16} {', '.join(f'{key} {value}' for key, value in known.items())}")
    elif not f.manifest:
        rows.append(f"  {'manifest':<16} missing or damaged; it is written again when the store is used")
    for form, (answers, tokens) in f.answers().items():
        rows.append(f"  {form:<16} {answers:,} answers, {tokens:,} tokens")
    if f.unreadable:
        rows.append(f"  {'damaged':<16} {len(f.unreadable)} shards cannot be read")
    return rows


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def verify_command(store: Path) -> None:
    """Read every shard. Raises InputError naming the damaged ones."""
    bad: list[str] = []
    shards = size = 0
    for root in folders(store):
        folder = Folder.read(root)
        shards, size = shards + len(folder.shards) + len(folder.unreadable), size + folder.bytes
        for name, wrong in damaged(folder):
            print(f"{root / 'shards' / name}: {wrong}")
            bad.append(name)
    if bad:
        raise InputError(
            f"{store}: {len(bad)} of {shards} shards are damaged (first: {bad[0]}); their answers are computed again"
            " when a run needs them"
        )
    print(f"{store}: {shards} shards, {readable(size)}, all sound")


def gc_command(store: Path, *, keep_days: float | None, max_gib: float | None, dry_run: bool) -> None:
    """Clean a store up and print what was done, or would be. Raises InputError as ``collect``."""
    limit = None if max_gib is None else int(max_gib * 2**30)
    found = collect(store, keep_days=keep_days, max_bytes=limit, dry_run=dry_run)
    for c in found:
        print(f"{c.root.name}: {_told(c)}")
    freed = sum(c.freed for c in found)
    print(f"{store}: {readable(freed)} {'would be' if dry_run else 'were'} freed")


def _told(c: Collected) -> str:
    left = f"; {c.leftovers} leftovers of killed writers" if c.leftovers else ""
    if c.held:
        return f"in use by {c.held}, left alone{left}"
    if c.came_back:
        return f"a process opened it meanwhile, left as it was{left}"
    told = [f"{c.dropped} shards dropped"] if c.dropped else []
    if c.merged:
        without = f" without {c.superseded} superseded answers" if c.superseded else ""
        told.append(f"{c.merged} shards merged into {c.written}{without}")
    return (", ".join(told) or "nothing to do") + left
