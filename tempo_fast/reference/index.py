"""Which shard holds which answer, from the shards' headers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tempo_fast.reference.shard import MEAN, SCALARS, Header


class Entry(NamedTuple):
    """Where an answer's statistics lie: rows ``start .. start + n`` of a shard."""

    shard: str
    start: int
    n: int


class Index:
    """Answers by form and key. One that stands in several shards is taken from the first by name, so that all
    processes take the same, in whatever order they met them."""

    def __init__(self) -> None:
        self.headers: dict[str, Header] = {}
        """By shard."""
        self._entries: dict[str, dict[str, Entry]] = {}
        self._spare: dict[tuple[str, str], list[Entry]] = {}

    def forms(self) -> tuple[str, ...]:
        """Every form holds the scalars; in the order in which they are taken from."""
        return (MEAN, *sorted(form for form in self._entries if form not in (MEAN, SCALARS)), SCALARS)

    def keys(self, forms: Sequence[str]) -> list[str]:
        """Of the answers in any of ``forms``, sorted."""
        return sorted(set().union(*(self._entries.get(form, {}) for form in forms)))

    def find(self, key: str, forms: Sequence[str]) -> Entry | None:
        """In the first of ``forms`` that has it."""
        return next((e for form in forms if (e := self._entries.get(form, {}).get(key)) is not None), None)

    def enter(self, shard: str, header: Header) -> None:
        """Take up a shard."""
        self.headers[shard] = header
        entries = self._entries.setdefault(header.form, {})
        for key, start, n in header.rows:
            entry = Entry(shard, start, n)
            known = entries.setdefault(key, entry)
            if known is not entry:
                entries[key] = min(known, entry)
                self._spare.setdefault((header.form, key), []).append(max(known, entry))

    def leave(self, shard: str) -> int:
        """Take a shard out; returns how many answers no other shard holds in its form."""
        header = self.headers.pop(shard, None)
        if header is None:
            return 0
        entries, lost = self._entries[header.form], 0
        for key in {key for key, _, _ in header.rows}:
            every = [*self._spare.pop((header.form, key), []), entries.pop(key)]
            left = sorted(e for e in every if e.shard != shard)
            if not left:
                lost += 1
                continue
            entries[key] = left[0]
            if left[1:]:
                self._spare[header.form, key] = left[1:]
        return lost
