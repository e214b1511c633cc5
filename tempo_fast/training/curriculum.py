"""The order of stages: preference stages r = 16, 8, 4, 2, then SFT, and SFT alone as the control.

``reference: base``: one reference, one LoRA that continues unmerged, so that the reference is the model, adapters off.
``reference: previous_stage`` (the official TEMPLE scripts): at each boundary merge, start a new LoRA, refill the store.
Optimizer and schedule start anew with every stage in both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tempo_fast.config import LoraConfig, ObjectiveConfig, RunConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_json, write_json
from tempo_fast.models.liger import apply_liger
from tempo_fast.models.load import Bundle, checkpoint_digest, load_bundle, resolve_path
from tempo_fast.reference.fill import fill, start_check
from tempo_fast.reference.store import ReferenceStore, compatible_fields, reference_fields
from tempo_fast.schema import PreferenceRecord, SFTRecord
from tempo_fast.training.adapters import adapter_digest, attach_lora, load_lora, merge_lora
from tempo_fast.training.data import Item, Items, check_lengths, preference_items, sft_items
from tempo_fast.training.loop import Context, Stage, finished, run_stage
from tempo_fast.trees.layout import ResponseTree
from tempo_kernels.objectives import make_objective

log = logging.getLogger("tempo_fast")


@dataclass
class Outcome:
    """What a curriculum leaves: a row per stage and the videos that could not be used."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    sft: dict[str, Any] | None = None
    control: dict[str, Any] | None = None
    merged: str = ""
    quarantined: list[dict[str, str]] = field(default_factory=list)


def stage_name(index: int, r: int) -> str:
    """``stage1_r16`` for index 0."""
    return f"stage{index + 1}_r{r}"


def needs_reference(objective: ObjectiveConfig) -> bool:
    """Whether an objective compares with a reference at all. Raises InputError for an unknown name or option."""
    try:
        return make_objective(objective.name, **objective.options).needs_reference
    except ValueError as e:
        raise InputError(f"train.objective: {e}") from e


class Curriculum:
    """Runs, or resumes, the stages of a config. ``load_records(r)`` reads the pairs of one difficulty."""

    def __init__(
        self,
        config: RunConfig,
        ctx: Context,
        load_records: Callable[[int], list[PreferenceRecord]],
        sft_records: Sequence[SFTRecord] | None,
    ) -> None:
        self.config = config
        self.ctx = ctx
        self.load_records = load_records
        self.sft_records = sft_records
        self.base = str(resolve_path(config.model.path))
        self.outcome = Outcome()
        self._items: dict[int, list[Item]] = {}
        self._digests: dict[str, str] = {}

    # -- pieces ------------------------------------------------------------------------------------------------

    def load(self, path: str) -> Bundle:
        model = self.config.model
        bundle = load_bundle(path, model.dtype, model.device)
        apply_liger(bundle.model, self.config.train.liger_kernels, bundle.device)
        return bundle

    @cached_property
    def planner(self) -> Bundle:
        """The base without its weights: what tokenising needs."""
        model = self.config.model
        return load_bundle(self.base, model.dtype, model.device, weights=False)

    def digest_of(self, path: str) -> str:
        if path not in self._digests:
            self._digests[path] = checkpoint_digest(path)
        return self._digests[path]

    def items(self, bundle: Bundle, r: int) -> list[Item]:
        """Trees of one difficulty; text and plans only, read once."""
        if r not in self._items:
            marked = self.config.train.objective.name in ("rrpo", "dpa")  # ddpo weighs what is not marked, too
            found = preference_items(bundle, self.ctx.reader, self.load_records(r), spans_needed=marked)
            self._items[r] = self._usable(found, "pairs")
        return self._items[r]

    def sft_trees(self) -> list[Item]:
        """Trees of the SFT records, read once."""
        if 0 not in self._items:
            self._items[0] = self._usable(sft_items(self.planner, self.ctx.reader, self.sft_records or []), "sft")
        return self._items[0]

    def _usable(self, found: Items, what: str) -> list[Item]:
        """The items whose videos decode; the others are quarantined by name. Raises InputError when none is left."""
        bad = self.ctx.checked.failures([p for i in found.items for p in i.tree.plans], self.ctx.stopper.check)
        self._note([*found.quarantined, *bad.values()])
        items = [i for i in found.items if not any(p.key in bad for p in i.tree.plans)]
        if not items:
            raise InputError(f"{what}: no usable record (first: {next(iter(bad.values()))['reason']})")
        check_lengths(items, self.config.train.max_tokens)
        return items

    def _note(self, rows: list[dict[str, str]]) -> None:
        self.outcome.quarantined += [row for row in rows if row not in self.outcome.quarantined]
        self.ctx.skipped = len(self.outcome.quarantined)

    def open_store(self, bundle: Bundle) -> ReferenceStore:
        """The statistics of this bundle's base, below ``reference.store`` or ``<output_dir>/reference``."""
        root = Path(self.config.reference.store or Path(self.config.output_dir) / "reference")
        objective = self.config.train.objective
        kl = self.config.reference.kl == "always" or make_objective(objective.name, **objective.options).needs_kl
        fields = {**reference_fields(bundle), **self.ctx.features.identity()}
        compatible = compatible_fields(bundle, self.config.train.attention)
        store = ReferenceStore(root / digest(fields)[:16], fields, compatible=compatible)
        store.kl = kl
        return store

    def fill(self, bundle: Bundle, index: int) -> dict[str, Any]:
        """Compute what the store lacks for a stage; the first time's counts are kept beside the store's manifest."""
        r = self.config.train.stages[index].r
        items = self.items(bundle, r)
        store = self.open_store(bundle)
        trees = [i.tree for i in items]
        counts = self._counts(stage_name(index, r), store, trees)
        fill(
            bundle,
            store,
            trees,
            self.ctx.reader,
            self.ctx.features,
            kl=store.kl,
            max_tokens=self.config.train.max_tokens,
            attention=self.config.train.attention,
            loader=self.ctx.loader,
            check=self.ctx.stopper.check,
        )
        return counts

    def _counts(self, name: str, store: ReferenceStore, trees: list[ResponseTree]) -> dict[str, int]:
        """What the run found and had to compute for a stage, as its first start saw it: later starts find all of it."""
        chosen = {store.key(t, 0) for t in trees}
        every = {store.key(t, b) for t in trees for b in range(len(t.branches))}
        path = Path(self.config.output_dir) / "reference" / "fills.json"
        known = read_json(path) if path.is_file() else {}
        answers = digest(sorted(every))
        if known.get(name, {}).get("answers") != answers:
            missing = set(store.missing(sorted(every)))
            known[name] = {
                "answers": answers,
                "hits": len(every - missing),
                "misses": len(missing),
                "chosen_hits": len(chosen - missing),
                "chosen_misses": len(chosen & missing),
            }
            self.ctx.ranks.barrier()  # all have looked before the first one fills
            if self.ctx.ranks.is_main:
                write_json(path, known)
        return {k: v for k, v in known[name].items() if k != "answers"}

    # -- the walk ------------------------------------------------------------------------------------------------

    def fill_reference(self) -> list[dict[str, Any]]:
        """The ``reference`` step: everything that can be computed before training."""
        train = self.config.train
        if not needs_reference(train.objective):
            return []
        bundle = self.load(self.base)
        last = len(train.stages) if self.config.reference.mode == "base" else min(1, len(train.stages))
        rows = []
        for index in range(last):
            self.ctx.stopper.check()
            rows.append({"stage": stage_name(index, train.stages[index].r), **self.fill(bundle, index)})
        return rows

    def run(self) -> Outcome:
        """All stages, SFT and the control; finished ones are skipped."""
        adapter, base = self._preference_stages()
        sft = self.config.train.sft
        with_sft = bool(self.sft_records) and sft.epochs > 0
        final_base = base
        if adapter:
            final_base = self._merge(base, adapter, self.ctx.out / ("dpo_merged" if with_sft else "merged"))
        self.outcome.merged = final_base
        if with_sft:
            self.outcome.sft = self._sft("sft", final_base)
            self.outcome.merged = self._merge(final_base, self.outcome.sft["adapter"], self.ctx.out / "merged")
            if sft.control:
                self.outcome.control = self._sft("control", self.base)
        return self.outcome

    def _preference_stages(self) -> tuple[str, str]:
        """Returns (adapter of the last stage or "", the base under it)."""
        train, continuing = self.config.train, self.config.reference.mode == "base"
        with_reference = needs_reference(train.objective)
        base, adapter = self.base, ""
        planner = self.planner
        bundle: Bundle | None = None
        for index, settings in enumerate(train.stages):
            if adapter and not continuing:
                base = self._merge(base, adapter, Path(adapter).parent / "merged")
                adapter, bundle = "", None
            stage = Stage(
                name=stage_name(index, settings.r),
                r=settings.r,
                objective=train.objective,
                learning_rate=settings.learning_rate or train.learning_rate,
                epochs=settings.epochs,
                batch_size=train.batch_size,
                lora=train.lora,
                base=base,
                base_digest=self.digest_of(base),
                dtype=self.config.model.dtype,
                start_adapter=adapter,
                start_digest=adapter_digest(adapter) if adapter else "",
            )
            items = self.items(planner, settings.r)
            result = finished(stage, self.ctx, items)
            if result is None:
                bundle = self._with_adapter(stage, bundle)
                reference = {"hits": 0, "misses": 0, "chosen_hits": 0, "chosen_misses": 0}
                store = None
                if with_reference:
                    reference = self.fill(bundle, index)
                    store = self.open_store(bundle)
                    self._check_start(bundle, store, items, stage.name)
                result = run_stage(stage, self.ctx, bundle, items, store)
                result["reference"] = {
                    **reference,
                    "read_hits": store.hits if store else 0,
                    "read_misses": store.misses if store else 0,
                }
                if self.ctx.ranks.rank == 0:
                    write_json(self.ctx.out / stage.name / "stage.json", result)
            else:
                log.info("%s: done before, skipped", stage.name)
                bundle = None
            self.outcome.stages.append(result)
            adapter = result["adapter"]
        return adapter, base

    def _with_adapter(self, stage: Stage, bundle: Bundle | None) -> Bundle:
        """The model a stage trains: in ``base`` mode the adapter of the stage before goes on."""
        if bundle is not None:
            return bundle
        bundle = self.load(stage.base)
        if stage.start_adapter:
            load_lora(bundle, Path(stage.start_adapter), trainable=True)
        else:
            attach_lora(bundle, stage.lora, seed=self.ctx.seed, vision=stage.vision_lora)
        return bundle

    def _check_start(self, bundle: Bundle, store: ReferenceStore, items: list[Item], name: str) -> None:
        some = [i.tree for i in items[:2]]
        train = self.config.train
        difference = start_check(
            bundle,
            store,
            some,
            self.ctx.reader,
            self.ctx.features,
            max_tokens=train.max_tokens,
            attention=train.attention,
        )
        log.info("%s: adapters off differ from the stored reference by at most %.2e nats", name, difference)

    def _merge(self, base: str, adapter: str, out: Path) -> str:
        marker = {"base": self.digest_of(base), "adapter": adapter_digest(adapter)}
        note = out / "merge.json"
        done = note.is_file() and {k: read_json(note).get(k) for k in marker} == marker
        if not done and self.ctx.ranks.is_main:
            error = merge_lora(base, Path(adapter), out, device="cpu", note=marker)
            log.info("merged %s: rounding error at most %.2e", out, error)
        self.ctx.ranks.barrier()
        return str(out)

    def _sft(self, name: str, base: str) -> dict[str, Any]:
        sft, lora = self.config.train.sft, self.config.train.lora
        stage = Stage(
            name=name,
            r=0,
            objective=ObjectiveConfig("sft", {}),
            learning_rate=sft.learning_rate,
            epochs=sft.epochs,
            batch_size=sft.batch_size,
            lora=LoraConfig(lora.r, sft.alpha, lora.dropout),
            base=base,
            base_digest=self.digest_of(base),
            dtype=self.config.model.dtype,
            vision_lora=sft.vision_lora,
            max_steps=sft.max_steps,
        )
        items = self.sft_trees()
        result = finished(stage, self.ctx, items)
        if result is None:
            result = run_stage(stage, self.ctx, self._with_adapter(stage, None), items, None)
        return result
