"""What a response tree is: a prompt with its videos once, then k branches that each see the prompt and themselves.

Shapes: T prompt tokens, k branches. Positions of every branch start at ``prompt.next_position``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tempo_fast.errors import InputError
from tempo_fast.models.family import Family, Grid, Prompt, Timing


class Plan(Protocol):
    """What a tree needs to know of a video: which pixels (``key``), how many (``grid``), and when they are shown."""

    @property
    def key(self) -> str: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def timing(self) -> Timing: ...


@dataclass
class Branch:
    """One answer: its tokens with the end of the turn, and for each token 0 or the number (from 1) of its span."""

    input_ids: list[int]
    spans: list[int]

    @staticmethod
    def of(input_ids: Sequence[int], spans: Sequence[int] | None = None) -> Branch:
        return Branch(list(input_ids), list(spans) if spans is not None else [0] * len(input_ids))


@dataclass
class ResponseTree:
    """One record as the model sees it.

    ``plans`` are the videos of the prompt's visual slots in order. ``pair_spans`` holds, for each branch after the
    first, a mark per token of branch 0 (0, or the number of a span of this pair); empty when pairs have no spans of
    their own. ``unaligned`` lists (branch, span number from 1) of the spans that cover no token, those of
    ``pair_spans`` under branch 0.
    """

    id: str
    prompt: Prompt
    branches: list[Branch]
    plans: list[Any] = field(default_factory=list)
    unaligned: list[tuple[int, int]] = field(default_factory=list)
    pair_spans: list[list[int]] = field(default_factory=list)

    @property
    def n_tokens(self) -> int:
        """Tokens of the tree in a packed row: the prompt once and every branch."""
        return len(self.prompt.input_ids) + self.n_responses

    @property
    def n_responses(self) -> int:
        """Response tokens of all branches: the rows that reach the head."""
        return sum(len(b.input_ids) for b in self.branches)


def prompt_of(
    family: Family,
    tokenizer: Any,
    hf_config: Any,
    text: str,
    plans: Sequence[Plan],
    turns: Sequence[tuple[str, str]] = (),
) -> Prompt:
    """The family's prompt about the videos of ``plans``, after earlier (user, assistant) ``turns``."""
    grids = [Grid(*p.grid) for p in plans]
    return family.build_prompt(tokenizer, hf_config, text, grids, [p.timing for p in plans], turns)


def build_tree(
    family: Family,
    tokenizer: Any,
    hf_config: Any,
    *,
    id: str,
    prompt_text: str,
    answers: Sequence[str],
    spans: Sequence[Sequence[Sequence[int]]] | None = None,
    pair_spans: Sequence[Sequence[Sequence[int]]] | None = None,
    plans: Sequence[Any] = (),
) -> ResponseTree:
    """Tokenise one record.

    Args:
        family: the model family; it renders the chat and ends the answers.
        tokenizer: transformers tokenizer (a fast one where ``spans`` are given).
        hf_config: the model's transformers config.
        id: the record's id, for messages.
        prompt_text: the user's words; the videos come before them.
        answers: one text per branch.
        spans: per answer, character ranges [start, end) of its text; a token that touches a range belongs to it, the
            first range where it touches two.
        pair_spans: per answer after the first, the ranges of the first answer that belong to this pair.
        plans: the videos (``Plan``); empty for a text-only record.

    Raises:
        InputError: an answer is empty, there is no answer, or a span lies outside its answer; names the record.
    """
    if not answers:
        raise InputError(f"record {id}: field 'chosen' holds no answer")
    if spans is not None and len(spans) != len(answers):
        raise InputError(f"record {id}: field 'spans' has {len(spans)} lists for {len(answers)} answers")
    if pair_spans is not None and len(pair_spans) != len(answers) - 1:
        raise InputError(f"record {id}: {len(pair_spans)} lists of chosen spans, {len(answers) - 1} rejected answers")
    prompt = prompt_of(family, tokenizer, hf_config, prompt_text, plans)
    branches: list[Branch] = []
    unaligned: list[tuple[int, int]] = []

    def marks_of(i: int, ids: Sequence[int], ranges: Sequence[Sequence[int]]) -> list[int]:
        if not ranges:
            return [0] * len(ids)
        marks = align_spans(tokenizer, answers[i], ids, ranges, where=f"record {id}: answer {i}")
        unaligned.extend((i, n) for n in range(1, len(ranges) + 1) if n not in marks)
        return marks

    ending = len(family.answer_ids(tokenizer, ""))
    for i, answer in enumerate(answers):
        ids = family.answer_ids(tokenizer, answer)
        if not answer.strip() or len(ids) <= ending:
            raise InputError(f"record {id}: answer {i} is empty (a response of zero tokens)")
        branches.append(Branch(ids, marks_of(i, ids, spans[i] if spans is not None else ())))
    of_pairs = [marks_of(0, branches[0].input_ids, ranges) for ranges in pair_spans or ()]
    return ResponseTree(id, prompt, branches, list(plans), unaligned, of_pairs)


def align_spans(
    tokenizer: Any, text: str, ids: Sequence[int], spans: Sequence[Sequence[int]], *, where: str = "answer"
) -> list[int]:
    """Character ranges of ``text`` to a mark per token of ``ids`` (0 outside, k inside the k-th range).

    White space that a byte-level token carries in front of its word does not make it touch a range.

    Raises:
        InputError: a range is reversed or outside the text, or the tokenizer cannot give offsets.
    """
    for span in spans:
        if len(span) != 2 or not 0 <= span[0] <= span[1] <= len(text):
            raise InputError(f"{where}: span {list(span)} is not a range of its {len(text)} characters")
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("model.path: spans need a fast tokenizer (tokenizer.json); this one gives no offsets")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(encoded["input_ids"]) != list(ids[: len(encoded["input_ids"])]):
        raise InputError(f"{where}: the model family rewrites the text of answers, spans cannot be aligned")
    marks = [0] * len(ids)
    for t, (start, end) in enumerate(encoded["offset_mapping"]):
        while start < end and text[start].isspace():
            start += 1
        for n, (s, e) in enumerate(spans, 1):
            if max(start, s) < min(end, e):
                marks[t] = n
                break
    return marks
