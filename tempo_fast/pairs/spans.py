"""Where chosen and rejected answers differ, sentence by sentence (the spans that RRPO rewards).

RRPO (arXiv 2504.12083) marks key phrases by a judge model for open answers; this is the rule-based way for descriptions
whose sentences are events: sentences that do not align, or that moved, are marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

# a sentence ends at its stop before white space, or at the end of a line or of the text; "3.5" does not end one
_SENTENCE = re.compile(r"\S(?:.*?[.!?][\"'”)\]]*(?=\s|$)|.*$)", re.MULTILINE)

Span = list[int]


def sentence_spans(text: str) -> list[Span]:
    """Character ranges [start, end) of the sentences of ``text``, white space between them left out."""
    out = []
    for match in _SENTENCE.finditer(text):
        start, end = match.span()
        end = start + len(text[start:end].rstrip())
        if end > start:
            out.append([start, end])
    return out


def differing_spans(chosen: str, rejected: str) -> tuple[list[Span], list[Span]]:
    """Ranges of the sentences of each text that are not part of a common run in order.

    difflib's matching blocks over whole sentences stay unmarked, so a moved sentence is marked in both texts, and one
    that is left out is marked in the chosen text only.

    Returns:
        (ranges of ``chosen``, ranges of ``rejected``), each in order, one range per sentence.
    """
    a, b = sentence_spans(chosen), sentence_spans(rejected)
    words_a, words_b = ([" ".join(t[s:e].split()) for s, e in spans] for t, spans in ((chosen, a), (rejected, b)))
    matcher = SequenceMatcher(None, words_a, words_b, autojunk=False)
    marked_a: list[Span] = []
    marked_b: list[Span] = []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag != "equal":
            marked_a += a[i1:i2]
            marked_b += b[j1:j2]
    return marked_a, marked_b


def union(groups: Iterable[Sequence[Span]]) -> list[Span]:
    """All distinct ranges of several lists, in order."""
    return [list(s) for s in sorted({(s[0], s[1]) for group in groups for s in group})]
