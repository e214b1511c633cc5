"""Preference pairs from any number of videos, by any number of processes that never talk to one another.

Videos are dealt into buckets by the first bits of their content digest. A bucket is worked on as a whole, by one
process, with answers batched inside it: what it gives depends neither on the other buckets nor on how many processes
there are. Its answers are kept as they come, its records when it is done (pairs.parts); whoever finds all buckets done
puts them together, in the order of the videos.

    answers/<bits>-<bucket>.jsonl   what the model said, append-only: a killed process loses a chunk at most
    judge/<bits>-<bucket>.jsonl     what the judge said
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tempo_fast.config import PairsConfig
from tempo_fast.files import digest, file_digest
from tempo_fast.generation import AnswerCache, Engine, RefusedRequest, Request
from tempo_fast.pairs.judge import measures
from tempo_fast.pairs.method import Ask, Context, Item, Method, Part
from tempo_fast.pairs.parts import Bucket, Parts
from tempo_fast.pairs.prompts import PromptPool
from tempo_fast.runtime.progress import progress
from tempo_fast.runtime.shards import ALL, Shard

_RULES = 1  # part of a bucket's key: raise it when the same inputs must give other records


def method_of(name: str) -> Method:
    """The function behind ``pairs.method``."""
    if name == "rrpo":
        from tempo_fast.pairs.rrpo import make_rrpo

        return make_rrpo
    if name == "leanpo":
        from tempo_fast.pairs.leanpo import make_leanpo

        return make_leanpo
    if name == "mdpo":
        from tempo_fast.pairs.mdpo import make_mdpo

        return make_mdpo
    from tempo_fast.pairs.temple import make_temple

    return make_temple


@dataclass
class PairsJob:
    """The pairs of ``items``, written below ``out``; the same arguments give the same bytes, however they are reached.

    Args:
        items: the videos; their order is the order of the records.
        config: method and settings.
        out: folder, shared by all processes.
        engine: generation.Engine that answers; ``judge`` the judge's, or None.
        reader: video.reader.VideoReader.
        seed: of everything that is drawn.
        prompts: ``data.prompts``, see PromptPool.

    Raises:
        InputError: there is nothing to make pairs from, or ``data.prompts`` is wrong.
    """

    items: Sequence[Item]
    config: PairsConfig
    out: Path
    engine: Engine
    reader: Any
    judge: Engine | None = None
    seed: int = 0
    prompts: str = ""
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.pool = PromptPool(self.prompts)
        c = self.config
        made: dict[str, Any] = {"seed": self.seed, "method": c.method}
        if c.method == "temple":
            names = ("perturb_on", "frames_answer", "clip_input", "aggregate", "instruction")
            made.update({k: getattr(c, k) for k in names})
        self.provenance = {"engine": self.engine.provenance(), **made}
        if self.judge is not None:
            self.provenance["judge"] = self.judge.provenance()
        told = [_own_settings(c), self.provenance, self.reader.settings]
        self.references = tuple(q.answer for item in self.items for q in item.questions)
        scored = {"mdpo": c.mdpo.metric, "leanpo": c.leanpo.metric}.get(c.method, "")
        if "cider_d" in (scored, c.select.metric if c.select.samples else ""):
            told.append(self.references)  # its document frequencies are of all of them
        settings = digest([_RULES, told, file_digest(self.prompts) if self.prompts else ""])
        self.parts = Parts(self.items, self.config, self.out, settings)

    def work(self, bucket: Bucket, *, quiet: bool = True) -> None:
        """Make and keep the records of a bucket, unless they are there; videos that may go well now are tried again."""
        if self.parts.is_done(bucket, settled=True):
            return
        with ExitStack() as stack:
            ask = self._ask("answers", bucket, self.engine, quiet, stack)
            judge = None if self.judge is None else self._ask("judge", bucket, self.judge, quiet, stack)
            context = Context(
                ask, judge, self.reader, self.config, self.seed, self.pool, self.provenance, self.references
            )
            part = self._make(bucket.items, context)
        self.parts.keep(bucket, part)

    def _make(self, items: Sequence[Item], context: Context) -> Part:
        before = Part()
        if self.config.select.samples and self.config.method != "temple":
            from tempo_fast.pairs.select import select

            items, before = select(items, context)
        part = method_of(self.config.method)(items, context)
        for record in part.records:
            for rejected in record.rejected:
                found = measures(record.chosen, rejected.text)
                part.tally(rejected.r, rejected.kind).measure(found)
        part.counts.update(before.counts)
        part.failed[:0] = [f for f in before.failed if f not in part.failed]
        part.problems[:0] = before.problems
        return part

    def _ask(self, folder: str, bucket: Bucket, engine: Engine, quiet: bool, stack: ExitStack) -> Ask:
        own = self.out / folder / f"{bucket.name}.jsonl"
        kin = [p for p in sorted(own.parent.glob("*.jsonl")) if p != own and bucket.related(p.stem)]
        cache = stack.enter_context(AnswerCache(own, engine, also=kin))

        def ask(requests: Sequence[Request], desc: str) -> list[str]:
            try:
                return cache.answers(requests, "" if quiet else desc)
            except RefusedRequest as e:
                # words that are too long for a model have no video that fails; an empty answer is no verdict, no text
                if any(request.plans for request in requests):
                    raise
                return e.texts

        return ask

    def run(self, shard: Shard = ALL, check: Callable[[], None] = lambda: None) -> None:
        """Work on this shard's buckets. ``check`` is called between them; may raise to stop."""
        mine = [b for number, b in enumerate(self.parts.buckets) if shard.takes(number)]
        only = len(self.parts.buckets) == 1
        bar = None if only else progress(sum(len(b.items) for b in mine), "pairs", "video")
        try:
            for bucket in mine:
                check()
                self.work(bucket, quiet=not only)
                if bar is not None:
                    bar.update(len(bucket.items))
        finally:
            if bar is not None:
                bar.close()


def _own_settings(config: PairsConfig) -> PairsConfig:
    """What decides records: not the page for a reader's eyes, nor the sections of other methods."""
    plain = PairsConfig()
    others: dict[str, Any] = {k: getattr(plain, k) for k in ("rrpo", "leanpo", "mdpo") if k != config.method}
    if not config.select.samples or config.method == "temple":
        others["select"] = plain.select
    return replace(config, max_videos=0, bucket_videos=1, audit_pairs=0, **others)


def make_pairs(
    items: Sequence[Item],
    engine: Engine,
    reader: Any,
    config: PairsConfig,
    out: str | Path,
    *,
    judge: Engine | None = None,
    seed: int = 0,
    prompts: str = "",
) -> dict[str, Any]:
    """All of it in this process: see PairsJob. Returns the audit."""
    job = PairsJob(items, config, Path(out), engine, reader, judge, seed, prompts)
    job.run()
    return job.parts.merge()
