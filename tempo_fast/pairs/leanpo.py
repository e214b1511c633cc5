"""LeanPO's pairs (arXiv 2506.05260): an answer that was told the truth and reflected upon it, against one from hardly
anything seen.

As coded in the author's experiments (Wang-Xiaodong1899/LLaVA-NeXT, ``self_generate_preference_debate.py`` and
``self_generate_preference_sample_aug_only.py`` in ``scripts/process``), in words of our own:

- chosen: the sampled frames, the reference answer as a hint, the question; then a request of its own, with the same
  frames, that quotes the first answer and the reference and asks to do better. Temperature 1, top_p .9.
- rejected: the question alone, about one or two of the sampled frames (the first; the first and the last), cropped and
  otherwise augmented (video.augment). Temperature 1, top_p 1.

Two differences: there the hint stands before the video and here after it, and the author keeps every answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation import Request
from tempo_fast.pairs.answers import kind_of, prompt_of
from tempo_fast.pairs.asking import ask_by_video
from tempo_fast.pairs.judge import words
from tempo_fast.pairs.method import Context, Item, Part, failure
from tempo_fast.pairs.metrics import metric_of
from tempo_fast.pairs.spans import differing_words
from tempo_fast.schema import PreferenceRecord, QARecord, Rejected

KIND = "sparse"
"""Of every rejected answer."""

HINT_PROMPT = """Some help with the question below:
{reference}

Use this help and what you see in the video. Do not speak of the help.

{question}"""

REFLECT_PROMPT = """You were asked about this video before and said:
{previous}

That can be said better. What is true of the video:
{reference}

Think over what your reply got wrong or left out, bring it in line with what is true, and say more where there is more \
to say. Give the new reply alone, as if it were the first. Once more the question:

{question}"""

# an answer that speaks of what it was told instead of the video
_BY = r"\b(?:according to|based on|in line with|as per|per|following|considering|from|using)"
_TOLD = r"(?:hints?|help|references?|notes?|answers?|information|descriptions?|details|text|context)"
_GIVEN = r"(?:given|provided|supplied|shared)"
_QUOTES = re.compile(
    rf"{_BY} (?:(?:the|your|this|these|those|any) )?(?:{_GIVEN}|reference) {_TOLD}\b"
    rf"|{_BY} (?:the|your|this|these|those) {_TOLD} (?:that )?(?:(?:was|were|is|are|has been|you|you have) )*{_GIVEN}\b"
    rf"|\b(?:the|your|these|{_GIVEN}) hints?\b|\breference answers?\b|\b{_GIVEN} references?\b"
    r"|\b(?:my|your|the) (?:previous|earlier|prior|former|original) (?:reply|response|answer)\b"
    r"|\b(?:new|improved|revised|updated) (?:reply|response|answer)\b",
    re.IGNORECASE,
)
_RUN = 6  # so many words in a row of an instruction are no coincidence


@dataclass
class _Asked:
    """A question on its way to a pair."""

    question: QARecord
    prompt: str
    first: str = ""
    chosen: str = ""
    rejected: str = ""


@dataclass
class _Seen:
    """A video: the plan of the chosen answers, that of the rejected ones, the questions about it."""

    item: Item
    whole: Any
    sparse: Any
    asked: list[_Asked]


def make_leanpo(items: Sequence[Item], context: Context) -> Part:
    """One record per question, with one rejected answer; see method.Method.

    The prompt of a record is the question alone. Filter reasons: video_failed, empty, quotes_hint (the chosen answer
    speaks of what it was told), no_difference (the same words). ``provenance``: ``scores`` of both answers by
    ``leanpo.metric``, None where it cannot tell; the ``first`` answer where there is a second; ``frames`` shown and
    ``augment``. ``counts``: questions, chosen_is_reference (the same words), unchanged_by_reflection.
    """
    part = Part()
    seen = [s for item in items for s in _plans(item, context, part)]
    seen = _first_answers(seen, context, part)
    if context.config.leanpo.reflection:
        seen = _reflect(seen, context, part)
    metric = metric_of(context.config.leanpo.metric, "pairs.leanpo.metric", context.references)
    for s in seen:
        for a in s.asked:
            record = _record(s, a, metric, context, part)
            if record is not None:
                part.records.append(record)
    return part


def _plans(item: Item, context: Context, part: Part) -> list[_Seen]:
    """What is shown of a video; nothing where it cannot be read. Its questions share the few frames and what is done to
    them, so that both are encoded once."""
    own = context.config.leanpo
    part.counts["questions"] += len(item.questions)
    number = int(digest(["leanpo frames", context.seed, item.digest])[:12], 16)
    seed = int(digest(["leanpo augment", context.seed, item.digest])[:12], 16) if own.augment else None
    try:
        whole = context.reader.plan(item.video)
        sparse = context.reader.plan_sparse(item.video, own.frames[number % len(own.frames)], seed)
    except InputError as e:
        part.failed.append(failure(item.video, e))
        _filter(part, context, "video_failed", len(item.questions))
        return []
    return [_Seen(item, whole, sparse, [_Asked(q, prompt_of(q)) for q in item.questions])]


def _filter(part: Part, context: Context, reason: str, n: int = 1) -> None:
    part.tally(context.config.r[0], KIND).filtered[reason] += n


def _first_answers(seen: Sequence[_Seen], context: Context, part: Part) -> list[_Seen]:
    own = context.config.leanpo
    groups = []
    for s in seen:
        group = []
        for a in s.asked:
            told = HINT_PROMPT.format(reference=a.question.answer.strip(), question=a.prompt) if own.hints else a.prompt
            group.append(Request((s.whole,), told, temperature=own.temperature, top_p=own.top_p))
            group.append(Request((s.sparse,), a.prompt, temperature=own.temperature, top_p=own.rejected_top_p))
        groups.append(group)
    return _ask(seen, groups, ("first", "rejected"), "first answers", context, part)


def _reflect(seen: Sequence[_Seen], context: Context, part: Part) -> list[_Seen]:
    own = context.config.leanpo
    groups = []
    for s in seen:
        told = [
            REFLECT_PROMPT.format(previous=a.first, reference=a.question.answer.strip(), question=a.prompt)
            for a in s.asked
        ]
        groups.append([Request((s.whole,), t, temperature=own.temperature, top_p=own.top_p) for t in told])
    return _ask(seen, groups, ("chosen",), "second answers", context, part)


def _ask(
    seen: Sequence[_Seen], groups: Sequence[Sequence[Request]], fields: Sequence[str], desc: str,
    context: Context, part: Part,
) -> list[_Seen]:  # fmt: skip
    """Fill in ``fields`` of every question, as many requests each; videos that cannot be read are left out."""
    left = []
    told = ask_by_video(context.ask, [s.item.video for s in seen], groups, desc, part.failed)
    for s, texts in zip(seen, told, strict=True):
        if texts is None:
            _filter(part, context, "video_failed", len(s.asked))
            continue
        replies = iter(texts)
        for a in s.asked:
            for name in fields:
                setattr(a, name, next(replies).strip())
        left.append(s)
    return left


def quotes_hint(answer: str, question: QARecord) -> bool:
    """Whether an answer speaks of what it was told: of hints, of an earlier reply, or in the instruction's own words.
    What question and reference say themselves does not count."""
    own = f"{question.question}\n{question.answer}".lower()
    if any(match.group().lower() not in own for match in _QUOTES.finditer(answer)):
        return True
    told = _runs(answer) - _runs(own)
    return any(told & _runs(part) for part in _INSTRUCTIONS)


def _runs(text: str) -> set[tuple[str, ...]]:
    all_words = words(text)
    return {tuple(all_words[i : i + _RUN]) for i in range(len(all_words) - _RUN + 1)}


_INSTRUCTIONS = [part for prompt in (HINT_PROMPT, REFLECT_PROMPT) for part in re.split(r"\{\w+\}", prompt)]


def _record(s: _Seen, a: _Asked, metric: Any, context: Context, part: Part) -> PreferenceRecord | None:
    own, r = context.config.leanpo, context.config.r[0]
    chosen = a.chosen if own.reflection else a.first
    of_chosen, of_rejected = differing_words(chosen, a.rejected)
    reason = ""
    if not words(chosen) or not words(a.rejected):
        reason = "empty"
    elif (own.hints or own.reflection) and quotes_hint(chosen, a.question):
        reason = "quotes_hint"
    elif not (of_chosen or of_rejected):
        reason = "no_difference"
    if reason:
        _filter(part, context, reason)
        return None
    part.counts["chosen_is_reference"] += words(chosen) == words(a.question.answer)
    part.counts["unchanged_by_reflection"] += own.reflection and words(chosen) == words(a.first)
    shown = len(s.sparse.indices)
    kept = shown / len(s.whole.indices)
    one = Rejected(a.rejected, KIND, r, kept=kept, spans=of_rejected, chosen_spans=of_chosen)
    tally = part.tally(r, KIND)
    tally.add(chosen, one)
    points = [None if p is None else round(p, 4) for p in (metric(t, a.question) for t in (chosen, a.rejected))]
    for name, value in zip(("chosen_points", "rejected_points"), points, strict=True):
        if value is not None:
            tally.measure({name: value})
    augmentation = s.sparse.augment
    return PreferenceRecord(
        id=f"{a.question.id}/r{r}",
        video=s.item.video,
        prompt=a.prompt,
        chosen=chosen,
        rejected=[one],
        r=r,
        spans=of_chosen,
        provenance={
            **context.provenance,
            "video_digest": s.item.digest,
            "question": a.question.id,
            "question_kind": kind_of(a.question),
            "reference": a.question.answer,
            "scores": {"metric": own.metric, "chosen": points[0], "rejected": points[1:]},
            **({"first": a.first} if own.reflection else {}),
            "frames": {"chosen": len(s.whole.indices), "rejected": list(s.sparse.indices)},
            "augment": None if augmentation is None else augmentation._asdict(),
        },
    )
