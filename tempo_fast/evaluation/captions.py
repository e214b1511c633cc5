"""How right a free caption is: objects, events, and their order.

Sentences are compared by their words, without case and outer white space.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tempo_fast.events import kendall_tau, matched_order
from tempo_fast.schema import events_of

SUBJECT_WORDS = 3


@dataclass(frozen=True)
class CaptionScore:
    """Scores of one caption, each in [0, 1] but ``order_tau`` in [-1, 1] (None with fewer than two matched events)."""

    events: float
    objects: float
    order_tau: float | None


def normalise(sentence: str) -> str:
    """Words in lower case, one space apart, without the full stop."""
    return " ".join(sentence.lower().rstrip(". ").split())


def subject(sentence: str) -> str:
    """The first three words, ``a red circle``: what descriptions of this form begin with."""
    return " ".join(normalise(sentence).split()[:SUBJECT_WORDS])


def score_caption(caption: str, events: Sequence[str]) -> CaptionScore:
    """Compare a caption with what happens.

    ``events``: F1 over the multisets of sentences. ``objects``: share of the true events whose subject (``subject``)
    begins a sentence of the caption, each sentence counted once. ``order_tau``: Kendall's tau between the caption's
    order and the true order of the matched events.
    """
    told = [normalise(s) for s in events_of(caption)]
    true = [normalise(s) for s in events]
    hits = (Counter(told) & Counter(true)).total()
    f1 = 2 * hits / (len(told) + len(true)) if told or true else 1.0
    objects = (Counter(map(subject, told)) & Counter(map(subject, true))).total()
    return CaptionScore(f1, objects / len(true) if true else 1.0, kendall_tau(matched_order(told, true)))
