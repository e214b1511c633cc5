"""RRPO's pairs: a model asked about perturbed video, its wrong answers against right ones (arXiv 2504.12083, §2).

The question is the same, the sampled frames are shown perturbed: some black, shuffled locally or globally. What comes
out wrong is rejected. The chosen answer is the reference, or the model's own about the clean video where that is right.
The authors' code for this step is not released; what a perturbation shows at a given r is tempo_fast.perturb's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation import Request
from tempo_fast.pairs.answers import is_correct, judge_prompt, kind_of, prompt_of, read_verdict, reference_choice
from tempo_fast.pairs.asking import ask_by_video
from tempo_fast.pairs.choices import plain
from tempo_fast.pairs.method import Context, Item, Part, failure
from tempo_fast.pairs.phrases import Phrases, by_judge, by_rules, by_words
from tempo_fast.pairs.spans import union
from tempo_fast.perturb import ClipOrder, perturb
from tempo_fast.schema import PreferenceRecord, QARecord, Rejected


@dataclass
class _Try:
    """One answer about perturbed frames; ``reason`` says why it is no rejected answer (empty: it is one)."""

    r: int
    kind: str
    order: ClipOrder | None
    text: str = ""
    reason: str = ""
    phrases: Phrases | None = None


@dataclass
class _Asked:
    """A question on its way to its records."""

    item: Item
    qa: QARecord
    frames: int
    prompt: str
    requests: list[Request]
    tries: list[_Try]
    clean: str = ""
    chosen: str = ""
    right: dict[str, bool | None] = field(default_factory=dict)


def make_rrpo(items: Sequence[Item], context: Context) -> Part:
    """One record per question and r, with one rejected answer per kind; see method.Method.

    ``counts`` are questions by kind, answers by verdict, and spans by how they were found. Filter reasons beside those
    of filters.reject_reason: no_reference, chosen_not_right, right, undecided, no_difference, spans_unaligned.

    Raises:
        InputError: ``pairs.rrpo.rejected: rewritten`` without a judge; the engine's own trouble.
    """
    own, part = context.config.rrpo, Part()
    if own.rejected == "rewritten" and context.judge is None:
        raise InputError("config: pairs.rrpo.rejected: rewritten needs a judge model, set judge.endpoint")
    asked = [a for item in items for a in _questions(item, context, part)]
    asked = _answer(asked, context, part)
    _judge(asked, context, part)
    for a in asked:
        _choose(a, context, part)
    _mark(asked, context, part)
    for a in asked:
        part.records += _records(a, context, part)
    return part


def _questions(item: Item, context: Context, part: Part) -> Iterable[_Asked]:
    """What is asked about one video. All questions about it see the same perturbed frames: encoded once for all."""
    config = context.config
    wanted = [(r, kind) for r in config.r for kind in config.kinds]
    usable = []
    for qa in item.questions:
        part.counts[f"questions_{kind_of(qa)}"] += 1
        if kind_of(qa) == "mcq" and reference_choice(qa) is None:
            part.problems.append({"record": qa.id, "what": f"field 'answer' names no option: {qa.answer[:80]!r}"})
            _filter(part, wanted, "no_reference")
        else:
            usable.append(qa)
    seed = int(digest(["perturb", context.seed, item.digest])[:12], 16)
    try:
        plan = context.reader.plan(item.video)
        n = len(plan.indices)
        # frames sampled twice (a short video) are equal: an order that swaps them is no perturbation
        orders = [perturb(kind, n, r, seed, labels=plan.indices) for r, kind in wanted]
        shown = [None if o is None else context.reader.plan_frames(item.video, o.order, o.blank) for o in orders]
    except InputError as e:
        part.failed.append(failure(item.video, e))
        for _ in usable:
            _filter(part, wanted, "video_failed")
        return
    for qa in usable:
        prompt = prompt_of(qa)
        requests = [Request((plan,), prompt)] if config.rrpo.chosen == "model" else []
        requests += [Request((p,), prompt) for p in shown if p is not None]
        tries = [
            _Try(r, kind, order, reason="" if order else "identity")
            for (r, kind), order in zip(wanted, orders, strict=True)
        ]
        yield _Asked(item, qa, n, prompt, requests, tries)


def _filter(part: Part, wanted: Iterable[tuple[int, str]], reason: str) -> None:
    for r, kind in wanted:
        part.tally(r, kind).filtered[reason] += 1


def _answer(asked: Sequence[_Asked], context: Context, part: Part) -> list[_Asked]:
    """Fill in what the model says; questions about videos that cannot be read are left out."""
    videos = list(dict.fromkeys(a.item.video for a in asked))
    groups = {video: [a for a in asked if a.item.video == video] for video in videos}
    requests = [[r for a in groups[video] for r in a.requests] for video in videos]
    left = []
    told = ask_by_video(context.ask, videos, requests, "perturbed videos", part.failed)
    for video, texts in zip(videos, told, strict=True):
        replies: Any = None if texts is None else iter(t.strip() for t in texts)
        for a in groups[video]:
            if replies is None:
                _filter(part, [(t.r, t.kind) for t in a.tries], "video_failed")
                continue
            if context.config.rrpo.chosen == "model":
                a.clean = next(replies)
            for t in a.tries:
                if t.order is not None:
                    t.text = next(replies)
            left.append(a)
    return left


def _judge(asked: Sequence[_Asked], context: Context, part: Part) -> None:
    """Fill in which answers are right: by rules, and what these leave open by the judge."""
    open_: list[tuple[_Asked, str]] = []
    for a in asked:
        for text in dict.fromkeys([a.clean, *(t.text for t in a.tries)]):
            if not text:
                continue
            a.right[text] = is_correct(a.qa, text)
            if a.right[text] is None and context.judge is not None:
                open_.append((a, text))
    if context.judge is None or not open_:
        return
    requests = [Request((), judge_prompt(a.qa, text), temperature=0.0) for a, text in open_]
    for (a, text), reply in zip(open_, context.judge(requests, "judge"), strict=True):
        part.counts["judged"] += 1
        try:
            a.right[text] = read_verdict(reply)
        except ValueError as e:
            part.counts["judge_unreadable"] += 1
            part.problems.append({"record": a.qa.id, "what": f"verdict of the judge: {e}"})


def _choose(a: _Asked, context: Context, part: Part) -> None:
    """Fill in the chosen answer, and which tries are rejected answers."""
    a.chosen = a.qa.answer.strip()
    if context.config.rrpo.chosen == "model":
        a.chosen = a.clean if a.clean and a.right[a.clean] else ""
        part.counts[f"clean_{_verdict(a.right.get(a.clean))}"] += 1
    for t in a.tries:
        if t.order is None:
            continue
        if t.text:
            part.counts[f"perturbed_{_verdict(a.right[t.text])}"] += 1
        if not t.text:
            t.reason = "empty"
        elif not a.chosen:
            t.reason = "chosen_not_right"
        elif a.right[t.text] is not False:
            t.reason = _verdict(a.right[t.text])
        elif _same(t.text, a.chosen):
            t.reason = "equal_to_chosen"


def _verdict(right: bool | None) -> str:
    return {True: "right", False: "wrong", None: "undecided"}[right]


def _same(first: str, second: str) -> bool:
    return first.split() == second.split() or plain(first) == plain(second) != ()


def _mark(asked: Sequence[_Asked], context: Context, part: Part) -> None:
    """Fill in the key phrases of each pair; equal answers of a record count once."""
    open_: list[tuple[_Asked, _Try]] = []
    for a in asked:
        for r in context.config.r:
            kept: list[_Try] = []
            for t in (t for t in a.tries if t.r == r and not t.reason):
                if any(_same(t.text, other.text) for other in kept):
                    t.reason = "duplicate"
                    continue
                kept.append(t)
                t.phrases = by_rules(a.qa, a.chosen, t.text)
                if t.phrases is None and context.judge is not None and kind_of(a.qa) == "open":
                    open_.append((a, t))
                elif t.phrases is None:
                    t.phrases = by_words(a.chosen, t.text)
    if not open_ or context.judge is None:
        return
    rewrite = context.config.rrpo.rejected == "rewritten"
    pairs = [(a.qa, a.chosen, t.text) for a, t in open_]
    for (a, t), phrases in zip(open_, by_judge(pairs, context.judge, rewrite=rewrite), strict=True):
        t.phrases = phrases
        part.problems += [{"record": f"{a.qa.id}/r{t.r}", "what": f"{t.kind}: {p}"} for p in phrases.problems]


def _records(a: _Asked, context: Context, part: Part) -> Iterable[PreferenceRecord]:
    for r in context.config.r:
        rejected: list[Rejected] = []
        own: dict[str, str] = {}
        how: dict[str, str] = {}
        for t in (t for t in a.tries if t.r == r):
            found, tally = t.phrases, part.tally(r, t.kind)
            reason = t.reason or (found.reason if found is not None else "")
            if found is not None and not reason and any(_same(found.rejected, x.text) for x in rejected):
                reason = "duplicate"  # written again, they can become equal
            if reason or found is None or t.order is None:
                tally.filtered[reason] += 1
                continue
            order = t.order
            one = Rejected(
                found.rejected, t.kind, r, list(order.order), order.broken, order.kept, found.spans,
                found.chosen_spans, list(order.blank),
            )  # fmt: skip
            rejected.append(one)
            tally.add(a.chosen, one)
            how[t.kind] = found.how
            part.counts[f"spans_by_{found.how}"] += 1
            if found.rejected != t.text:
                own[t.kind] = t.text
        if rejected:
            yield PreferenceRecord(
                id=f"{a.qa.id}/r{r}",
                video=a.item.video,
                prompt=a.prompt,
                chosen=a.chosen,
                rejected=rejected,
                r=r,
                spans=union(x.chosen_spans for x in rejected),
                provenance={
                    **context.provenance,
                    "video_digest": a.item.digest,
                    "question": a.qa.id,
                    "question_kind": kind_of(a.qa),
                    "frames": a.frames,
                    "chosen": context.config.rrpo.chosen,
                    "spans": how,
                    **({"own_words": own} if own else {}),
                },
            )
