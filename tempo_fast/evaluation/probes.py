"""Does the model prefer the true description to its perturbed twin, and does it answer questions about time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo_fast.evaluation.scoring import Score
from tempo_fast.files import digest
from tempo_fast.perturb import KINDS, perturb
from tempo_fast.schema import Question, Truth
from tempo_fast.stats import Stat, bootstrap


@dataclass(frozen=True)
class Twins:
    """The answers compared for one video: ``answers[0]`` is true; ``index[kind, r]`` is the twin's place in them."""

    answers: list[str]
    index: dict[tuple[str, int], int]


def twins(truth: Truth, rs: Sequence[int], seed: int, key: str) -> Twins:
    """The events in order, and perturbed by every kind and r; equal texts once, twins that equal the truth left out.

    Args:
        truth: its events are the sentences; the true answer is all of them in order.
        seed, key: of the draws; ``key`` names the video.
    """
    true = " ".join(truth.events)
    answers, index = [true], {}
    own = int(digest(["twins", seed, key])[:12], 16)
    for kind in KINDS:
        for r in rs:
            order = perturb(kind, len(truth.events), r, own, labels=truth.events) if truth.events else None
            text = " ".join(order.apply(truth.events)) if order else true
            if text == true:
                continue
            if text not in answers:
                answers.append(text)
            index[kind, r] = answers.index(text)
    return Twins(answers, index)


def win(true: float, twin: float) -> float:
    """1 for the larger true score, 1/2 for a tie, 0 else."""
    return 0.5 if true == twin else float(true > twin)


def pairwise(scored: Sequence[tuple[Twins, Sequence[Score]]], rs: Sequence[int], resamples: int, seed: int) -> dict:
    """Share of twins that the true description beats.

    ``pairwise`` compares sums of log-probs for shuffle and reverse, whose twins have the same sentences; a dropped twin
    has fewer tokens, hence nearly always the larger sum, so it is compared by its mean per token. ``pairwise_other``
    holds the measure not used. ``pairwise_all`` is over all twins by the measures of ``pairwise``.

    Args:
        scored: per video its twins, and their scores in the order of ``answers``.

    Returns:
        {"pairwise": {kind: {str(r): Stat}}, "pairwise_all": Stat, "pairwise_other": like pairwise}.
    """

    def wins(kind: str, r: int, mean: bool) -> list[float | None]:
        out: list[float | None] = []
        for t, s in scored:
            twin = t.index.get((kind, r))
            if twin is None:
                out.append(None)
            else:
                out.append(win(s[0].mean, s[twin].mean) if mean else win(s[0].total, s[twin].total))
        return out

    def stat(values: list[float | None]) -> Stat:
        return bootstrap([v or 0.0 for v in values], [v is not None for v in values], resamples, seed)

    used = {(kind, r): wins(kind, r, kind == "drop") for kind in KINDS for r in rs}
    per_video = list(zip(*used.values(), strict=True))
    return {
        "pairwise": {kind: {str(r): stat(used[kind, r]) for r in rs} for kind in KINDS},
        "pairwise_all": bootstrap(
            [sum(v for v in row if v is not None) for row in per_video],
            [sum(v is not None for v in row) for row in per_video],
            resamples,
            seed,
        ),
        "pairwise_other": {kind: {str(r): stat(wins(kind, r, kind != "drop")) for r in rs} for kind in KINDS},
    }


def questions(
    scored: Sequence[tuple[str, Question, Sequence[Score]]], resamples: int, seed: int
) -> dict[str, dict[str, Stat]]:
    """Multiple choice by likelihood: the option of the largest log-prob is the answer, the first one of equals.

    Args:
        scored: (video, question, one Score per option).

    Returns:
        {"questions": {"all" or type: Stat} by the options' sums, "questions_mean": by their means per token}.
    """
    kinds = ["all", *sorted({q.type for _, q, _ in scored})]
    out: dict[str, dict[str, Stat]] = {}
    for name, mean in (("questions", False), ("questions_mean", True)):
        out[name] = {}
        for kind in kinds:
            hits: dict[str, float] = {}
            counts: dict[str, int] = {}
            for video, q, scores in scored:
                if kind in ("all", q.type):
                    values = [s.mean if mean else s.total for s in scores]
                    hits[video] = hits.get(video, 0.0) + (values.index(max(values)) == q.answer)
                    counts[video] = counts.get(video, 0) + 1
            out[name][kind] = bootstrap(list(hits.values()), list(counts.values()), resamples, seed)
    return out
