"""The work of steps that many processes share, as each of them sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import file_digest
from tempo_fast.runs import Run


def made_by(path: Path, step: str) -> Path:
    """``path``, or an InputError that names the step to run first."""
    if not path.is_file():
        raise InputError(f"{path}: not there yet; run the step '{step}' first")
    return path


def pair_source(run: Run) -> Path:
    """The file whose rows pairs are made from."""
    if run.config.pairs.method == "temple":
        return made_by(run.out / "curate" / "clips.jsonl", "curate")
    if not run.data.questions:
        raise InputError(f"data.questions: pairs.method {run.config.pairs.method} needs a file of questions")
    return Path(run.data.questions)


def pair_inputs(run: Run) -> list[Any]:
    """What the items of a run depend on: that file, and the videos it names where nothing has digested them yet."""
    source = pair_source(run)
    if run.config.pairs.method == "temple":
        return [file_digest(source)]
    from tempo_fast.pairs.items import question_items

    return [file_digest(source), [[item.digest, item.version] for item in question_items(source)]]


def pair_items(run: Run) -> list[Any]:
    """Videos (pairs.method.Item) in the order of their paths, with their clips or the questions about them."""
    from tempo_fast.pairs.items import clip_items, question_items

    return (clip_items if run.config.pairs.method == "temple" else question_items)(pair_source(run))


def pairs_job(run: Run) -> Any:
    """The pairs.run.PairsJob of a run, with its model loaded."""
    from tempo_fast.generation import make_engine, make_judge
    from tempo_fast.pairs.run import PairsJob

    config = run.config
    bundle = None
    if config.generation.engine != "openai":  # vLLM loads the weights itself
        bundle = run.light if config.generation.engine == "vllm" else run.loaded(config.model.path)
    engine = make_engine(config.generation, bundle, run.reader, run.features, seed=config.seed)
    judge = make_judge(config.judge, config.seed) if config.pairs.method == "rrpo" else None  # nobody else asks it
    folder, prompts = run.out / "pairs", run.data.prompts
    return PairsJob(pair_items(run), config.pairs, folder, engine, run.reader, judge, config.seed, prompts)


def check_questions(run: Run) -> None:
    """Read data.questions and look up the metrics that score their answers. Raises InputError."""
    from tempo_fast.pairs.items import read_questions
    from tempo_fast.pairs.metrics import metric_of

    p = run.config.pairs
    references = [q.answer for q in read_questions(pair_source(run))]
    if p.method in ("leanpo", "mdpo"):
        metric_of(getattr(p, p.method).metric, f"pairs.{p.method}.metric", references)
    if p.select.samples:
        metric_of(p.select.metric, "pairs.select.metric", references)
