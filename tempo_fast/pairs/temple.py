"""TEMPLE's pairs: captions of clips, perturbed, told as one description each.

The chosen answer tells the clips in order; each rejected answer tells them perturbed, and both are made by the same
procedure. Rules as coded by the TEMPLE authors (arXiv 2503.16929), with the switches ``perturb_on``, ``frames_answer``
and ``instruction`` of PairsConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation import Request
from tempo_fast.pairs.aggregate import aggregate
from tempo_fast.pairs.captions import Captioner
from tempo_fast.pairs.filters import reject_reason
from tempo_fast.pairs.judge import same_events
from tempo_fast.pairs.method import Context, Item, Part
from tempo_fast.pairs.spans import differing_spans, union
from tempo_fast.perturb import ClipOrder, perturb
from tempo_fast.schema import Clips, PreferenceRecord, Rejected


@dataclass
class _Draw:
    """One perturbation of one video, on its way to a pair of answers."""

    video: int
    kind: str
    r: int
    prompt: str
    order: ClipOrder | None
    chosen: str | None = None
    text: str | None = None


def make_temple(items: Sequence[Item], context: Context) -> Part:
    """One record per video and r (``instruction: per_video``) or per video, r and kind (``per_pair``); see
    method.Method."""
    config, part = context.config, Part()
    videos = [item.clips for item in items if item.clips is not None]
    captioner = Captioner(context.reader, config, context.ask, part.failed)

    whole = config.perturb_on == "frames" and config.frames_answer == "video"
    clean: Sequence[list[str] | None] = [[] for _ in videos]
    if not whole:
        clean = captioner.captions([(v, range(len(v.clips))) for v in videos], "captions")
    known = [i for i, c in enumerate(clean) if c is not None]
    draws = [
        draw
        for i in known
        for r in config.r
        for kind in config.kinds
        for draw in [_draw(i, videos[i], clean[i] or [], kind, r, context)]
    ]
    live = [d for d in draws if d.order is not None]
    if whole:
        _caption_whole(live, videos, captioner)
    else:
        told = aggregate(config.aggregate, [clean[i] or [] for i in known], context.ask, "chosen")
        chosen = dict(zip(known, told, strict=True))
        for draw in live:
            draw.chosen = chosen[draw.video]
        _tell_perturbed(live, videos, clean, captioner, context)

    by_video: dict[tuple[int, int], list[_Draw]] = {}
    for draw in draws:
        by_video.setdefault((draw.video, draw.r), []).append(draw)
    for (i, _), mine in by_video.items():
        for group in [mine] if config.instruction == "per_video" else [[d] for d in mine]:
            record = _record(videos[i], group, context, part)
            if record is not None:
                part.records.append(record)
    return part


def _draw(index: int, video: Clips, captions: list[str], kind: str, r: int, context: Context) -> _Draw:
    config, seed = context.config, context.seed
    # An order that leaves what is perturbed unchanged is no perturbation: captions, or scenes when clips are shown.
    labels: list[Any] = list(captions) if config.perturb_on == "captions" else [c.group for c in video.clips]
    own_seed = int(digest(["perturb", seed, video.digest])[:12], 16)
    key = [seed, video.digest] if config.instruction == "per_video" else [seed, video.digest, r, kind]
    order = perturb(kind, len(labels), r, own_seed, labels=labels)
    return _Draw(index, kind, r, context.prompts.draw(video.video, *key), order)


def _caption_whole(draws: Sequence[_Draw], videos: Sequence[Clips], captioner: Captioner) -> None:
    """Fill in both answers, each one caption of a whole video under the draw's instruction: its clips in order, and
    perturbed. The clean video goes the way of the perturbed one, so that nothing but the order tells them apart."""
    groups: list[list[Request] | None] = []
    for draw in draws:
        video, prompt = videos[draw.video], draw.prompt
        assert draw.order is not None  # only live draws come here
        try:
            clean: tuple[Sequence[int], Sequence[bool]] = range(len(video.clips)), ()
            plans = [
                captioner.reader.plan_clips(video.video, [_range(video, i) for i in order], blank)
                for order, blank in (clean, (draw.order.order, draw.order.blank))
            ]
            groups.append([Request((plan,), prompt) for plan in plans])
        except InputError as e:
            captioner.fail(video, e)
            groups.append(None)
    shown = [videos[d.video] for d in draws]
    for draw, texts in zip(draws, captioner.ask(shown, groups, "whole videos"), strict=True):
        if texts is None:
            continue
        draw.chosen, draw.text = (" ".join(t.split()) for t in texts)
        if not draw.chosen:
            captioner.fail(videos[draw.video], "the model gave no caption of the whole video")
    for draw in draws:
        if captioner.is_failed(videos[draw.video]):
            draw.chosen = draw.text = None


def _range(video: Clips, index: int) -> tuple[int, int]:
    return video.clips[index].start_frame, video.clips[index].end_frame


def _tell_perturbed(
    draws: Sequence[_Draw],
    videos: Sequence[Clips],
    clean: Sequence[list[str] | None],
    captioner: Captioner,
    context: Context,
) -> None:
    """Fill in the rejected answers: captions of the windows in perturbed order, or the clean ones perturbed, told."""
    orders = [d.order.order if d.order else () for d in draws]
    told: list[list[str] | None]
    if context.config.perturb_on == "frames":
        jobs = [(videos[d.video], order) for d, order in zip(draws, orders, strict=True)]
        told = captioner.captions(jobs, "perturbed clips")
    else:
        told = [[(clean[d.video] or [])[i] for i in order] for d, order in zip(draws, orders, strict=True)]
    usable = [(d, c) for d, c in zip(draws, told, strict=True) if c is not None]
    texts = aggregate(context.config.aggregate, [c for _, c in usable], context.ask, "rejected")
    for (draw, _), text in zip(usable, texts, strict=True):
        draw.text = text


def _record(video: Clips, draws: Sequence[_Draw], context: Context, part: Part) -> PreferenceRecord | None:
    config = context.config
    rejected: list[Rejected] = []
    chosen = ""
    for draw in draws:
        tally = part.tally(draw.r, draw.kind)
        if draw.order is None:
            tally.filtered["identity"] += 1
            continue
        if draw.text is None or draw.chosen is None:
            tally.filtered["video_failed"] += 1
            continue
        chosen = draw.chosen  # one instruction, hence one chosen answer, for all draws of a record
        reason = reject_reason(chosen, draw.text, draw.kind, config.max_length_ratio)
        if reason is None and any(draw.text == other.text for other in rejected):
            reason = "duplicate"
        if reason is None and same_events(chosen, draw.text):
            reason = "equal_to_chosen"  # in all but white space and the like
        if reason is not None:
            tally.filtered[reason] += 1
            continue
        order = draw.order
        of_chosen, of_rejected = differing_spans(chosen, draw.text)
        one = Rejected(
            draw.text, draw.kind, draw.r, list(order.order), order.broken, order.kept, of_rejected, of_chosen,
            list(order.blank),
        )  # fmt: skip
        rejected.append(one)
        tally.add(chosen, one)
    if not rejected:
        return None
    name = f"{Path(video.video).stem}-{digest([video.video, video.digest])[:8]}/r{draws[0].r}"
    return PreferenceRecord(
        id=name if config.instruction == "per_video" else f"{name}/{draws[0].kind}",
        video=video.video,
        prompt=draws[0].prompt,
        chosen=chosen,
        rejected=rejected,
        r=draws[0].r,
        spans=union(x.chosen_spans for x in rejected),
        provenance={**context.provenance, "video_digest": video.digest, "clips": len(video.clips)},
    )
