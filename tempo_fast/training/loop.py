"""One training stage: steps, metrics, checkpoints, resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tempo_fast.config import LoaderConfig, LoraConfig, ObjectiveConfig, TrainConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.files import digest, read_json, read_jsonl, to_plain, write_json
from tempo_fast.models.load import Bundle
from tempo_fast.reference.ahead import ReadAhead, reading_ahead
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.engine import make_train_engine
from tempo_fast.runtime.progress import progress
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.runtime.seeds import generator
from tempo_fast.runtime.signals import Stopper
from tempo_fast.training.activations import set_recompute
from tempo_fast.training.adapters import save_lora, save_model, trainable_parameters
from tempo_fast.training.adaptive import Looks, held_out_margins
from tempo_fast.training.checkpoint import Checkpoints, refuse_other
from tempo_fast.training.data import (
    Item,
    branch_batch,
    check_lengths,
    micro_batches,
    plan_steps,
    upcoming_plans,
)
from tempo_fast.training.decodable import DecodeCheck
from tempo_fast.training.metrics import MetricsWriter, peak_memory_gib
from tempo_fast.training.module import Sums, TrainModule
from tempo_fast.training.sft import Interleaved
from tempo_fast.trees.batch import collate, collate_rows
from tempo_fast.trees.vision import FeatureCache, Pixels, evaluating, prepare_pixels
from tempo_fast.video.loader import Source, prefetching
from tempo_fast.video.reader import VideoReader
from tempo_kernels.objectives import make_objective

log = logging.getLogger("tempo_fast")


@dataclass
class Context:
    """What every stage of a run shares."""

    train: TrainConfig
    seed: int
    out: Path
    """The run's ``train`` folder."""
    reader: VideoReader
    features: FeatureCache
    ranks: Ranks
    stopper: Stopper
    checked: DecodeCheck
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    tensorboard: Path | None = None
    skipped: int = 0
    """Videos left out so far, for the metrics."""


@dataclass
class Stage:
    """What one stage trains, on what and from where."""

    name: str
    r: int | list[int]
    objective: ObjectiveConfig
    learning_rate: float
    epochs: int
    batch_size: int
    lora: LoraConfig
    base: str
    """Checkpoint directory under the adapter, or whose weights train."""
    base_digest: str
    dtype: str = "float32"
    start_adapter: str = ""
    """Adapter directory that this stage continues; empty for a fresh one."""
    start_digest: str = ""
    reference_digest: str = ""
    """Of the model that is the reference, where all weights train."""
    vision_lora: bool = False
    """Whether the vision tower trains, by adapters or itself."""
    max_steps: int = 0


def learning_rate(peak: float, step: int, total: int, warmup_ratio: float) -> float:
    """Linear warm-up over ceil(total * warmup_ratio) steps, then cosine to 0. ``step`` counts from 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def identity_of(
    stage: Stage, ctx: Context, items: list[Item], looks: Looks | None = None, between: Interleaved | None = None
) -> dict[str, Any]:
    """Everything that decides the stage's result; a checkpoint with another identity is refused."""
    t = ctx.train
    return {
        "stage": {k: v for k, v in to_plain(stage).items() if k not in ("base", "start_adapter")},
        "seed": ctx.seed,
        "optimizer": [t.weight_decay, t.adam_beta2, t.warmup_ratio, t.max_grad_norm],
        "max_tokens": t.max_tokens,
        "trees": t.trees,
        "attention": t.attention,
        **({"length_window": t.length_window} if t.length_window > 1 else {}),
        **({"batched_features": True} if ctx.features.batched else {}),
        **({"tune": [t.tune, t.tune_head]} if t.tune != "lora" else {}),
        **ctx.features.identity(),
        "data": digest([i.digest for i in items]),
        **({"adaptive": looks.identity} if looks else {}),
        **({"interleaved": between.identity} if between else {}),
    }


def finished(
    stage: Stage, ctx: Context, items: list[Item], looks: Looks | None = None, between: Interleaved | None = None
) -> dict[str, Any] | None:
    """The result of a stage that is already done, or None. Raises InputError when it was another configuration."""
    path = ctx.out / stage.name / "stage.json"
    if not path.is_file():
        return None
    done = read_json(path)
    refuse_other(path.parent, done["identity"], identity_of(stage, ctx, items, looks, between))
    return done


def run_stage(
    stage: Stage,
    ctx: Context,
    bundle: Bundle,
    items: list[Item],
    store: ReferenceStore | None,
    *,
    looks: Looks | None = None,
    between: Interleaved | None = None,
) -> dict[str, Any]:
    """Train ``bundle.model`` (adapter attached) for one stage; resumes from the newest checkpoint.

    Args:
        looks: end the stage by what held-out pairs say.
        between: SFT batches between the steps, with their own loss and learning rate on the same adapter; their
            metrics are called ``sft/...``.

    Returns:
        What ``stage.json`` holds: steps, pairs, first and last loss, margin and accuracy over the last quarter of the
        steps, seconds, where base and adapter are.

    Raises:
        InputError: a non-finite loss or gradient (the records are named), a record over the token budget, a
            checkpoint of another configuration.
        Interrupted: after a checkpoint was saved.
    """
    t, ranks, folder = ctx.train, ctx.ranks, ctx.out / stage.name
    check_lengths(items, t.max_tokens)
    identity = identity_of(stage, ctx, items, looks, between)
    try:
        objective = make_objective(stage.objective.name, **stage.objective.options)
    except ValueError as e:
        raise InputError(f"train.objective: {e}") from e
    lengths, pairs = [i.tree.n_tokens for i in items], [i.n_pairs for i in items]
    steps = plan_steps(
        pairs, stage.batch_size, ctx.seed, stage.name, stage.epochs, lengths=lengths, window=t.length_window
    )
    steps = steps[: stage.max_steps or None]
    all_pairs, own = sum(pairs), len(items)
    if looks:
        looks.last = len(steps)
        looks.restore([])
    if between:
        check_lengths(between.items, t.max_tokens)
        items, steps = [*items, *between.items], between.weave(steps, own)

    module = TrainModule(bundle.model, bundle.family, objective, t.attention)
    _set_mode(bundle, t, stage.vision_lora)
    engine = make_train_engine(module, trainable_parameters(module), t, ranks)
    done = tokens_seen = 0
    saves = _checkpoints(stage, ctx, identity, store, len(steps))
    if newest := saves.newest():
        done, state = newest
        engine.load_state_dict(state["engine"])
        tokens_seen = state["num_tokens"]
        if looks:
            looks.restore(state["looks"])
            steps = steps[:done] if looks.ended else steps
        log.info("%s: resuming after step %d of %d", stage.name, done, len(steps))
    saved, started = done, time.perf_counter()
    board = ctx.tensorboard / stage.name if ctx.tensorboard else None
    writer = MetricsWriter(folder, board, keep_steps=done) if ranks.is_main else None
    bar = progress(range(done, len(steps)), desc=stage.name, unit="step")
    reading = ExitStack()
    try:
        source = reading.enter_context(_reading(ctx, bundle, stage, items, steps[done:]))
        compared = [step for step in steps[done:] if step[0] < own]
        coming = ([items[i].tree for i in micro] for micro in _micros(ctx, items, compared))
        reference = reading.enter_context(reading_ahead(store, coming, device=bundle.device))
        for index in bar:
            ctx.stopper.check()
            saves.check()
            begin, decode_before = time.perf_counter(), ctx.features.decode_seconds
            sums, tokens, videos, hits = Sums(), 0, 0, [0, 0]
            seen = ctx.features.counts()
            imitates = steps[index][0] >= own
            total_pairs = sum(items[i].n_pairs for i in steps[index])
            micros, real = micro_batches(items, steps[index], t.max_tokens, ranks.rank, ranks.world)
            for number, micro in enumerate(micros):
                _seed_dropout(ctx.seed, stage.name, index, ranks.rank, number)
                loss, part, counts = _forward(
                    engine,
                    ctx,
                    bundle,
                    stage,
                    [items[i] for i in micro],
                    None if imitates else reference,
                    source,
                    imitate=imitates,
                )
                if not torch.isfinite(loss):
                    names = ", ".join(items[i].tree.id for i in micro)
                    raise InputError(
                        f"train.{stage.name}: the loss is {loss.item()} at step {index + 1} (records {names}); "
                        f"nothing was saved after step {saved}"
                    )
                # Engines average over ranks; a pair weighs 1 / (pairs of the whole step) wherever it ran.
                weight = ranks.world / total_pairs if number < real else 0.0
                engine.backward(loss * weight)
                if number < real:
                    sums.merge(part)
                    tokens, videos = tokens + counts[0], videos + counts[1]
                    hits = [hits[0] + counts[2], hits[1] + counts[3]]
            peak = between.learning_rate if between and imitates else stage.learning_rate
            lr = learning_rate(peak, index, len(steps), t.warmup_ratio)
            norm = float(engine.step(lr))
            if not math.isfinite(norm):
                names = ", ".join(items[i].tree.id for i in steps[index])
                raise InputError(
                    f"train.{stage.name}: the gradient norm is {norm} at step {index + 1} (records {names}); "
                    f"nothing was saved after step {saved}"
                )
            sums, tokens, videos = _over_ranks(sums, tokens, videos, ranks)
            tokens_seen += tokens
            seconds = time.perf_counter() - begin
            row = {
                "step": index + 1,
                "stage": stage.name,
                "stage_step": index + 1,
                "epoch": round(sum(items[i].n_pairs for s in steps[: index + 1] for i in s if i < own) / all_pairs, 4),
                "learning_rate": lr,
                "grad_norm": norm,
                "num_tokens": tokens_seen,
                **{f"sft/{k}" if imitates else k: v for k, v in sums.means().items()},
                "reference/hits": hits[0],
                "reference/misses": hits[1],
                **{f"vision/{k}": n - seen[k] for k, n in ctx.features.counts().items()},
                "perf/tokens_per_s": tokens / seconds,
                "perf/videos_per_s": videos / seconds,
                "perf/decode_wait_frac": min(1.0, (ctx.features.decode_seconds - decode_before) / seconds),
                "mem/peak_gib": peak_memory_gib(),
                "data/skipped": ctx.skipped,
                "time_s": time.perf_counter() - started,
            }
            if writer:
                writer.write(row)
            bar.set_postfix(
                loss=f"{sums.means()['loss']:.3f}", acc=f"{row.get('rewards/accuracies', float('nan')):.2f}"
            )
            preferred = sum(step[0] < own for step in steps[: index + 1])
            if looks and not imitates and looks.due(preferred):
                if looks.look(preferred, _score(engine, ctx, bundle, stage, looks.items, store)):
                    steps = steps[: index + 1]
                    break
            if (index + 1) % t.save_steps == 0 and index + 1 < len(steps):
                saves.save(index + 1, _state(engine, tokens_seen, looks))
                saved = index + 1
    except Interrupted as stop:
        # check() is the first thing in a step: exactly ``index`` steps are complete.
        if index > saved:
            saves.save(index, _state(engine, tokens_seen, looks))
        saves.wait()
        raise Interrupted(
            f"stopped in {stage.name} after step {index} of {len(steps)}; the same command resumes", stop.exit_code
        ) from stop
    finally:
        reading.close()
        bar.close()
        if writer:
            writer.close()
    if t.keep_stage_states:
        saves.save(len(steps), _state(engine, tokens_seen, looks))
    saves.wait()
    engine.sync_adapter()
    result: dict[str, Any] = {}
    if ranks.is_main:
        if t.tune == "full":
            save_model(bundle, folder / "model")
        else:
            save_lora(bundle.model, folder / "adapter", stage.base)
        result = _result(stage, folder, items[:own], steps, identity, time.perf_counter() - started)
        if looks:
            result["decisions"] = looks.rows
        if between:
            result["sft_steps"] = sum(step[0] >= own for step in steps)
        write_json(folder / "stage.json", result)
        saves.drop(keep=int(t.keep_stage_states))
    bundle.model.eval()
    return ranks.all_gather_object(result)[0]


def _checkpoints(
    stage: Stage, ctx: Context, identity: dict[str, Any], store: ReferenceStore | None, total: int
) -> Checkpoints:
    """The stage's checkpoints; one that was trained against another reference is refused as well."""
    t = ctx.train
    about = {
        "stage": stage.name,
        "total_steps": total,
        "schedule": {"warmup_ratio": t.warmup_ratio, "then": "cosine to 0", "peak": stage.learning_rate},
        "order": {"seed": ctx.seed, "of": "seed, stage and epoch"},
        "dropout": {"seed": ctx.seed, "of": "seed, stage, step, rank and micro-batch"},
    }
    reference = {"reference_store": digest(store.fields)} if store is not None else {}
    return Checkpoints(
        ctx.out / stage.name,
        {**identity, **reference},
        ctx.ranks,
        keep=t.keep_checkpoints,
        background=t.async_save,
        about=about,
    )


def _state(engine, tokens_seen: int, looks: Looks | None) -> dict[str, Any]:
    """What a checkpoint holds of this rank."""
    return {
        "engine": engine.state_dict(),
        "num_tokens": tokens_seen,
        **({"looks": [dict(row) for row in looks.rows]} if looks else {}),
    }


def _set_mode(bundle: Bundle, t: TrainConfig, vision_trains: bool) -> None:
    bundle.model.train()
    if not vision_trains:
        bundle.family.vision_tower(bundle.model).eval()
    set_recompute(bundle.model, t.gradient_checkpointing)


def _seed_dropout(seed: int, stage: str, step: int, rank: int, micro: int) -> None:
    """Dropout depends on where we are, not on how we came here: a resumed run draws the same masks."""
    torch.manual_seed(generator(seed, stage, step, rank, micro).initial_seed())


def _reading(
    ctx: Context, bundle: Bundle, stage: Stage, items: list[Item], steps: list[list[int]]
) -> AbstractContextManager[Source]:
    """The reader, ahead of the micro-batches of this rank; videos whose features are at hand are left out."""
    plans = upcoming_plans(items, _micros(ctx, items, steps))
    if stage.vision_lora:
        return prefetching(ctx.reader, plans, ctx.loader)
    cached = ctx.features.finder(bundle.family, bundle.model)
    return prefetching(ctx.reader, plans, ctx.loader, skip=lambda plan: cached(plan.key), once=True)


def _micros(ctx: Context, items: list[Item], steps: list[list[int]]) -> Iterator[list[int]]:
    """This rank's micro-batches of ``steps``, in order."""
    for step in steps:
        yield from micro_batches(items, step, ctx.train.max_tokens, ctx.ranks.rank, ctx.ranks.world)[0]


def _forward(
    engine,
    ctx: Context,
    bundle: Bundle,
    stage: Stage,
    items: list[Item],
    reference: ReadAhead | None,
    source: Source,
    **how: bool,
):
    """Loss sum, metric sums and (tokens, videos, reference hits, misses) of one micro-batch."""
    trees = [i.tree for i in items]
    packed = (collate if ctx.train.trees else collate_rows)(trees, bundle.device)
    batch, kinds = branch_batch(items, packed)
    plans = packed.plans
    inputs: dict[str, Any] = {}
    if stage.vision_lora and plans:
        begin = time.perf_counter()
        inputs = {"pixels": prepare_pixels(source, plans, bundle.device, bundle.dtype)}
        ctx.features.decode_seconds += time.perf_counter() - begin
    elif stage.vision_lora and ctx.ranks.world > 1:
        # where the tower trains, every rank calls it once per micro-batch, or the others wait for its gradients
        grid, shape = bundle.geometry.smallest()
        blank = torch.zeros(shape, device=bundle.device, dtype=bundle.dtype)
        inputs = {"pixels": Pixels(blank, [grid], [0]), "blank": True}
    elif plans:
        inputs = {"features": ctx.features.features(bundle.family, bundle.model, source, plans)}
    hits = 0
    if reference is not None:
        inputs["reference"] = reference.get(trees)
        hits = sum(len(tree.branches) for tree in trees)
    loss, sums = engine(packed, batch, kinds, **inputs, **how)
    return loss, sums, (packed.n_tokens, len(plans), hits, 0)


def _score(
    engine, ctx: Context, bundle: Bundle, stage: Stage, items: list[Item], store: ReferenceStore | None
) -> list[list[float]]:
    """Reward margins of the pairs of held-out items: the training's own forward in eval mode."""
    whole = [list(range(len(items)))]
    with ExitStack() as stack:
        source = stack.enter_context(_reading(ctx, bundle, stage, items, whole))
        coming = ([items[i].tree for i in micro] for micro in _micros(ctx, items, whole))
        reference = stack.enter_context(reading_ahead(store, coming, device=bundle.device))
        stack.enter_context(evaluating(engine.module))

        def score(some: list[Item]) -> torch.Tensor:
            return _forward(engine, ctx, bundle, stage, some, reference, source, score=True)[0]

        return held_out_margins(items, ctx.train.max_tokens, ctx.ranks, score)


def _over_ranks(sums: Sums, tokens: int, videos: int, ranks: Ranks) -> tuple[Sums, int, int]:
    if ranks.world == 1:
        return sums, tokens, videos
    gathered: list[Any] = ranks.all_gather_object((sums.values, tokens, videos))
    total = Sums()
    for values, _, _ in gathered:
        total.merge(Sums(values))
    return total, sum(g[1] for g in gathered), sum(g[2] for g in gathered)


def _result(
    stage: Stage, folder: Path, items: list[Item], steps: list[list[int]], identity: dict[str, Any], seconds: float
) -> dict[str, Any]:
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    tail = rows[-max(1, len(rows) // 4) :]

    def late(name: str) -> float | None:
        values = [r[name] for r in tail if name in r]
        return sum(values) / len(values) if values else None

    return {
        "name": stage.name,
        "r": stage.r,
        "steps": len(steps),
        "records": len(items),
        "pairs": sum(i.n_pairs for i in items),
        "loss_first": rows[0]["loss"],
        "loss_last": rows[-1]["loss"],
        "margin": late("rewards/margins"),
        "accuracy": late("rewards/accuracies"),
        "seconds": round(seconds, 3),
        "base": stage.base,
        "adapter": str(folder / "adapter") if (folder / "adapter").is_dir() else "",
        "model": str(folder / "model") if (folder / "model").is_dir() else "",
        "vision_lora": stage.vision_lora,
        "identity": identity,
    }
