"""The main job: curate -> pairs -> reference -> train -> eval -> report.

Each step is a function of the config and of files; it is skipped when the digest of its inputs is unchanged, and goes
on where it stopped. Everything is written below ``output_dir``; the layout is in the README.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tempo_fast.config import RunConfig
from tempo_fast.config.curriculum import needed_r
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.files import digest, file_digest, read_json, to_plain, write_json
from tempo_fast.jobs import check_questions, made_by, pair_inputs, pair_items, pairs_job
from tempo_fast.runs import SHARED, STEPS, Run, Unfinished, summarize
from tempo_fast.runtime.shards import this_shard
from tempo_fast.schema import (
    Clips,
    PreferenceRecord,
    Question,
    SFTRecord,
    Truth,
    iter_records,
    read_records,
    resolve_videos,
)

log = logging.getLogger("tempo_fast")


def curate(run: Run) -> dict[str, Any]:
    """Videos to clips: ``curate/clips.jsonl`` and the quarantine. Every process takes its share."""
    from tempo_fast.curate import CurateJob, list_videos

    config = run.config
    paths = list_videos(run.data.videos)
    stamps = [[str(p), *_stamp(p)] for p in paths]
    # processes and patience do not decide results, and so neither what is done again
    settings = dataclasses.replace(config.curate, workers=0, timeout_s=0.0)
    # a new process costs seconds, a short video less than one
    workers = config.curate.workers or max(1, min(os.cpu_count() or 1, len(paths) // 20))

    def work() -> dict[str, Any]:
        pool = None
        if config.ray.curate_workers:
            from tempo_fast.onray import curate_pool

            pool = curate_pool(config)
        job = CurateJob(
            paths, config.curate, run.out / "curate", workers=workers, backend=config.video.backend, pool=pool
        )
        with closing(job):
            job.run(this_shard())
            run.await_shards("curate", job.missing)
            found = job.merge()
        quarantined, filtered = found.quarantined, found.filtered
        if not found.n_usable:
            reasons = [*quarantined, *filtered]
            first = f" (first: {reasons[0]['video']}: {reasons[0]['reason']})" if reasons else ""
            raise InputError(f"data.videos: none of {len(paths)} videos is usable{first}")
        if found.n_unsettled:
            log.info(
                "curate: %d videos failed for another reason than their bytes; the next run tries them again, "
                "after a timeout if curate.timeout_s has grown", found.n_unsettled,
            )  # fmt: skip
        return {
            "videos": len(paths),
            "usable": found.n_usable,
            "quarantined": quarantined,
            "filtered": filtered,
            "clips": found.n_clips,
            "again": found.n_unsettled > 0,
        }

    outputs = [run.out / "curate" / "clips.jsonl"]
    inputs = [settings, config.video.backend, stamps]
    return run.step("curate", inputs, work, outputs=lambda: outputs, collective=True)


def pairs(run: Run) -> dict[str, Any]:
    """Videos to preference pairs: ``pairs/r<r>.jsonl`` and ``pairs/audit.json``. Every process makes its share."""
    config, folder = run.config, run.out / "pairs"
    files = [folder / f"r{r}.jsonl" for r in config.pairs.r]
    inputs = [
        config.pairs, config.generation, config.judge, config.video, config.seed, config.model.dtype, run.model_digest,
        *pair_inputs(run), _digest_of(run.data.prompts),
    ]  # fmt: skip

    def work() -> dict[str, Any]:
        from tempo_fast.report.pairs_page import build_pairs_page

        foreign = [f for f in files if f.is_file() and not _made_here(f)]
        if foreign:
            raise InputError(
                f"{foreign[0]}: was not made by this step and would be overwritten; "
                "train on it with 'tempo-fast train', or move it away"
            )
        parts = _on_ray(run) if config.ray.pairs_workers else _here(run)
        run.await_shards("pairs", lambda: [b.name for b in parts.missing()])
        audit = parts.merge()
        build_pairs_page(folder, config)
        return {
            "records": sum(audit["records"].values()),
            "pairs": sum(audit["pairs"].values()),
            "videos": audit["videos"],
            "coincide": audit["coincide"],
            "quarantined": audit["failed"],
            "again": any(f.get("again") for f in audit["failed"]),
        }

    return run.step("pairs", inputs, work, outputs=lambda: [*files, folder / "audit.json"], collective=True)


def _made_here(path: Path) -> bool:
    """Whether records were made by the pairs step (or there are none): others' are not to be overwritten."""
    try:
        first = next(iter(iter_records(path, PreferenceRecord)), None)
    except InputError:
        return False
    return first is None or "method" in first.provenance


def _here(run: Run) -> Any:
    job = pairs_job(run)
    job.run(this_shard())
    return job.parts


def _on_ray(run: Run) -> Any:
    from tempo_fast.onray import pairs_on_ray
    from tempo_fast.pairs.parts import Parts

    run.data  # noqa: B018 - what is generated is there before the workers look for it
    parts = Parts(pair_items(run), run.config.pairs, run.out / "pairs", settings="")
    sizes = {number: len(bucket.items) for number, bucket in enumerate(parts.buckets)}
    return dataclasses.replace(parts, settings=pairs_on_ray(run.config, sizes))


def _load_pairs(run: Run, r: int) -> list[PreferenceRecord]:
    path = made_by(run.out / "pairs" / f"r{r}.jsonl", "pairs")
    records = read_records(path, PreferenceRecord)
    if not records:
        raise InputError(f"{path}: holds no record; see pairs/audit.json for what was filtered")
    return records


def _pair_digests(run: Run) -> list[str]:
    needed = needed_r(run.config.train.stages)
    return [file_digest(made_by(run.out / "pairs" / f"r{r}.jsonl", "pairs")) for r in needed]


@contextmanager
def _curriculum(run: Run) -> Iterator[Any]:
    from tempo_fast.runtime.ranks import init_ranks
    from tempo_fast.runtime.signals import Stopper
    from tempo_fast.training.curriculum import Curriculum
    from tempo_fast.training.decodable import DecodeCheck
    from tempo_fast.training.loop import Context

    config = run.config
    run.forget()
    ranks = init_ranks(config)
    curated = run.out / "curate" / "clips.jsonl"
    known = [c.digest for c in read_records(curated, Clips)] if curated.is_file() else []
    with Stopper(ranks) as stopper:
        ctx = Context(
            train=config.train,
            seed=config.seed,
            out=run.out / "train",
            reader=run.reader,
            features=run.features,
            ranks=ranks,
            stopper=stopper,
            checked=DecodeCheck(
                run.out / "train" / "decoded.jsonl", run.reader, ranks, known, run.features.holds, config.loader
            ),
            loader=config.loader,
            tensorboard=run.out / "tensorboard",
        )
        yield Curriculum(config, ctx, lambda r: _load_pairs(run, r), _sft_data(run))
        run.stopped = stopper.code


def reference(run: Run) -> dict[str, Any]:
    """Fill the reference store with what can be known before training."""
    config = run.config
    t = config.train
    inputs = [config.reference, t.objective, t.stages, t.adaptive, t.sft.when, config.video, config.model,
              t.max_tokens, run.model_digest, _pair_digests(run)]  # fmt: skip

    def work() -> dict[str, Any]:
        with _curriculum(run) as curriculum:
            return {"fills": curriculum.fill_reference(), "quarantined": curriculum.outcome.quarantined}

    return run.step("reference", inputs, work, collective=True)


def train(run: Run) -> dict[str, Any]:
    """The curriculum, SFT and the control: ``train/<stage>/`` and ``train/merged``."""
    config = run.config
    sft_videos = [_stamp(Path(v)) for v in dict.fromkeys(r.video for r in _sft_data(run) or [] if r.video)]
    inputs = [config.train, config.reference, config.video, config.model, config.seed, run.model_digest,
              _pair_digests(run), _digest_of(run.data.sft), sft_videos, config.features.batched]  # fmt: skip
    results: list[dict[str, Any]] = []

    def work() -> dict[str, Any]:
        with _curriculum(run) as curriculum:
            outcome = curriculum.run()
            results.extend(r for r in (*outcome.stages, outcome.sft, outcome.control) if r)
            return to_plain(outcome)

    def outputs() -> list[Path]:
        adapters = [Path(r["adapter"]) / "adapter_model.safetensors" for r in results if r["adapter"]]
        return [*adapters, *(Path(r["model"]) / "config.json" for r in results if r["model"])]

    return run.step("train", inputs, work, outputs=outputs, collective=True)


def evaluate(run: Run) -> dict[str, Any]:
    """Temporal probes on held-out videos for base, stages, SFT and control: ``eval/eval.json``."""
    from tempo_fast.models.load import checkpoint_digest
    from tempo_fast.training.adapters import adapter_digest

    config, data = run.config, run.data
    trained = read_json(made_by(run.out / "state" / "train.json", "train"))["result"]
    truths, questions = _eval_data(run)
    models = _models(run, trained)
    trained_by = lambda base, a: [adapter_digest(a), base] if a else [checkpoint_digest(base)]  # noqa: E731
    identities = {
        name: [run.model_digest, *(trained_by(base, a) if name != "base" else [])] for name, base, a in models
    }
    seen = dict.fromkeys([t.video for t in truths] + [q.video for q in questions])
    videos = [_stamp(Path(v)) for v in seen]
    settings = [config.eval, config.video, config.generation, config.seed, config.model.dtype, videos,
                _digest_of(data.eval_truth), _digest_of(data.eval_questions)]  # fmt: skip

    def work() -> dict[str, Any]:
        rows = []
        for name, base, adapter in models:
            key, path = digest([settings, identities[name]]), run.out / "eval" / f"{name}.json"
            if not path.is_file() or read_json(path).get("inputs") != key:
                row = {"name": name, **_evaluate_one(run, base, adapter, truths, questions)}
                write_json(path, {"inputs": key, "row": row})
            rows.append(read_json(path)["row"])
        write_json(run.out / "eval" / "eval.json", {"rows": rows})
        skipped = [s for row in rows for s in row.get("skipped", [])]
        return {"rows": rows, "quarantined": skipped}

    return run.step("eval", [settings, identities], work, outputs=lambda: [run.out / "eval" / "eval.json"])


def _models(run: Run, trained: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(row name, directory, adapter directory or "") of every model that is evaluated."""
    stages = trained["stages"][-1:] if run.config.eval.stages == "ends" else trained["stages"]
    sft, control = ([row] if row else [] for row in (trained["sft"], trained["control"]))
    ordered = [*sft, *stages] if run.config.train.sft.when == "before" else [*stages, *sft, *control]
    return [("base", run.config.model.path, ""), *((s["name"], s["model"] or s["base"], s["adapter"]) for s in ordered)]


def _sft_data(run: Run) -> list[SFTRecord] | None:
    if not run.data.sft or not run.config.train.sft.epochs:
        return None
    records = read_records(run.data.sft, SFTRecord)
    resolve_videos(records, Path(run.data.sft).parent)
    return records


def _eval_data(run: Run) -> tuple[list[Truth], list[Question]]:
    data = run.data
    truths: list[Truth] = read_records(data.eval_truth, Truth) if data.eval_truth else []
    questions: list[Question] = read_records(data.eval_questions, Question) if data.eval_questions else []
    for path, rows in ((data.eval_truth, truths), (data.eval_questions, questions)):
        resolve_videos(rows, Path(path).parent)
    for q in questions:
        if not 0 <= q.answer < len(q.options):
            raise InputError(
                f"{data.eval_questions}: question {q.id}: answer {q.answer} is none of {len(q.options)} options"
            )
    return [t for t in truths if t.split != "train"], [q for q in questions if q.split != "train"]


def _evaluate_one(run: Run, base: str, adapter: str, truths: list[Truth], questions: list[Question]) -> dict[str, Any]:
    from tempo_fast.evaluation import evaluate as probe
    from tempo_fast.generation import make_engine
    from tempo_fast.training.adapters import adapter_on

    config, bundle = run.config, run.loaded(base)
    # captions are the model's own, whoever captioned the clips
    captions = dataclasses.replace(config.generation, engine="transformers", adapter="")
    with adapter_on(bundle, adapter):
        engine = make_engine(captions, bundle, run.reader, run.features, seed=config.seed)
        return probe(bundle, run.reader, run.features, config.eval, truths, questions, engine, seed=config.seed)


def report(run: Run) -> dict[str, Any]:
    """One HTML page: ``report.html``, from ``summary.json`` and the other files of the run."""
    from tempo_fast.report import build_report

    write_json(run.out / "summary.json", summarize(run))
    # the steps before decide what it shows, and when they took their time
    states = [run.out / "state" / f"{name}.json" for name in STEPS[:-1]]
    inputs = [run.config.report, [_digest_of(str(f)) if f.is_file() else "" for f in states]]
    work = lambda: {"path": str(build_report(run.out, run.config))}  # noqa: E731
    return run.step("report", inputs, work, outputs=lambda: [run.out / "report.html"])


# -- the whole -------------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "curate": curate,
    "pairs": pairs,
    "reference": reference,
    "train": train,
    "eval": evaluate,
    "report": report,
}


def preflight(run: Run, steps: list[str]) -> None:
    """Everything that can be known wrong before any work: model, data files, records, answers. Raises InputError."""
    run.light  # noqa: B018 - loads config and tokenizer
    run.model_digest  # noqa: B018
    if "train" in steps:
        _sft_data(run)
    if "eval" in steps:
        _eval_data(run)
    if "pairs" in steps and run.data.prompts:
        from tempo_fast.pairs.prompts import PromptPool

        PromptPool(run.data.prompts)
    if "pairs" in steps and run.config.pairs.method != "temple":
        check_questions(run)


def run_steps(config: RunConfig, steps: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Run some steps in order and return the summary.

    Raises:
        InputError: bad input, in one sentence.
        Interrupted: SIGINT (130) or SIGTERM (75); the same call resumes.
    """
    from tempo_fast.configio import save_config  # beside us: it knows the recipe's format, not the steps

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    alone = set(steps) - set(SHARED)
    if world > 1 and config.train.engine != "deepspeed" and alone:
        raise InputError(f"train.engine: torch runs one process and {world} were started; use deepspeed")
    run = Run(config, rank)
    with _terminable():
        try:
            preflight(run, list(steps))
            if rank == 0:
                save_config(config, run.out / "config.yaml")
            for name in steps:
                if name not in SHARED and this_shard().count > world:
                    log.info("%s: runs in one job, not in parts; start it without the array", name)
                    break
                if name in ("eval", "report") and rank > 0:
                    continue  # the first rank alone does these, and nothing comes after them
                if name == "curate" and config.pairs.method != "temple":
                    log.info("curate: pairs.method %s needs no clips, skipped", config.pairs.method)
                    continue
                if name == "eval" and not (run.data.eval_truth or run.data.eval_questions):
                    log.info("eval: no held-out data given, skipped")
                    continue
                _FUNCTIONS[name](run)
                if run.stopped:
                    raise Interrupted(f"stopped after the step '{name}'; the same command resumes", run.stopped)
        except Unfinished as e:
            log.info("%s", e)
        except KeyboardInterrupt as e:
            raise Interrupted("interrupted; the same command resumes", 130) from e
    summary = summarize(run)
    if rank == 0:
        write_json(run.out / "summary.json", summary)
    return summary


def run(config: RunConfig, until: str | None = None) -> dict[str, Any]:
    """All steps, or those up to and including ``until``."""
    last = len(STEPS) if until is None else STEPS.index(until) + 1
    return run_steps(config, STEPS[:last])


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM outside training (which saves a checkpoint first) ends the run at once, resumable, with exit code 75."""

    def stop(*_: Any) -> None:
        raise Interrupted("terminated; the same command resumes", 75)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stamp(path: Path) -> list[int]:
    """Size and time of a file; empty when it is not there (it will be quarantined by name)."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _digest_of(path: str) -> str:
    return file_digest(path) if path else ""
