"""One row of the evaluation table: pairwise probe, questions and free captions of one model state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tempo_fast.config import EvalConfig
from tempo_fast.errors import InputError
from tempo_fast.evaluation.captions import score_caption
from tempo_fast.evaluation.probes import Twins, pairwise, questions, twins
from tempo_fast.evaluation.scoring import Score, score
from tempo_fast.generation import Engine, Request
from tempo_fast.models.load import Bundle
from tempo_fast.prompts import VIDEO_PROMPTS, draw_prompt
from tempo_fast.runtime.progress import progress
from tempo_fast.schema import Question, Truth
from tempo_fast.stats import bootstrap


def evaluate(
    bundle: Bundle,
    reader: Any,
    features: Any,
    config: EvalConfig,
    truths: Sequence[Truth],
    asked: Sequence[Question],
    engine: Engine | None,
    seed: int,
    desc: str = "",
) -> dict[str, Any]:
    """Evaluate a model on held-out videos. Draws depend on (seed, video) alone: all states are asked the same.

    Args:
        bundle: the model, adapters as they are.
        reader, features: VideoReader and FeatureCache.
        config: difficulties, bootstrap, and how many videos.
        truths: descriptions and events; may be empty.
        asked: multiple-choice questions; may be empty.
        engine: writes free captions; None, or ``config.captions`` false, leaves them out.
        desc: of the progress bar; empty shows none.

    Returns:
        {"pairwise", "pairwise_all", "pairwise_other" (probes.pairwise), "questions", "questions_mean"
        (probes.questions), "captions": {"events", "objects", "order_tau"}, "videos", "skipped": [{"video", "reason"}],
        "seconds"}; parts without data are absent. Every statistic is a stats.Stat over videos.

    Raises:
        InputError: no video can be read, or a question's ``answer`` is not one of its options.
    """
    began = time.perf_counter()
    videos = list(dict.fromkeys([*(t.video for t in truths), *(q.video for q in asked)]))
    videos = videos[: config.max_videos or None]
    by_video = {t.video: t for t in truths}
    plans: dict[str, Any] = {}
    skipped: list[dict[str, str]] = []
    twins_scored: list[tuple[Twins, Sequence[Score]]] = []
    options_scored: list[tuple[str, Question, Sequence[Score]]] = []
    bar = progress(len(videos), desc, "video") if desc else None
    for video in videos:
        mine = [q for q in asked if q.video == video]
        for q in mine:
            if not 0 <= q.answer < len(q.options):
                raise InputError(f"question {q.id}: field 'answer' is {q.answer} for {len(q.options)} options")
        try:
            plan = reader.plan(video)
            items: list[tuple[str, Sequence[str]]] = [(q.question, q.options) for q in mine]
            pair = twins(by_video[video], config.r, seed, plan.digest) if video in by_video else None
            if pair is not None and len(pair.answers) > 1:
                items.append((draw_prompt(VIDEO_PROMPTS, seed, plan.digest), pair.answers))
            scores = score(bundle, reader, features, [plan], items)
        except InputError as e:
            skipped.append({"video": video, "reason": str(e)})
        else:
            plans[video] = plan
            options_scored += [(video, q, s) for q, s in zip(mine, scores, strict=False)]
            if pair is not None and len(pair.answers) > 1:
                twins_scored.append((pair, scores[-1]))
        if bar is not None:
            bar.update(1)
    if bar is not None:
        bar.close()
    if not plans:
        first = f"; {skipped[0]['reason']}" if skipped else ""
        raise InputError(f"evaluation: none of {len(videos)} videos can be read{first}")

    row: dict[str, Any] = {}
    if truths:
        row |= pairwise(twins_scored, config.r, config.bootstrap, seed)
    if asked:
        row |= questions(options_scored, config.bootstrap, seed)
    if config.captions and engine is not None and truths:
        row["captions"] = _captions(engine, plans, by_video, config, seed)
    return {**row, "videos": len(plans), "skipped": skipped, "seconds": time.perf_counter() - began}


def _captions(
    engine: Engine, plans: dict[str, Any], truths: dict[str, Truth], config: EvalConfig, seed: int
) -> dict[str, Any]:
    told = [(truths[v], p) for v, p in plans.items() if v in truths]
    requests = [Request((p,), draw_prompt(VIDEO_PROMPTS, seed, p.digest)) for _, p in told]
    scores = [score_caption(text, t.events) for (t, _), text in zip(told, engine.generate(requests), strict=True)]
    ones = [1] * len(scores)
    return {
        "events": bootstrap([s.events for s in scores], ones, config.bootstrap, seed),
        "objects": bootstrap([s.objects for s in scores], ones, config.bootstrap, seed),
        "order_tau": bootstrap(
            [s.order_tau or 0.0 for s in scores], [s.order_tau is not None for s in scores], config.bootstrap, seed
        ),
    }
