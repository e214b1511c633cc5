"""The reference of the stages: which store, what it lacks, and whether the model still agrees with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tempo_fast.config import ObjectiveConfig, RunConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_json, write_json
from tempo_fast.models.load import Bundle
from tempo_fast.reference.fill import fill, start_check, verify_together
from tempo_fast.reference.shard import form_of
from tempo_fast.reference.store import ReferenceStore, compatible_fields, reference_fields
from tempo_fast.training.item import Item, Trees
from tempo_fast.training.loop import Context
from tempo_fast.trees.layout import ResponseTree
from tempo_kernels.objectives import make_objective

log = logging.getLogger("tempo_fast")

NO_READS = {"hits": 0, "misses": 0, "chosen_hits": 0, "chosen_misses": 0}


def needs_reference(objective: ObjectiveConfig) -> bool:
    """Whether an objective compares with a reference at all. Raises InputError for an unknown name or option."""
    try:
        return make_objective(objective.name, **objective.options).needs_reference
    except ValueError as e:
        raise InputError(f"train.objective: {e}") from e


class References:
    """Opens, fills and checks the stores of a run."""

    def __init__(self, config: RunConfig, ctx: Context) -> None:
        self.config, self.ctx = config, ctx

    def open(self, bundle: Bundle, objective: ObjectiveConfig) -> ReferenceStore:
        """The statistics of this bundle's base, below ``reference.store`` or ``<output_dir>/reference``."""
        root = Path(self.config.reference.store or Path(self.config.output_dir) / "reference")
        kl = self.config.reference.kl == "always" or make_objective(objective.name, **objective.options).needs_kl
        fields = {**reference_fields(bundle), **self.ctx.features.identity()}
        compatible = compatible_fields(bundle, self.config.train.attention)
        form = form_of(self.config.reference.keep, bundle.dtype)
        store = ReferenceStore(root / digest(fields)[:16], fields, compatible=compatible, form=form)
        store.kl = kl
        return store

    def fill(
        self,
        bundle: Bundle,
        store: ReferenceStore,
        name: str,
        items: Sequence[Item],
        earlier: Iterable[tuple[ObjectiveConfig, Sequence[Item]]] = (),
    ) -> dict[str, Any]:
        """Compute what the store lacks for a stage; the first time's counts are kept beside the store's manifest.

        Where chosen answers are missing, ``earlier`` stages of the same reference are filled first: a shard of theirs
        that was damaged is then computed as it was, all its answers together, and comes out the same to the last bit.
        """
        counts, lacks_chosen = self._count(name, store, Trees(items))
        if any(self.ctx.ranks.all_gather_object(lacks_chosen)):
            for objective, others in earlier:
                self._fill(bundle, self.open(bundle, objective), others)
            store.refresh()
        self._fill(bundle, store, items)
        return counts

    def _fill(self, bundle: Bundle, store: ReferenceStore, items: Sequence[Item]) -> None:
        train = self.config.train
        fill(
            bundle,
            store,
            Trees(items),
            self.ctx.reader,
            self.ctx.features,
            kl=store.kl,
            max_tokens=train.max_tokens,
            attention=train.attention,
            loader=self.ctx.loader,
            check=self.ctx.stopper.check,
        )

    def counts(self, name: str) -> dict[str, int]:
        """What the run found and had to compute for a stage, as its first start saw it; zeros where it needed none."""
        known = read_json(self._fills) if self._fills.is_file() else {}
        return {k: v for k, v in known.get(name, NO_READS).items() if k != "answers"}

    @property
    def _fills(self) -> Path:
        return Path(self.config.output_dir) / "reference" / "fills.json"

    def _count(self, name: str, store: ReferenceStore, trees: Sequence[ResponseTree]) -> tuple[dict[str, int], bool]:
        """Note what the store holds of a stage, once: later starts find all of it. Also whether it lacks a chosen
        answer now."""
        keys = [store.keys(tree) for tree in trees]
        chosen, every = {row[0] for row in keys}, {key for row in keys for key in row}
        known = read_json(self._fills) if self._fills.is_file() else {}
        answers = digest(sorted(every))
        verify_together(store, sorted(every), self.ctx.ranks)
        missing = set(store.missing(sorted(every)))
        if known.get(name, {}).get("answers") != answers:
            known[name] = {
                "answers": answers,
                "hits": len(every - missing),
                "misses": len(missing),
                "chosen_hits": len(chosen - missing),
                "chosen_misses": len(chosen & missing),
            }
            self.ctx.ranks.barrier()  # all have looked before the first one fills
            if self.ctx.ranks.is_main:
                write_json(self._fills, known)
        return {k: v for k, v in known[name].items() if k != "answers"}, bool(chosen & missing)

    def check(self, bundle: Bundle, store: ReferenceStore, name: str, items: Sequence[Item]) -> None:
        """Compare the model, adapters off, with what is stored of a few records. Raises InputError."""
        train = self.config.train
        difference = start_check(
            bundle,
            store,
            list(Trees(items[:2])),
            self.ctx.reader,
            self.ctx.features,
            max_tokens=train.max_tokens,
            attention=train.attention,
        )
        log.info("%s: adapters off differ from the stored reference by at most %.2e nats", name, difference)
