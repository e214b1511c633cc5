"""Can a chosen and a rejected answer be told apart? Rules that read the two texts alone, never the video.

An event is a sentence, known by its words. A sentence that stands in one text alone is taken for the event of the most
similar sentence that stands in the other alone, if it is similar enough: a paraphrase tells no other event.

A step is two neighbouring events, in order; the beginning and the end of a text count as events here, so that n events
make n + 1 steps. Steps, and not how far events moved, are what a perturbation of difficulty r breaks (see perturb.py):
swapping the two halves of a story moves every event by half of it, and breaks three steps.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from tempo_fast.events import kendall_tau, matched_order
from tempo_fast.pairs.spans import sentence_spans

SAME_EVENT = 0.6
"""Cosine of two sentences' weighted words from which on they are one event. A judge that takes too much for a
paraphrase calls fewer pairs apart, which is the side to err on."""

SAME_STORY = 0.5
"""Share of common steps from which on two texts tell one story. Half: below it a reader who follows one text in the
other meets, at most places, another event than the one that should come next."""

Embed = Callable[[Sequence[str]], Sequence[Sequence[float]]]
"""Texts to rows of numbers, one each, of one length."""

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Lower-case words; punctuation parts them and is left out."""
    return _WORD.findall(text.lower())


def rouge_l(a: str, b: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin, "ROUGE", 2004; sentence level, no stemming).

    Written here because the package rouge-score brings nltk; equal to it on words of ASCII letters and digits.
    """
    left, right = words(a), words(b)
    common = _common_length(left, right)
    return 2 * common / (len(left) + len(right)) if common else 0.0


def _common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: a column of the table in one integer (Hyyrö, "Bit-parallel LCS-length
    computation revisited", 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(a)) - 1
    column = full
    for word in b:
        hits = column & places.get(word, 0)
        column = ((column + hits) | (column - hits)) & full
    return len(a) - bin(column).count("1")


def events(text: str) -> list[str]:
    """The sentences of a text as words, one space apart; sentences without a word are left out."""
    told = (" ".join(words(text[start:end])) for start, end in sentence_spans(text))
    return [event for event in told if event]


def same_events(chosen: str, rejected: str) -> bool:
    """Whether both texts tell equal sentences in the same order, but for case, punctuation and white space.

    Such a pair is an identity: so is a rejected answer that permutes equal sentences.
    """
    return events(chosen) == events(rejected)


def measures(chosen: str, rejected: str, embed: Embed | None = None) -> dict[str, float]:
    """How alike two answers are. All but ``separated`` are 1 for equal texts, and larger is more alike.

    Args:
        chosen, rejected: the texts, each with at least one word.
        embed: adds ``embedding``. It has no part in ``separated``.

    Returns:
        - ``rouge_l``: see there.
        - ``coverage``: common events / events of the text that tells more, equal ones counted as often as told.
        - ``steps``: common steps / steps of that text, in [0, 1].
        - ``order_agreement``: Kendall's tau of the common events, in [-1, 1]; missing with fewer than two.
        - ``embedding``: cosine of the two texts' rows.
        - ``separated``: 1.0 when ``steps`` < SAME_STORY, else 0.0. Events that one text leaves out, adds or tells at
          another place each break the steps beside them, so that this holds for content as for order.
    """
    told, other = events(chosen), events(rejected)
    twins = _paraphrases(told, other)
    other = [twins.get(e, e) for e in other]
    longer = max(len(told), len(other))
    steps = sum((_steps(told) & _steps(other)).values()) / (longer + 1)
    out = {
        "rouge_l": rouge_l(chosen, rejected),
        "coverage": sum((Counter(told) & Counter(other)).values()) / max(1, longer),
        "steps": steps,
        "separated": float(steps < SAME_STORY),
    }
    tau = kendall_tau(matched_order(other, told))
    if tau is not None:
        out["order_agreement"] = tau
    if embed is not None:
        out["embedding"] = _cosine(*([float(x) for x in row] for row in embed([chosen, rejected])))
    return out


def _steps(told: Sequence[str]) -> Counter[tuple[str, str]]:
    return Counter(pairwise(["", *told, ""]))  # no event is empty


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return dot / size if size else 0.0


def _paraphrases(told: Sequence[str], other: Sequence[str]) -> dict[str, str]:
    """Events of ``other`` alone -> the event of ``told`` alone that each one paraphrases, most similar first, one to
    one. A word weighs log(1 + sentences / sentences with it) over the sentences of both texts."""
    mine, theirs = [dict.fromkeys(a) for a in (told, other)]
    sentences = {e: dict.fromkeys(e.split()) for e in {**mine, **theirs}}  # in order: sums of floats repeat exactly
    seen = Counter(w for bag in sentences.values() for w in bag)
    weight = {w: math.log(1 + len(sentences) / n) ** 2 for w, n in seen.items()}
    size = {e: math.sqrt(sum(weight[w] for w in bag)) for e, bag in sentences.items()}
    alone = [e for e in mine if e not in theirs], [e for e in theirs if e not in mine]
    similar = []
    for i, a in enumerate(alone[0]):
        for j, b in enumerate(alone[1]):
            cosine = sum(weight[w] for w in sentences[a] if w in sentences[b]) / (size[a] * size[b])
            if cosine >= SAME_EVENT:
                similar.append((-cosine, i, j))
    found: dict[str, str] = {}
    for _, i, j in sorted(similar):
        a, b = alone[0][i], alone[1][j]
        if b not in found and a not in found.values():
            found[b] = a
    return found
