"""Temporal questions about a film, with options and the index of the right one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tempo_fast.tinyworld.world import ACTIONS, DIRECTIONS, Film

TYPES = ("before", "after", "first", "last", "order_yes_no", "direction", "count")
ORDER_TYPES = ("before", "after", "first", "last", "order_yes_no")
NUMBERS = ("Zero.", "One.", "Two.", "Three.", "Four.", "Five.", "Six.", "Seven.", "Eight.", "Nine.", "Ten.")


@dataclass(frozen=True)
class Question:
    """A question with its options; `answer` is the index of the right one."""

    type: str
    question: str
    options: tuple[str, ...]
    answer: int


def draw_question(rng: np.random.Generator, film: Film, kind: str) -> Question | None:
    """A question of this kind, or None when the film has nothing to ask about (no movement, fewer than two clips)."""
    events = [clip.event for clip in film.clips]
    n = len(events)
    if kind == "direction":
        moving = [e for e in events if e.action in DIRECTIONS]
        if not moving:
            return None
        event = moving[int(rng.integers(len(moving)))]
        options = tuple(f"{d.capitalize()}." for d in DIRECTIONS)
        return Question(kind, f"In which direction does {event.subject} move?", options, DIRECTIONS.index(event.action))
    if kind == "count":
        action = list(ACTIONS)[int(rng.integers(len(ACTIONS)))]
        right = min(sum(e.action == action for e in events), len(NUMBERS) - 1)
        low = int(np.clip(right - int(rng.integers(4)), 0, len(NUMBERS) - 4))
        return Question(kind, f"How many objects {ACTIONS[action][1]}?", NUMBERS[low : low + 4], right - low)
    if n < 2:
        return None
    if kind == "order_yes_no":
        i, j = (int(k) for k in rng.permutation(n)[:2])
        asked, other = events[i], events[j]
        does = f"Does {asked.subject} {ACTIONS[asked.action][1]}"
        text = f"{does} before {other.subject} {ACTIONS[other.action][0]}?"
        return Question(kind, text, ("Yes.", "No."), 0 if i < j else 1)
    if kind in ("before", "after"):
        k = int(rng.integers(n - 1)) + (kind == "before")
        right = k - 1 if kind == "before" else k + 1
        text = f"What happens right {kind} {events[k].subject} {ACTIONS[events[k].action][0]}?"
        taken = {k, right}
    else:
        right = 0 if kind == "first" else n - 1
        text = "What happens first?" if kind == "first" else "What happens last?"
        taken = {right}
    others = [i for i in range(n) if i not in taken]
    wrong = [int(i) for i in rng.permutation(others)[:3]]
    if not wrong:
        return None
    order = [int(i) for i in rng.permutation([right, *wrong])]
    return Question(kind, text, tuple(events[i].text for i in order), order.index(right))
