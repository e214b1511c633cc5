"""Where chosen and rejected answers differ: sentences, or words; as character ranges that keep tokens whole.

RRPO (arXiv 2504.12083) marks key phrases by a judge model for open answers. ``differing_spans`` is the rule-based way
for descriptions whose sentences are events: sentences that do not align, or that moved, are marked. ``differing_words``
is finer: of sentences that correspond, the words that differ. ``token_safe`` widens ranges given by anyone else.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

# a sentence ends at its stop before white space, or at the end of a line or of the text; "3.5" does not end one
_SENTENCE = re.compile(r"\S(?:.*?[.!?][\"'”)\]]*(?=\s|$)|.*$)", re.MULTILINE)

# one of these alone between two changes does not part them
_SMALL_WORDS = frozenset(
    "a an the of to in on at by for from with and or as is are was were be it its this that then there".split()
)

Span = list[int]


class Word(NamedTuple):
    """A word, case-folded, and its range [start, end) in the text it is from."""

    text: str
    start: int
    end: int


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


def differing_words(chosen: str, rejected: str) -> tuple[list[Span], list[Span]]:
    """Ranges of the words of each text that the other does not have there; case and punctuation do not count.

    Sentences that one text has more are marked whole. Where sentences stand for one another, their words are aligned
    (difflib) and those that do not match are marked, words in a row as one range inside a sentence. A small word alone
    between two changes is marked with them. What is left unmarked is the same sequence of words in both texts.

    Returns:
        (ranges of ``chosen``, ranges of ``rejected``), each in order and token-safe.
    """
    if [w.text for w in words_of(chosen)] == [w.text for w in words_of(rejected)]:
        return [], []  # cut into other sentences, perhaps
    sides = [[words_of(t, s, e) for s, e in sentence_spans(t)] for t in (chosen, rejected)]
    keys = [[" ".join(w.text for w in words) for words in side] for side in sides]
    marked: tuple[list[Span], list[Span]] = [], []
    for tag, i1, i2, j1, j2 in SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        blocks = [sides[0][i1:i2], sides[1][j1:j2]]
        for out, block, changed in zip(marked, blocks, _changed(*blocks), strict=True):
            out += _runs(block, changed)
    return token_safe(chosen, marked[0]), token_safe(rejected, marked[1])


def _changed(a: Sequence[Sequence[Word]], b: Sequence[Sequence[Word]]) -> tuple[list[bool], list[bool]]:
    """Of each word of both blocks, in order: whether it has no partner in the other block."""
    x, y = ([w.text for words in block for w in words] for block in (a, b))
    ops = SequenceMatcher(None, x, y, autojunk=False).get_opcodes()
    out = [True] * len(x), [True] * len(y)
    for k, (tag, i1, i2, j1, j2) in enumerate(ops):
        lone = i2 - i1 == 1 and 0 < k < len(ops) - 1 and x[i1] in _SMALL_WORDS
        if tag == "equal" and not lone:
            out[0][i1:i2] = out[1][j1:j2] = [False] * (i2 - i1)
    return out


def _runs(block: Sequence[Sequence[Word]], changed: Sequence[bool]) -> list[Span]:
    out: list[Span] = []
    at = 0
    for words in block:
        last = False
        for word in words:
            if changed[at]:
                if last:
                    out[-1][1] = word.end
                else:
                    out.append([word.start, word.end])
            last = changed[at]
            at += 1
    return out


def union(groups: Iterable[Sequence[Span]]) -> list[Span]:
    """All distinct ranges of several lists, in order."""
    return [list(s) for s in sorted({(s[0], s[1]) for group in groups for s in group})]


def words_of(text: str, start: int = 0, end: int | None = None) -> list[Word]:
    """The words of text[start:end]: letters and digits with what holds them together ("don't", "3.5"), single
    characters of scripts that put no space between words, and symbols such as emoji; punctuation is no word."""
    end = len(text) if end is None else end
    out = []
    i = start
    while i < end:
        j = i + 1
        while j < end and _glued(text, j):
            j += 1
        if _wordlike(text[i]) or unicodedata.category(text[i])[0] == "S":
            out.append(Word(text[i:j].casefold(), i, j))
        i = j
    return out


def token_safe(text: str, spans: Iterable[Sequence[int]]) -> list[Span]:
    """Ranges in order whose ends cut no word: white space at their ends left out, then widened to word boundaries.

    Empty ranges are left out. Ranges that overlap or touch, or have nothing but letters between them (in scripts
    without spaces a token may cover several words), become one, so that no two share a token of a tokenizer that
    splits at punctuation and spaces first. A token belongs to a range if it touches it (trees.layout.align_spans).
    """
    out: list[Span] = []
    for start, end in sorted((int(s[0]), int(s[1])) for s in spans):
        while start < end and text[start].isspace():
            start += 1
        while start < end and text[end - 1].isspace():
            end -= 1
        if start >= end:
            continue
        while start > 0 and _glued(text, start):
            start -= 1
        while end < len(text) and _glued(text, end):
            end += 1
        if out and all(_wordlike(c) for c in text[out[-1][1] : start]):
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def _glued(text: str, i: int) -> bool:
    """Whether text[i - 1] and text[i] belong to one word or one symbol; 0 < i < len(text)."""
    a, b = text[i - 1], text[i]
    if a.isascii() and b.isascii():  # nearly always
        if _wordlike(a) and _wordlike(b):
            return True
    elif _extends(b) or a == "\u200d" or (_flag(a) and _flag(b)):
        return True
    elif _wordlike(a) and _wordlike(b):
        return not (_unspaced(a) or _unspaced(b))
    for k, mark in ((i, b), (i - 1, a)):
        if 0 < k < len(text) - 1:
            sides = text[k - 1], text[k + 1]
            if mark in "'’" and all(_wordlike(c) and not _unspaced(c) for c in sides):
                return True
            if mark in ".,:" and all(c.isdigit() for c in sides):
                return True
    return False


def _wordlike(c: str) -> bool:
    return c.isalnum() or c == "_" or (not c.isascii() and unicodedata.category(c)[0] == "M")


@lru_cache(4096)
def _extends(c: str) -> bool:
    """Marks, joiners, skin tones, tags: part of the symbol before them."""
    code = ord(c)
    return (
        unicodedata.category(c)[0] == "M" or c == "\u200d" or 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F
    )


def _flag(c: str) -> bool:
    return 0x1F1E6 <= ord(c) <= 0x1F1FF


def _unspaced(c: str) -> bool:
    """Han, kana, Yi: scripts whose words stand without spaces."""
    code = ord(c)
    return 0x2E80 <= code <= 0xA4CF or 0xF900 <= code <= 0xFAFF or 0x20000 <= code <= 0x3FFFF
