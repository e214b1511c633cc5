"""Which videos decode: found out before a stage is planned, once per video, kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tempo_fast.config import LoaderConfig
from tempo_fast.errors import InputError
from tempo_fast.files import read_jsonl
from tempo_fast.runtime.progress import progress
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.video.container import DecodeTimeout
from tempo_fast.video.loader import Source, prefetching


class DecodeCheck:
    """Decodes the frames of each plan once and remembers the outcome in a journal of complete lines.

    A video that breaks in the middle of a stage would end the run, and leaving its records out then would be another
    training. One that takes too long counts as broken in this run, and is tried again by the next. Videos known to
    decode (curation has read every frame of theirs) are taken as they are, and so are plans that were decoded once
    (``decoded`` tells by their key).
    """

    def __init__(
        self,
        journal: Path,
        reader: Any,
        ranks: Ranks,
        known: Iterable[str] = (),
        decoded: Callable[[str], bool] = lambda key: False,
        loader: LoaderConfig | None = None,
    ) -> None:
        self.journal, self.reader, self.ranks, self.decoded = journal, reader, ranks, decoded
        self.loader = loader
        self.known = set(known)
        """SHA-256 of files that decode."""
        self._outcome: dict[str, str] = {}
        if journal.is_file():
            data = journal.read_bytes()
            if not data.endswith(b"\n") and ranks.is_main:  # killed while it wrote
                journal.write_bytes(data[: data.rfind(b"\n") + 1])
            ranks.barrier()
            self._outcome = {row["plan"]: row["reason"] for _, row in read_jsonl(journal)}

    def failures(self, plans: Iterable[Any], check: Callable[[], None]) -> dict[str, dict[str, str]]:
        """Plan key -> {"video", "reason"} of the plans whose frames cannot be decoded. ``check`` may stop the work."""
        distinct = {p.key: p for p in plans if getattr(p, "digest", None) not in self.known}
        todo = [p for key, p in distinct.items() if key not in self._outcome]
        mine: dict[str, str] = {}
        late: dict[str, str] = {}  # of this run alone: another may have more time, or a faster disk
        share = todo[self.ranks.rank :: self.ranks.world]
        with prefetching(self.reader, share, self.loader, skip=lambda plan: self.decoded(plan.key)) as source:
            for plan in progress(share, desc="decode check", unit="video"):
                check() if self.ranks.world == 1 else None
                try:
                    mine[plan.key] = self._try(plan, source)
                except DecodeTimeout as e:
                    late[plan.key] = str(e)
                    continue
                if self.ranks.world == 1:
                    self._write({plan.key: mine[plan.key]})
        for decoded, out_of_time in self.ranks.all_gather_object((mine, late)):
            self._outcome.update(decoded)
            late.update(out_of_time)
        if self.ranks.world > 1 and self.ranks.is_main:
            self._write({p.key: self._outcome[p.key] for p in todo if p.key not in late})
        outcome = {**self._outcome, **late}
        return {
            key: {"video": str(p.path), "reason": outcome[key]} for key, p in distinct.items() if outcome[key]
        }

    def _try(self, plan: Any, source: Source) -> str:
        try:
            if not self.decoded(plan.key):
                source.pixels(plan)
        except DecodeTimeout:
            raise
        except InputError as e:
            return str(e)
        return ""

    def _write(self, rows: dict[str, str]) -> None:
        self.journal.parent.mkdir(parents=True, exist_ok=True)
        with open(self.journal, "a", encoding="utf-8") as f:
            f.writelines(json.dumps({"plan": key, "reason": reason}) + "\n" for key, reason in rows.items())
