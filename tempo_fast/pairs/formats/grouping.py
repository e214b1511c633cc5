"""Rows of one tree into one record, in constant memory.

Every row of a foreign format comes as a record with one rejected answer; those that agree in all else are one tree.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tempo_fast.errors import InputError
from tempo_fast.pairs.formats.native import add_extra, write
from tempo_fast.pairs.formats.rows import Row, dumps, union
from tempo_fast.schema import PreferenceRecord

CACHE_KIB = 2000
"""What SQLite keeps in memory; the rest goes to a file in the folder for temporary files (SQLITE_TMPDIR, TMPDIR)."""


@dataclass
class Leaf:
    """One row: its tree's key, a record with one rejected answer, the extra columns of its row, and whether the
    record's ``spans`` are its own rather than to be made from its answers."""

    key: bytes
    record: PreferenceRecord
    extra: Row
    own_spans: bool


def adjacent(leaves: Iterable[Leaf]) -> Iterator[PreferenceRecord]:
    """Join rows of one tree that follow each other."""
    tree: list[Leaf] = []
    for leaf in leaves:
        if tree and tree[0].key != leaf.key:
            yield _join(tree)
            tree = []
        tree.append(leaf)
    if tree:
        yield _join(tree)


def everywhere(leaves: Iterable[Leaf]) -> Iterator[PreferenceRecord]:
    """Join the rows of one tree wherever they stand; trees in the order of their first row. The first record comes when
    all rows are read: they wait in a temporary SQLite database, which disappears with this process.

    Raises InputError when the disk of temporary files is full.
    """
    database = sqlite3.connect("", isolation_level=None)  # "": a private file that is made when the cache is full
    try:
        for line in (
            f"PRAGMA cache_size = -{CACHE_KIB}", "PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF",
            "CREATE TABLE trees (tree INTEGER PRIMARY KEY, key BLOB UNIQUE)",
            "CREATE TABLE rows (tree INTEGER, leaf TEXT)", "BEGIN",
        ):  # fmt: skip
            database.execute(line)
        key, tree = b"", 0
        for leaf in leaves:
            if leaf.key != key:
                key = leaf.key
                database.execute("INSERT OR IGNORE INTO trees (key) VALUES (?)", (key,))
                (tree,) = database.execute("SELECT tree FROM trees WHERE key = ?", (key,)).fetchone()
            text = dumps([write(leaf.record), leaf.extra, leaf.own_spans])
            database.execute("INSERT INTO rows VALUES (?, ?)", (tree, text))
        database.execute("CREATE INDEX by_tree ON rows (tree)")
        yield from adjacent(_stored(database))
    except sqlite3.OperationalError as e:
        raise InputError(f"the folder of temporary files (TMPDIR) cannot take the rows to be joined ({e})") from e
    finally:
        database.close()


def _stored(database: sqlite3.Connection) -> Iterator[Leaf]:
    for tree, text in database.execute("SELECT tree, leaf FROM rows ORDER BY tree, rowid"):
        record, extra, own_spans = json.loads(text)
        yield Leaf(tree, PreferenceRecord.from_row(record), extra, own_spans)


def _join(leaves: list[Leaf]) -> PreferenceRecord:
    record = leaves[0].record
    if len(leaves) > 1:
        record.rejected = [leaf.record.rejected[0] for leaf in leaves]
    if not all(leaf.own_spans for leaf in leaves):
        record.spans = union([x.chosen_spans for x in record.rejected])
    add_extra(record, [leaf.extra for leaf in leaves])
    return record
