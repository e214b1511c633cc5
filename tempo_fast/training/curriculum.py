"""The walk through a run's stages: preference stages, SFT after, before or between them, and SFT alone as the control.

``reference: base``: one reference, one LoRA that continues unmerged, so that the reference is the model, adapters off.
``reference: previous_stage`` (the official TEMPLE scripts): at each boundary merge, start a new LoRA, refill the store.
A stage may choose for itself. With ``tune: full`` every stage starts from the model of the one before, and what differs
is the reference: the model before the first stage, or that of the stage before. Optimizer and schedule start anew with
every stage in both. SFT before the stages is merged into the model that they start from: that model, not the one on
disk, is then their ``base``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tempo_fast.config import LoraConfig, ObjectiveConfig, RunConfig, StageConfig
from tempo_fast.config.curriculum import objective_of
from tempo_fast.errors import InputError
from tempo_fast.files import read_json, write_json
from tempo_fast.models.liger import apply_liger
from tempo_fast.models.load import Bundle, checkpoint_digest, load_bundle, resolve_path
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.schema import PreferenceRecord, SFTRecord
from tempo_fast.training.adapters import adapter_digest, attach_lora, link_model, load_lora, merge_lora, unfreeze
from tempo_fast.training.adaptive import Looks, budget_of
from tempo_fast.training.data import Item, Items, check_lengths, preference_items, sft_items
from tempo_fast.training.loop import Context, Stage, finished, run_stage
from tempo_fast.training.references import NO_READS, References, needs_reference
from tempo_fast.training.sft import Interleaved
from tempo_fast.training.stages import Chosen, choose, stage_name

log = logging.getLogger("tempo_fast")


@dataclass
class Outcome:
    """What a curriculum leaves: a row per stage and the videos that could not be used."""

    stages: list[dict[str, Any]] = field(default_factory=list)
    sft: dict[str, Any] | None = None
    """The SFT stage: ``sft`` after the preference stages, ``sft_first`` before them; none between them."""
    control: dict[str, Any] | None = None
    merged: str = ""
    quarantined: list[dict[str, str]] = field(default_factory=list)


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
        self.references = References(config, ctx)
        self._items: dict[tuple[Any, ...], list[Item]] = {}
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

    @property
    def sft_when(self) -> str:
        """``train.sft.when``, or "" where there is no SFT."""
        sft = self.config.train.sft
        return sft.when if self.sft_records and sft.epochs > 0 else ""

    def objective(self, index: int) -> ObjectiveConfig:
        """Of a stage."""
        return objective_of(self.config.train.stages[index], self.config.train.objective)

    def continues(self, settings: StageConfig) -> bool:
        """Whether a stage goes on with the adapter and the reference of the one before."""
        return (settings.reference or self.config.reference.mode) == "base"

    def chosen(self, index: int) -> Chosen:
        """What a stage trains on and is judged by; text and plans only, read once."""
        train = self.config.train
        marked = self.objective(index).name in ("rrpo", "dpa")  # ddpo weighs what is not marked, too
        pool = lambda r, kinds: self.items(r, kinds, marked)  # noqa: E731
        return choose(train.stages, index, pool, train.adaptive, self.config.seed)

    def items(self, r: int, kinds: tuple[str, ...] = (), marked: bool = False) -> list[Item]:
        """Records of one difficulty with their pairs of ``kinds`` (all where empty); ``marked``: pairs with a key
        phrase alone."""
        key = (r, kinds, marked)
        if key not in self._items:
            records = self.load_records(r)
            if kinds:
                records = _of_kinds(records, r, kinds)
            found = preference_items(self.planner, self.ctx.reader, records, spans_needed=marked, ranks=self.ctx.ranks)
            self._items[key] = self._usable(found, "pairs")
        return self._items[key]

    def sft_trees(self) -> list[Item]:
        """Trees of the SFT records, read once."""
        if ("sft",) not in self._items:
            found = sft_items(self.planner, self.ctx.reader, self.sft_records or [], ranks=self.ctx.ranks)
            self._items["sft",] = self._usable(found, "sft")
        return self._items["sft",]

    def _usable(self, found: Items, what: str) -> list[Item]:
        """The items whose videos decode; the others are quarantined by name. Raises InputError when none is left."""
        bad = self.ctx.checked.failures([p for i in found.items for p in i.plans], self.ctx.stopper.check)
        self._note([*found.quarantined, *bad.values()])
        items = [i for i in found.items if not any(p.key in bad for p in i.plans)]
        if not items:
            raise InputError(f"{what}: no usable record (first: {next(iter(bad.values()))['reason']})")
        check_lengths(items, self.config.train.max_tokens)
        return items

    def _note(self, rows: list[dict[str, str]]) -> None:
        self.outcome.quarantined += [row for row in rows if row not in self.outcome.quarantined]
        self.ctx.skipped = len(self.outcome.quarantined)

    # -- the walk ------------------------------------------------------------------------------------------------

    def fill_reference(self) -> list[dict[str, Any]]:
        """The ``reference`` step: everything that can be computed before training."""
        stages = self.config.train.stages
        if self.sft_when == "before" and any(needs_reference(self.objective(i)) for i in range(len(stages))):
            log.info("reference: SFT comes first, and the model it makes is the reference; filled when it is there")
            return []
        bundle: Bundle | None = None
        rows = []
        for index, settings in enumerate(stages):
            if index and not self.continues(settings):
                break
            self.ctx.stopper.check()
            objective = self.objective(index)
            if needs_reference(objective):
                bundle = bundle or self.load(self.base)
                name = stage_name(index, settings.r)
                store = self.references.open(bundle, objective)
                counts = self.references.fill(bundle, store, name, self.chosen(index).referred)
                rows.append({"stage": name, **counts})
        return rows

    def run(self) -> Outcome:
        """All stages, SFT and the control; finished ones are skipped."""
        out, sft, base, outcome = self.ctx.out, self.config.train.sft, self.base, self.outcome
        if self.sft_when == "before":
            outcome.sft = self._sft("sft_first", base)
            base = self._merge(base, outcome.sft, out / "sft_merged")
        last, base = self._preference_stages(base)
        if last:
            base = self._merge(base, last, out / ("dpo_merged" if self.sft_when == "after" else "merged"))
        if self.sft_when == "after":
            outcome.sft = self._sft("sft", base)
            base = self._merge(base, outcome.sft, out / "merged")
        outcome.merged = base
        if sft.control and self.sft_when == "after":
            outcome.control = self._sft("control", self.base)
        elif sft.control and self.sft_when == "interleaved" and (steps := self._sft_steps()):
            outcome.control = self._sft("control", self.base, max_steps=steps)
        return outcome

    def _preference_stages(self, base: str) -> tuple[dict[str, Any] | None, str]:
        """Returns (result of the last stage, the base under its adapter)."""
        train, stages, full = self.config.train, self.config.train.stages, self.config.train.tune == "full"
        last: dict[str, Any] | None = None
        bundle: Bundle | None = None
        for index, settings in enumerate(stages):
            if last and not self.continues(settings):
                base = self._merge(base, last, self.ctx.out / last["name"] / "merged")
                last, bundle = None, None
            adapter = last["adapter"] if last else ""
            start = last["model"] if last and full else base
            stage = Stage(
                name=stage_name(index, settings.r),
                r=settings.r,
                objective=self.objective(index),
                learning_rate=settings.learning_rate or train.learning_rate,
                epochs=settings.epochs,
                batch_size=train.batch_size,
                lora=train.lora,
                base=start,
                base_digest=self.digest_of(start),
                reference_digest=self.digest_of(base) if full else "",
                dtype=self.config.model.dtype,
                start_adapter=adapter,
                start_digest=adapter_digest(adapter) if adapter else "",
                vision_lora=train.tune_vision,
                max_steps=self._most_steps(index),
            )
            chosen = self.chosen(index)
            looks, between = self._looks(stage, chosen), self._between()
            result = finished(stage, self.ctx, chosen.trained, looks, between)
            if result is None:
                # all weights train: the model is loaded anew, after the one that is the reference has gone
                bundle = None if full else self._with_adapter(stage, bundle)
                result = self._train(stage, bundle, base, chosen, looks, between)
            else:
                log.info("%s: done before, skipped", stage.name)
                bundle = None
                if "data" not in result:  # the process ended between the end of the training and this
                    self._complete(result, chosen, self.references.counts(stage.name), None)
            self.outcome.stages.append(result)
            last = result
            self._forget(index + 1)
        return last, base

    def _train(
        self,
        stage: Stage,
        bundle: Bundle | None,
        base: str,
        chosen: Chosen,
        looks: Looks | None,
        between: Interleaved | None,
    ) -> dict[str, Any]:
        """Fill what is missing of the reference, check it, train; the result as ``stage.json`` holds it.

        Args:
            bundle: what trains; None loads it, and for the reference the model in ``base``.
        """
        counts, store = NO_READS, None
        if needs_reference(stage.objective):
            referred = bundle or self.load(base)
            store = self.references.open(referred, stage.objective)
            counts = self.references.fill(referred, store, stage.name, chosen.referred, self._earlier())
            self.references.check(referred, store, stage.name, chosen.trained)
            del referred
        bundle = bundle or self._with_adapter(stage, None)
        result = run_stage(stage, self.ctx, bundle, chosen.trained, store, looks=looks, between=between)
        self._complete(result, chosen, counts, store)
        return result

    def _earlier(self) -> Iterator[tuple[ObjectiveConfig, Sequence[Item]]]:
        """Loss and records of the stages before the running one whose reference is the same, in order."""
        stages, first = self.config.train.stages, len(self.outcome.stages)
        while first and self.continues(stages[first]):
            first -= 1
        for index in range(first, len(self.outcome.stages)):
            if needs_reference(objective := self.objective(index)):
                yield objective, self.chosen(index).referred

    def _complete(
        self, result: dict[str, Any], chosen: Chosen, counts: dict[str, int], store: ReferenceStore | None
    ) -> None:
        """What ``stage.json`` says beside the training: the reference's use, and what the stage trained on."""
        reads = {"read_hits": store.hits if store else 0, "read_misses": store.misses if store else 0}
        result["reference"] = {**counts, **reads}
        result["data"] = chosen.audit()
        self._keep(result)

    def _most_steps(self, index: int) -> int:
        """Most preference steps of a stage, by itself and by the budget of all; 0 is no limit."""
        stages, adaptive = self.config.train.stages, self.config.train.adaptive
        spent = sum(s["steps"] - s.get("sft_steps", 0) for s in self.outcome.stages)
        limits = [stages[index].max_steps, budget_of(adaptive, len(stages) - index, spent)]
        return min((n for n in limits if n), default=0)

    def _looks(self, stage: Stage, chosen: Chosen) -> Looks | None:
        adaptive = self.config.train.adaptive
        if not adaptive.every:
            return None
        path = self.ctx.out / "decisions.jsonl" if self.ctx.ranks.is_main else None
        return Looks(stage.name, adaptive, chosen.held_out, self.config.seed, path)

    def _between(self) -> Interleaved | None:
        """The SFT batches that the stages before have left."""
        if self.sft_when != "interleaved":
            return None
        return Interleaved.of(self.config.train.sft, self.sft_trees(), self.config.seed, self._sft_steps())

    def _sft_steps(self) -> int:
        return sum(s.get("sft_steps", 0) for s in self.outcome.stages)

    def _forget(self, index: int) -> None:
        """Let go of the records that no stage from ``index`` on reads, its own or replayed."""
        stages = self.config.train.stages
        replaying = any(s.replay for s in stages[index:])
        wanted = {r for s in (stages if replaying else stages[index:]) for r in s.rs}
        for key in [k for k in self._items if len(k) > 1 and k[0] not in wanted]:
            del self._items[key]

    def _with_adapter(self, stage: Stage, bundle: Bundle | None) -> Bundle:
        """The model a stage trains: in ``base`` mode the adapter of the stage before goes on."""
        if bundle is not None:
            return bundle
        bundle = self.load(stage.base)
        if self.config.train.tune == "full":
            unfreeze(bundle, head=self.config.train.tune_head, vision=stage.vision_lora)
        elif stage.start_adapter:
            load_lora(bundle, Path(stage.start_adapter), trainable=True)
        else:
            attach_lora(bundle, stage.lora, seed=self.ctx.seed, vision=stage.vision_lora)
        return bundle

    def _merge(self, base: str, result: dict[str, Any], out: Path) -> str:
        """Fold a stage's adapter into its base; what rounding did to it stands in ``merge.json`` and in ``result``."""
        if model := result.get("model"):  # nothing to fold; the run's result stands where it always does
            if out == self.ctx.out / "merged":
                if self.ctx.ranks.is_main:
                    link_model(Path(model), out, {"model": self.digest_of(model)})
                self.ctx.ranks.barrier()
                model = str(out)
            return model
        adapter = result["adapter"]
        marker = {"base": self.digest_of(base), "adapter": adapter_digest(adapter)}
        note = out / "merge.json"
        done = note.is_file() and {k: read_json(note).get(k) for k in marker} == marker
        if not done and self.ctx.ranks.is_main:
            merge_lora(base, Path(adapter), out, device="cpu", note=marker)
        self.ctx.ranks.barrier()
        result["merge"] = {k: v for k, v in read_json(note).items() if k not in marker}
        if not done:
            e = result["merge"]
            told = "merged %s: rounding changes a weight by at most %.2e (%.2e of it), the adapter's update by %.1f %%"
            log.info(told, out, e["max_rounding_error"], e["max_relative_error"], 100 * e["update_error"])
        self._keep(result)
        return str(out)

    def _keep(self, result: dict[str, Any]) -> None:
        """Write ``stage.json`` again where the result has grown."""
        path = self.ctx.out / result["name"] / "stage.json"
        if self.ctx.ranks.is_main and read_json(path) != result:
            write_json(path, result)

    def _sft(self, name: str, base: str, *, max_steps: int = 0) -> dict[str, Any]:
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
            vision_lora=self.config.train.tune_vision if self.config.train.tune == "full" else sft.vision_lora,
            max_steps=max_steps or sft.max_steps,
        )
        items = self.sft_trees()
        result = finished(stage, self.ctx, items)
        if result is None:
            result = run_stage(stage, self.ctx, self._with_adapter(stage, None), items, None)
        return result


def _of_kinds(records: Sequence[PreferenceRecord], r: int, kinds: Sequence[str]) -> list[PreferenceRecord]:
    """The records with their pairs of these kinds, without those that have none. Raises InputError when none has."""
    out = []
    for record in records:
        kept = [x for x in record.rejected if x.kind in kinds]
        if kept:
            out.append(dataclasses.replace(record, rejected=kept))
    if not out:
        there = sorted({x.kind for record in records for x in record.rejected})
        raise InputError(
            f"train.stages: no pair of r = {r} is of kind {' or '.join(kinds)}; there are {', '.join(there)}"
        )
    return out
