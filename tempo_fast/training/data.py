"""From records to response trees, and from trees to optimizer steps.

Branch 0 of a preference tree is the chosen answer, branches 1..k the rejected ones: k pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tempo_fast.errors import InputError
from tempo_fast.models.load import Bundle
from tempo_fast.runtime.progress import progress
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.runtime.seeds import generator
from tempo_fast.schema import PreferenceRecord, SFTRecord
from tempo_fast.training.item import Item
from tempo_fast.trees.layout import build_tree
from tempo_fast.trees.packing import check_budget, deal, pack
from tempo_fast.video.reader import FramePlan, VideoReader

log = logging.getLogger("tempo_fast")

_TOGETHER = 4096  # records that ranks exchange at a time


@dataclass
class Items:
    """The trees of a data set and the videos that could not be planned."""

    items: list[Item]
    quarantined: list[dict[str, str]] = field(default_factory=list)


def preference_items(
    bundle: Bundle,
    reader: VideoReader,
    records: Sequence[PreferenceRecord],
    *,
    spans_needed: bool = False,
    ranks: Ranks | None = None,
) -> Items:
    """One tree per record. Text and frame plans only: nothing is decoded.

    Args:
        spans_needed: leave out, and say so, rejected answers in which no key phrase is marked on either side: a loss
            over key phrases would count them as pairs and learn no preference from them.
        ranks: share the work; all of them call this with the same records and get the same items. None: this process
            does all of it.

    Raises:
        InputError: an empty answer (named by record), or no usable record at all.
    """
    rows: list[tuple] = []
    bare: list[str] = []
    for record in records:
        rejected = [x for x in record.rejected if not spans_needed or x.spans or record.spans_for(x)]
        bare += [record.id] * (len(record.rejected) - len(rejected))
        if rejected:
            rows.append(
                (
                    record.id,
                    record.video,
                    record.prompt,
                    [record.chosen, *(x.text for x in rejected)],
                    [[], *(x.spans for x in rejected)],
                    [record.spans_for(x) for x in rejected],
                    [x.kind for x in rejected],
                    record.r,
                )
            )
    if bare:
        told = "pairs: %d without a key phrase, which the objective needs, are left out (first: record %s)"
        log.warning(told, len(bare), bare[0])
    if not rows and bare:
        raise InputError(f"pairs: no key phrase is marked in any record (first: {bare[0]}), the objective needs them")
    items = _items(bundle, reader, rows, "pairs", ranks)
    lost = [i.id for i in items.items for _ in range(i.unaligned)] if spans_needed else []
    if lost:
        log.warning("pairs: %d key phrases cover no token of their answer (first: record %s)", len(lost), lost[0])
    return items


def sft_items(
    bundle: Bundle, reader: VideoReader, records: Sequence[SFTRecord], *, ranks: Ranks | None = None
) -> Items:
    """One single-branch tree per record; see :func:`preference_items`."""
    rows = [(r.id, r.video, r.prompt, [r.response], None, None, ["sft"], 0) for r in records]
    return _items(bundle, reader, rows, "sft", ranks)


def _items(bundle: Bundle, reader: VideoReader, rows: Sequence[tuple], what: str, ranks: Ranks | None) -> Items:
    """Every rank reads its share of the videos and tokenises what is said about them; then all have all."""
    ranks = ranks or Ranks()
    number: dict[str, int] = {}
    for row in rows:
        number.setdefault(row[1], len(number))
    plans: dict[str, list[FramePlan] | None] = {"": []}
    out = Items([])
    with progress(len(rows), desc=f"{what}: reading", unit="record") as bar:
        for start in range(0, len(rows), _TOGETHER):
            part = rows[start : start + _TOGETHER]
            mine = [i for i, row in enumerate(part) if number[row[1]] % ranks.world == ranks.rank]
            found: dict[int, Item] = {}
            bad: dict[int, dict[str, str]] = {}
            error = ""
            try:
                for i in mine:
                    item = _item(bundle, reader, part[i], plans, bad, i)
                    found.update({} if item is None else {i: item})
                    bar.update(ranks.world)
            except InputError as e:
                error = str(e)
            every = ranks.all_gather_object((found, bad, error))
            if failed := [e for _, _, e in every if e]:
                raise InputError(failed[0])
            for table, into in ((0, out.items), (1, out.quarantined)):
                joined = {i: value for gathered in every for i, value in gathered[table].items()}
                into.extend(joined[i] for i in sorted(joined))
    if not out.items:
        first = f" (first: {out.quarantined[0]['reason']})" if out.quarantined else ""
        raise InputError(f"{what}: no usable record{first}")
    return out


def _item(
    bundle: Bundle,
    reader: VideoReader,
    row: tuple,
    plans: dict[str, list[FramePlan] | None],
    bad: dict[int, dict[str, str]],
    at: int,
) -> Item | None:
    id_, video, prompt, answers, spans, pair_spans, kinds, r = row
    if video not in plans:
        try:
            plans[video] = [reader.plan(video)]
        except InputError as e:
            plans[video] = None
            bad[at] = {"video": video, "reason": str(e)}
    if (plan := plans[video]) is None:
        return None
    tree = build_tree(
        bundle.family,
        bundle.tokenizer,
        bundle.config,
        id=id_,
        prompt_text=prompt,
        answers=answers,
        spans=spans,
        pair_spans=pair_spans,
        plans=plan,
    )
    return Item(tree, kinds, r)


def plan_steps(
    n_pairs: Sequence[int],
    batch_size: int,
    seed: int,
    stage: str,
    epochs: int,
    *,
    lengths: Sequence[int] = (),
    window: int = 1,
) -> list[list[int]]:
    """Optimizer steps as lists of item indices: each epoch in its own order, filled until ``batch_size`` pairs.

    A tree is never split, so a step may hold a few pairs more; the last step of an epoch may hold fewer. The plan
    depends on its arguments alone, so that resuming is starting at a later index.

    Args:
        n_pairs: pairs of each item.
        batch_size: pairs of a step.
        seed, stage: of the order.
        epochs: passes over all items.
        lengths: tokens of each item, for ``window``.
        window: above 1, items of so many steps are sorted by length (every second window the other way, so that its
            ends meet those beside it), then dealt to steps; the steps of an epoch come in random order, a last one that
            is not full at the end.
    """
    steps: list[list[int]] = []
    for epoch in range(epochs):
        order = torch.randperm(len(n_pairs), generator=generator(seed, stage, "order", epoch)).tolist()
        cut = _fill_steps(order, n_pairs, batch_size)
        if window > 1:
            parts = [sum(cut[i : i + window], []) for i in range(0, len(cut), window)]
            parts = [sorted(part, key=lambda i: (-1) ** k * lengths[i]) for k, part in enumerate(parts)]
            cut = _fill_steps(sum(parts, []), n_pairs, batch_size)
            full = len(cut) - (sum(n_pairs[i] for i in cut[-1]) < batch_size) if cut else 0
            drawn = torch.randperm(full, generator=generator(seed, stage, "windows", epoch)).tolist()
            cut = [*(cut[i] for i in drawn), *cut[full:]]
        steps += cut
    return steps


def _fill_steps(order: Sequence[int], n_pairs: Sequence[int], batch_size: int) -> list[list[int]]:
    steps: list[list[int]] = []
    pairs = batch_size
    for index in order:
        if pairs >= batch_size:
            steps.append([])
            pairs = 0
        steps[-1].append(index)
        pairs += n_pairs[index]
    return steps


def micro_batches(
    items: Sequence[Item], step: Sequence[int], max_tokens: int, rank: int, world: int
) -> tuple[list[list[int]], int]:
    """This rank's share of a step, packed to the token budget, and how many of its micro-batches count.

    Ranks get about as many tokens (``deal``), which of them most changes from step to step; in a share each tree goes
    into the fullest row that takes it, longest first. Every rank gets the same number of micro-batches: one that would
    run out repeats its first (or the step's first tree) at the end, to be given weight 0.
    """
    lengths = {i: items[i].n_tokens for i in step}
    dealt = deal([lengths[i] for i in step], world)
    first = sum(step) % world
    shares = [[step[k] for k in share] for share in dealt[first:] + dealt[:first]]
    rows = [
        [[share[j] for j in row] for row in pack([lengths[i] for i in share], max_tokens, ids=_ids(items, share))]
        for share in shares
    ]
    mine = rows[rank]
    filler = mine[0] if mine else [step[0]]
    return mine + [filler] * (max(map(len, rows)) - len(mine)), len(mine)


def _ids(items: Sequence[Item], share: Sequence[int]) -> list[str]:
    return [items[i].id for i in share]


def upcoming_plans(items: Sequence[Item], micros: Iterable[Sequence[int]]) -> Iterator[Any]:
    """The videos of micro-batches in the order in which they are read: each distinct one once per micro-batch."""
    for micro in micros:
        yield from {plan.key: plan for i in micro for plan in items[i].plans}.values()


def check_lengths(items: Sequence[Item], max_tokens: int) -> None:
    """Raise InputError naming the first record longer than the budget, before anything is decoded."""
    check_budget([i.n_tokens for i in items], max_tokens, ids=_ids(items, range(len(items))))


def branch_batch(items: Sequence[Item], packed: Any) -> tuple[Any, list[str]]:
    """The pair structure of a packed batch (BranchBatch of tempo_kernels) and each pair's kind, in order.

    A tree without ``pair_spans`` takes the marks of its chosen branch for all its pairs.
    """
    from tempo_kernels.objectives import BranchBatch

    chosen: list[int] = []
    rejected: list[int] = []
    kinds: list[str] = []
    marks: list[tuple[int, int, int]] = []
    token = 0  # of the tree's first response token: branch 0 comes first
    for item, branches in zip(items, packed.tree_branches, strict=True):
        others = branches[1:] or branches[:1]
        tree = item.tree
        for pair, of_pair in enumerate(tree.pair_spans or [tree.branches[0].spans] * len(others), len(chosen)):
            marks.extend((pair, token + t, k) for t, k in enumerate(of_pair) if k)
        token += tree.n_responses
        chosen.extend([branches[0]] * len(others))
        rejected.extend(others)
        kinds.extend(item.kinds)
    device = packed.branch.device
    batch = BranchBatch(
        branch=packed.branch,
        n_branches=sum(len(b) for b in packed.tree_branches),
        chosen=torch.tensor(chosen, device=device),
        rejected=torch.tensor(rejected, device=device),
        spans=packed.spans,
        pair_spans=torch.tensor(marks, dtype=torch.int64, device=device).view(-1, 3),
    )
    return batch, kinds
