"""Answers drawn several times: which questions are worth asking, and the samples that M-DPO compares.

Variance-aware selection (Temporal-RLT, arXiv 2506.01908): a question that the model always or never answers rightly
teaches a comparison of its answers nothing. The paper keeps the questions whose reward varies over repeated answers;
its code for this step is not released, and its threshold not known.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tempo_fast.config import MDPOPairsConfig, SelectConfig
from tempo_fast.errors import InputError
from tempo_fast.generation import Request
from tempo_fast.pairs.answers import prompt_of
from tempo_fast.pairs.asking import ask_by_video
from tempo_fast.pairs.method import Context, Item, Part, failure
from tempo_fast.pairs.metrics import metric_of
from tempo_fast.schema import QARecord


@dataclass
class Samples:
    """The samples of one question: ``texts`` and their ``points``, None where the metric cannot tell."""

    item: Item
    question: QARecord
    prompt: str
    texts: list[str]
    points: list[float | None]


def draw_samples(
    items: Sequence[Item], context: Context, how: MDPOPairsConfig | SelectConfig, key: str, failed: list[dict[str, str]]
) -> list[Samples]:
    """``how.samples`` answers to every question about the whole video, scored by ``how.metric``.

    Sample k of a question is request number k: it depends on nothing else that is asked. Videos that cannot be read are
    appended to ``failed``, and their questions left out.

    Args:
        key: the configuration's key of ``how``, for messages.
    """
    metric = metric_of(how.metric, f"{key}.metric", context.references)
    groups: list[list[Request]] = []
    readable: list[Item] = []
    for item in items:
        try:
            plan = context.reader.plan(item.video)
        except InputError as e:
            failed.append(failure(item.video, e))
            continue
        readable.append(item)
        groups.append(
            [
                Request((plan,), prompt_of(question), sample=k, temperature=how.temperature)
                for question in item.questions
                for k in range(how.samples)
            ]
        )
    told = ask_by_video(context.ask, [i.video for i in readable], groups, "samples", failed)
    out = []
    for item, texts in zip(readable, told, strict=True):
        if texts is None:
            continue
        for number, question in enumerate(item.questions):
            mine = [t.strip() for t in texts[number * how.samples : (number + 1) * how.samples]]
            points = [metric(text, question) for text in mine]
            out.append(Samples(item, question, prompt_of(question), mine, points))
    return out


def select(items: Sequence[Item], context: Context) -> tuple[list[Item], Part]:
    """The items with those of their questions whose reward varies (``pairs.select``); items without any are left out.

    A question is kept where the standard deviation of its samples' points (of the population; samples that the metric
    cannot tell left out) is above ``min_std``.

    Returns:
        (items, a Part without records): ``counts`` of questions by what became of them, select_kept, select_alike,
        select_unscored (fewer than two samples have points) and select_failed; ``failed`` videos.
    """
    how, part = context.config.select, Part()
    samples = draw_samples(items, context, how, "pairs.select", part.failed)
    kept: dict[str, list[QARecord]] = {}
    for s in samples:
        points = [p for p in s.points if p is not None]
        if len(points) < 2:
            verdict = "unscored"
        elif statistics.pstdev(points) > how.min_std:
            verdict = "kept"
            kept.setdefault(s.item.video, []).append(s.question)
        else:
            verdict = "alike"
        part.counts[f"select_{verdict}"] += 1
    part.counts["select_failed"] += sum(len(i.questions) for i in items) - len(samples)
    part.counts = +part.counts  # what never happened is not told
    return [replace(i, questions=tuple(kept[i.video])) for i in items if i.video in kept], part
