"""Shots that look alike, and the clips they make. Pure functions of numbers.

Rules as coded by the TEMPLE authors (lscpku/TEMPLE: ``tools/similarity.py:merge_items``, ``preprocess.py``).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np


def group_shots(similarity: np.ndarray, threshold: float) -> list[int]:
    """Greedy agglomeration of shots (``merge_items``).

    The most similar pair of groups is merged again and again, its new similarities being the mean of the two old rows
    (unweighted), until the largest similarity is <= ``threshold``. A merged group goes to the end of the list; of equal
    pairs, which float16 features make often, the one whose later group comes first is merged, then the one whose
    earlier group comes last.

    Args:
        similarity: [S, S], symmetric; the diagonal is ignored.
        threshold: similarity that no longer merges.

    Returns:
        A group number per shot, numbered by first appearance from 0.
    """
    s = np.array(similarity, dtype=np.float64)
    n = len(s)
    if s.shape != (n, n):
        raise ValueError(f"similarity must be square, got {s.shape}")
    members = [[i] for i in range(n)]
    while len(members) > 1:
        lower = np.where(np.tri(len(s), k=-1, dtype=bool), s, -np.inf)
        best = lower.max()
        if best <= threshold:
            break
        i = int((lower == best).any(axis=1).argmax())
        j = int(np.flatnonzero(lower[i] == best)[-1])
        row = np.delete((s[i] + s[j]) / 2, [i, j])
        s = np.delete(np.delete(s, [i, j], 0), [i, j], 1)
        s = np.block([[s, row[:, None]], [row, 0.0]])
        merged = members[j] + members[i]
        members = [m for k, m in enumerate(members) if k not in (i, j)] + [merged]
    label = [0] * n
    for number, group in enumerate(sorted(members, key=min)):
        for shot in group:
            label[shot] = number
    return label


def runs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of equal neighbours as [first, last + 1) positions: runs of shots are clips (``clip_grouping``)."""
    out, at = [], 0
    for _, run in itertools.groupby(groups):
        length = len(list(run))
        out.append((at, at + length))
        at += length
    return out


def group_problem(clip_groups: Sequence[int], min_clips: int, max_group_runs: int) -> str:
    """Why a video with clips of these groups is unusable, or "" (``filter_by_groups``).

    At least ``min_clips`` clips, and no group in more than min(max_group_runs, clips // 3) of them.
    """
    n = len(clip_groups)
    if n < min_clips:
        return f"{n} clips, fewer than curate.min_clips {min_clips}"
    most = min(max_group_runs, n // 3)
    for _, count in sorted(Counter(clip_groups).items()):
        if count > most:
            return f"one scene comes back in {count} of {n} clips (at most {most})"
    return ""
