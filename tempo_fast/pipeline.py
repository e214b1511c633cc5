"""The main job: curate -> pairs -> reference -> train -> eval -> report.

Each step is a function of the config and of files; it is skipped when the digest of its inputs is unchanged, and goes
on where it stopped. Everything is written below ``output_dir``; the layout is in the README.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tempo_fast import __version__
from tempo_fast.config import RunConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.files import digest, file_digest, read_json, to_plain, write_json
from tempo_fast.schema import Clips, PreferenceRecord, Question, SFTRecord, Truth, read_records, resolve_videos

log = logging.getLogger("tempo_fast")

STEPS = ("curate", "pairs", "reference", "train", "eval", "report")


@dataclass
class Run:
    """A config with what its steps share: the model, the reader, the feature cache, each made when first needed."""

    config: RunConfig
    rank: int = 0
    skipped: list[str] = field(default_factory=list)
    _last: Any = None

    def __post_init__(self) -> None:
        self.config.validate()
        self.out = Path(self.config.output_dir)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"output_dir: {self.out} cannot be made ({e.strerror})") from e
        if not os.access(self.out, os.W_OK):
            raise InputError(f"output_dir: {self.out} is not writable")
        if self.config.model.threads:
            import torch

            torch.set_num_threads(self.config.model.threads)

    @cached_property
    def bundle(self) -> Any:
        """The base model, frozen."""
        from tempo_fast.models.load import load_bundle

        m = self.config.model
        return load_bundle(m.path, m.dtype, m.device)

    def loaded(self, path: str) -> Any:
        """A checkpoint, kept until another is asked for: models that share a base share its visual features."""
        from tempo_fast.models.load import load_bundle

        if self._last is None or self._last.path != path:
            self._last = None
            m = self.config.model
            self._last = load_bundle(path, m.dtype, m.device)
        return self._last

    @cached_property
    def base_digest(self) -> str:
        from tempo_fast.models.load import weights_digest

        return weights_digest(self.config.model.path)

    @cached_property
    def reader(self) -> Any:
        from tempo_fast.video.reader import VideoReader

        return VideoReader(self.config.video, self.bundle.geometry, str(self.bundle.device))

    @cached_property
    def features(self) -> Any:
        from tempo_fast.trees.vision import FeatureCache

        return FeatureCache()

    @cached_property
    def data(self) -> Any:
        """Paths of the data, with the generated world where it was asked for."""
        data = self.config.data
        if data.videos != "tinyworld":
            return data
        from tempo_fast.runtime.progress import progress
        from tempo_fast.tinyworld.generate import generate_world

        world, size = self.out / "world", data.tinyworld

        def work() -> dict[str, Any]:
            bar = lambda jobs: progress(jobs, desc="world", unit="video")  # noqa: E731
            made = generate_world(world, seed=size.seed, n_train=size.train, n_heldout=size.heldout, progress=bar)
            return {"digest": made["digest"]}

        self.step("world", size, work)
        return dataclasses.replace(
            data,
            videos=str(world / "videos" / "train_*.mp4"),
            sft=data.sft or str(world / "sft.jsonl"),
            eval_truth=data.eval_truth or str(world / "truth.jsonl"),
            eval_questions=data.eval_questions or str(world / "questions.jsonl"),
        )

    def step(
        self, name: str, inputs: Any, work: Callable[[], dict[str, Any]], *, collective: bool = False
    ) -> dict[str, Any]:
        """Run ``work`` unless it was done with the same inputs; its result is kept in ``state/<name>.json``.

        With several ranks all of them run a ``collective`` step; the first one runs the others while the rest wait for
        its result. (A file is waited for, not a process group: captions can take longer than any timeout.)
        """
        path = self.out / "state" / f"{name}.json"
        key = digest([__version__, name, inputs])
        state = read_json(path) if path.is_file() else {}
        if state.get("inputs") == key:
            if name not in self.skipped:
                log.info("%s: inputs unchanged, skipped", name)
                self.skipped.append(name)
            return state["result"]
        if self.rank > 0 and not collective:
            while state.get("inputs") != key:
                time.sleep(0.5)
                state = read_json(path) if path.is_file() else {}
            return state["result"]
        begin = time.perf_counter()
        result = work()
        if self.rank == 0:
            write_json(path, {"inputs": key, "seconds": time.perf_counter() - begin, "result": result})
        self.skipped.append(name)
        return result


# -- steps -----------------------------------------------------------------------------------------------------------


def curate(run: Run) -> dict[str, Any]:
    """Videos to clips: ``curate/clips.jsonl`` and the quarantine."""
    from tempo_fast.curate import curate_folder, list_videos

    config = run.config
    paths = list_videos(run.data.videos)
    stamps = [[str(p), *_stamp(p)] for p in paths]
    # processes do not decide results, and so neither what is done again
    settings = dataclasses.replace(config.curate, workers=0)
    # a new process costs seconds, a short video less than one
    workers = config.curate.workers or max(1, min(os.cpu_count() or 1, len(paths) // 20))

    def work() -> dict[str, Any]:
        found = curate_folder(paths, settings, run.out / "curate", workers=workers, backend=config.video.backend)
        if not found.clips:
            reasons = [*found.quarantined, *found.filtered]
            first = f" (first: {reasons[0]['video']}: {reasons[0]['reason']})" if reasons else ""
            raise InputError(f"data.videos: none of {len(paths)} videos is usable{first}")
        return {
            "videos": len(paths),
            "usable": len(found.clips),
            "quarantined": found.quarantined,
            "filtered": found.filtered,
            "clips": sum(len(c.clips) for c in found.clips),
        }

    return run.step("curate", [settings, config.video.backend, stamps], work)


def pairs(run: Run) -> dict[str, Any]:
    """Clips to preference pairs: ``pairs/r<r>.jsonl`` and ``pairs/audit.json``."""
    config, folder = run.config, run.out / "pairs"
    clips_path = _made_by(run.out / "curate" / "clips.jsonl", "curate")
    inputs = [
        config.pairs, config.generation, config.video, config.seed, run.base_digest, file_digest(clips_path),
        _digest_of(run.data.prompts),
    ]  # fmt: skip

    def work() -> dict[str, Any]:
        from tempo_fast.generation import make_engine
        from tempo_fast.pairs.build import make_pairs

        clips = sorted(read_records(clips_path, Clips), key=lambda c: c.video)
        engine = make_engine(config.generation, run.bundle, run.reader, run.features, seed=config.seed)
        _, audit = make_pairs(
            clips, engine, run.reader, config.pairs, folder, seed=config.seed, prompts=run.data.prompts
        )
        return {
            "records": sum(audit["records"].values()),
            "pairs": sum(audit["pairs"].values()),
            "coincide": audit["coincide"],
            "quarantined": audit["failed"],
        }

    return run.step("pairs", inputs, work)


def _load_pairs(run: Run, r: int) -> list[PreferenceRecord]:
    path = _made_by(run.out / "pairs" / f"r{r}.jsonl", "pairs")
    records = read_records(path, PreferenceRecord)
    if not records:
        raise InputError(f"{path}: holds no record; see pairs/audit.json for what was filtered")
    return records


def _pair_digests(run: Run) -> list[str]:
    stages = run.config.train.stages
    return [file_digest(_made_by(run.out / "pairs" / f"r{s.r}.jsonl", "pairs")) for s in stages]


@contextmanager
def _curriculum(run: Run) -> Iterator[Any]:
    from tempo_fast.runtime.ranks import init_ranks
    from tempo_fast.runtime.signals import Stopper
    from tempo_fast.training.curriculum import Curriculum
    from tempo_fast.training.loop import Context

    config = run.config
    sft: list[SFTRecord] | None = None
    if run.data.sft and config.train.sft.epochs:
        sft = read_records(run.data.sft, SFTRecord)
        resolve_videos(sft, Path(run.data.sft).parent)
    ranks = init_ranks(config)
    with Stopper() as stopper:
        ctx = Context(
            train=config.train,
            seed=config.seed,
            out=run.out / "train",
            reader=run.reader,
            features=run.features,
            ranks=ranks,
            stopper=stopper,
            tensorboard=run.out / "tensorboard",
        )
        yield Curriculum(config, ctx, lambda r: _load_pairs(run, r), sft)


def reference(run: Run) -> dict[str, Any]:
    """Fill the reference store with what can be known before training."""
    config = run.config
    inputs = [config.reference, config.train.objective, config.train.stages, config.video, config.model,
              config.train.max_tokens, run.base_digest, _pair_digests(run)]  # fmt: skip

    def work() -> dict[str, Any]:
        with _curriculum(run) as curriculum:
            return {"fills": curriculum.fill_reference(), "quarantined": curriculum.outcome.quarantined}

    return run.step("reference", inputs, work, collective=True)


def train(run: Run) -> dict[str, Any]:
    """The curriculum, SFT and the control: ``train/<stage>/`` and ``train/merged``."""
    config = run.config
    inputs = [config.train, config.reference, config.video, config.model, config.seed, run.base_digest,
              _pair_digests(run), _digest_of(run.data.sft)]  # fmt: skip

    def work() -> dict[str, Any]:
        with _curriculum(run) as curriculum:
            return to_plain(curriculum.run())

    return run.step("train", inputs, work, collective=True)


def evaluate(run: Run) -> dict[str, Any]:
    """Temporal probes on held-out videos for base, stages, SFT and control: ``eval/eval.json``."""
    config, data = run.config, run.data
    state = read_json(_made_by(run.out / "state" / "train.json", "train"))["result"]
    models = _models(run, state)
    identities = {name: [run.base_digest, *([] if not a else [_adapter_digest(a), base])] for name, base, a in models}
    settings = [config.eval, config.video, config.generation, config.seed, config.model.dtype,
                _digest_of(data.eval_truth), _digest_of(data.eval_questions)]  # fmt: skip

    def work() -> dict[str, Any]:
        truths, questions = _eval_data(run)
        if not truths and not questions:
            raise InputError("data.eval_truth, data.eval_questions: both are empty; nothing to evaluate")
        rows = []
        for name, base, adapter in models:
            key, path = digest([settings, identities[name]]), run.out / "eval" / f"{name}.json"
            if path.is_file() and read_json(path).get("inputs") == key:
                rows.append(read_json(path)["row"])
                continue
            row = {"name": name, **_evaluate_one(run, base, adapter, truths, questions)}
            write_json(path, {"inputs": key, "row": row})
            rows.append(row)
        write_json(run.out / "eval" / "eval.json", {"rows": rows})
        return {"rows": rows}

    return run.step("eval", [settings, identities], work)


def _models(run: Run, trained: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(row name, base directory, adapter directory or "") of every model that is evaluated."""
    stages = trained["stages"]
    if run.config.eval.stages == "ends":
        stages = stages[-1:]
    from tempo_fast.models.load import resolve_path

    rows = [("base", str(resolve_path(run.config.model.path)), "")]
    rows += [(s["name"], s["base"], s["adapter"]) for s in stages]
    rows += [(s["name"], s["base"], s["adapter"]) for s in (trained["sft"], trained["control"]) if s]
    return rows


def _adapter_digest(adapter: str) -> str:
    return file_digest(Path(adapter) / "adapter_model.safetensors")


def _eval_data(run: Run) -> tuple[list[Truth], list[Question]]:
    data, config = run.data, run.config
    truths: list[Truth] = read_records(data.eval_truth, Truth) if data.eval_truth else []
    questions: list[Question] = read_records(data.eval_questions, Question) if data.eval_questions else []
    for path, rows in ((data.eval_truth, truths), (data.eval_questions, questions)):
        resolve_videos(rows, Path(path).parent)
    truths, questions = [t for t in truths if t.split != "train"], [q for q in questions if q.split != "train"]
    videos = list(dict.fromkeys([t.video for t in truths] + [q.video for q in questions]))
    if config.eval.max_videos:
        kept = set(videos[: config.eval.max_videos])
        truths, questions = [t for t in truths if t.video in kept], [q for q in questions if q.video in kept]
    return truths, questions


def _evaluate_one(run: Run, base: str, adapter: str, truths: list[Truth], questions: list[Question]) -> dict[str, Any]:
    from tempo_fast.evaluation import evaluate as probe
    from tempo_fast.generation import make_engine
    from tempo_fast.training.adapters import adapter_on

    config, bundle = run.config, run.loaded(base)
    with adapter_on(bundle, adapter):
        engine = make_engine(config.generation, bundle, run.reader, run.features, seed=config.seed)
        return probe(bundle, run.reader, run.features, config.eval, truths, questions, engine, seed=config.seed)


def report(run: Run) -> dict[str, Any]:
    """One HTML page: ``report.html``. Needs ``summary.json``, which is written first."""
    from tempo_fast.report import build_report

    files = [run.out / "summary.json", run.out / "pairs" / "audit.json", run.out / "eval" / "eval.json"]
    inputs = [run.config.report, [_digest_of(str(f)) if f.is_file() else "" for f in files]]
    return run.step("report", inputs, lambda: {"path": str(build_report(run.out, run.config))})


# -- the whole -------------------------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "curate": curate,
    "pairs": pairs,
    "reference": reference,
    "train": train,
    "eval": evaluate,
    "report": report,
}


def run_steps(config: RunConfig, steps: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """Run some steps in order and return the summary.

    Raises:
        InputError: bad input, in one sentence.
        Interrupted: SIGINT (130) or SIGTERM (75); the same call resumes.
    """
    from tempo_fast.configio import save_config  # beside us: it knows the recipe's format, not the steps

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and config.train.engine != "deepspeed":
        raise InputError(f"train.engine: torch runs one process and {world} were started; use deepspeed")
    run = Run(config, rank)
    if rank == 0:
        save_config(config, run.out / "config.yaml")
    with _terminable():
        try:
            for name in steps:
                if name == "eval" and not (run.data.eval_truth or run.data.eval_questions):
                    log.info("eval: no held-out data given, skipped")
                    continue
                if name == "report" and rank == 0:
                    write_json(run.out / "summary.json", summarize(run))
                _FUNCTIONS[name](run)
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


def summarize(run: Run) -> dict[str, Any]:
    """What ``summary.json`` holds, from the steps done so far."""
    states: dict[str, Any] = {}
    for name in ("world", *STEPS):
        path = run.out / "state" / f"{name}.json"
        if path.is_file():
            states[name] = read_json(path)
    results = {name: state["result"] for name, state in states.items()}
    curated, built, trained = (results.get(n, {}) for n in ("curate", "pairs", "train"))
    timings = {name: round(state["seconds"], 3) for name, state in states.items()}
    timings["total"] = round(sum(timings.values()), 3)
    hidden = ("identity",)
    clean: Callable[[dict[str, Any] | None], dict[str, Any] | None] = lambda row: (  # noqa: E731
        row and {k: v for k, v in row.items() if k not in hidden}
    )
    quarantined = [q for r in results.values() for q in r.get("quarantined", [])]
    return {
        "version": __version__,
        "config_digest": digest(run.config),
        "model": {"path": run.config.model.path, "weights": run.base_digest, "dtype": run.config.model.dtype},
        "counts": {
            "videos": curated.get("videos", 0),
            "usable": curated.get("usable", 0),
            "filtered": len(curated.get("filtered", [])),
            "quarantined": len(quarantined),
            "records": built.get("records", 0),
            "pairs": built.get("pairs", 0),
        },
        "stages": [clean(s) for s in trained.get("stages", [])],
        "sft": clean(trained.get("sft")),
        "control": clean(trained.get("control")),
        "merged": trained.get("merged", ""),
        "eval": results.get("eval", {}).get("rows", []),
        "timings_s": timings,
        "quarantined": quarantined,
        "filtered": curated.get("filtered", []),
    }


def _stamp(path: Path) -> list[int]:
    """Size and time of a file; empty when it is not there (it will be quarantined by name)."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def _made_by(path: Path, step: str) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: not there yet; run the step '{step}' first")
    return path


def _digest_of(path: str) -> str:
    return file_digest(path) if path else ""
