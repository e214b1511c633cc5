"""M-DPO's pairs: samples of one model, the better against the worse by a metric (VidChain, arXiv 2501.06761).

As coded in mlvlab/VidChain, ``VideoLLaMA2/videollama2/calc/conv.py`` and ``scripts/build/*.sh``: three samples, every
two of which are a pair when their scores are at least 10 points of 100 apart (``pairs: all``). There the answers are
the turns of a dense captioning chain and the score is the F1 of SODA_c; here they are answers to any question, and the
metric is a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tempo_fast.pairs.answers import kind_of
from tempo_fast.pairs.judge import words
from tempo_fast.pairs.method import Context, Item, Part
from tempo_fast.pairs.select import Samples, draw_samples
from tempo_fast.pairs.spans import differing_words, union
from tempo_fast.schema import PreferenceRecord, Rejected

KIND = "sample"
"""Of every rejected answer."""


def make_mdpo(items: Sequence[Item], context: Context) -> Part:
    """One record per question whose best and worst samples are ``min_gap`` apart, or with ``pairs: all`` one per sample
    that others are so far below; see method.Method.

    Of equal points the first sample counts. A question without a pair is filtered as one of: video_failed, unscored
    (fewer than two samples have points), small_gap, no_difference (the same words). ``provenance["scores"]`` holds the
    points of the chosen and each rejected answer and of all samples, ``gap`` how far best and worst are apart.
    """
    how, r, part = context.config.mdpo, context.config.r[0], Part()
    samples = draw_samples(items, context, how, "pairs.mdpo", part.failed)
    tally = part.tally(r, KIND)
    tally.filtered["video_failed"] += sum(len(i.questions) for i in items) - len(samples)
    for s in samples:
        part.counts["questions"] += 1
        part.counts["samples_empty"] += sum(not words(text) for text in s.texts)
        part.counts["samples_unscored"] += sum(p is None for p in s.points)
        groups, reason = _choose(s, how.min_gap, all_pairs=how.pairs == "all")
        if reason:
            tally.filtered[reason] += 1
        part.records += _records(s, groups, context, part)
    tally.filtered, part.counts = +tally.filtered, +part.counts  # what never happened is not told
    return part


def _choose(s: Samples, min_gap: float, *, all_pairs: bool) -> tuple[list[tuple[int, list[int]]], str]:
    """(chosen sample, rejected ones, worst first) of every record; and why there is none."""
    points = {k: p for k, (text, p) in enumerate(zip(s.texts, s.points, strict=True)) if words(text) and p is not None}
    if len(points) < 2:
        return [], "unscored"
    best = sorted(points, key=lambda k: (-points[k], k))
    worst = sorted(points, key=lambda k: (points[k], k))
    groups, seen, apart = [], set[str](), False
    for chosen in best if all_pairs else best[:1]:
        if s.texts[chosen] in seen:
            continue
        seen.add(s.texts[chosen])
        below = [k for k in worst if points[k] < points[chosen] and points[chosen] - points[k] >= min_gap]
        apart = apart or bool(below)
        rejected: list[int] = []
        for k in below:
            different = any(differing_words(s.texts[chosen], s.texts[k]))
            if different and all(s.texts[k] != s.texts[other] for other in rejected):
                rejected.append(k)
        if rejected:
            groups.append((chosen, rejected if all_pairs else rejected[:1]))
    return groups, "" if groups else "no_difference" if apart else "small_gap"


def _records(
    s: Samples, groups: Sequence[tuple[int, list[int]]], context: Context, part: Part
) -> Iterable[PreferenceRecord]:
    how, r = context.config.mdpo, context.config.r[0]
    points = [None if p is None else round(p, 4) for p in s.points]
    known = [p for p in points if p is not None]
    for chosen, below in groups:
        rejected = []
        for k in below:
            of_chosen, of_rejected = differing_words(s.texts[chosen], s.texts[k])
            one = Rejected(s.texts[k], KIND, r, spans=of_rejected, chosen_spans=of_chosen)
            rejected.append(one)
            tally = part.tally(r, KIND)
            tally.add(s.texts[chosen], one)
            high, low = s.points[chosen], s.points[k]
            assert high is not None and low is not None  # only samples with points are paired
            tally.measure({"chosen_points": high, "rejected_points": low, "gap": high - low})
        yield PreferenceRecord(
            id=f"{s.question.id}/r{r}" + (f"/s{chosen}" if how.pairs == "all" else ""),
            video=s.item.video,
            prompt=s.prompt,
            chosen=s.texts[chosen],
            rejected=rejected,
            r=r,
            spans=union(x.chosen_spans for x in rejected),
            provenance={
                **context.provenance,
                "video_digest": s.item.digest,
                "question": s.question.id,
                "question_kind": kind_of(s.question),
                "reference": s.question.answer,
                "gap": round(max(known) - min(known), 4),
                "scores": {
                    "metric": how.metric,
                    "chosen": points[chosen],
                    "rejected": [points[k] for k in below],
                    "samples": points,
                },
            },
        )
