"""Shots that look alike, and the clips they make. Pure functions of numbers.

Rules as coded by the TEMPLE authors (arXiv 2503.16929: ``tools/similarity.py``, ``clip_grouping``,
``filter_by_groups``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def group_shots(similarity: np.ndarray, threshold: float) -> list[int]:
    """Greedy agglomeration of shots.

    The most similar pair of groups is merged again and again, its new similarities being the mean of the two old rows
    (unweighted), until the largest similarity is <= ``threshold``. Ties go to the earliest pair.

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
    np.fill_diagonal(s, -np.inf)
    members = [[i] for i in range(n)]
    while len(members) > 1:
        i, j = divmod(int(s.argmax()), len(s))
        if s[i, j] <= threshold:
            break
        i, j = min(i, j), max(i, j)
        row = (s[i] + s[j]) / 2
        s[i], s[:, i] = row, row
        s[i, i] = -np.inf
        s = np.delete(np.delete(s, j, 0), j, 1)
        members[i] += members.pop(j)
    label = [0] * n
    for number, group in enumerate(sorted(members, key=min)):
        for shot in group:
            label[shot] = number
    return label


def runs(groups: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of equal neighbours as [first, last + 1) positions: runs of shots are clips."""
    out, at = [], 0
    for _, run in itertools.groupby(groups):
        length = len(list(run))
        out.append((at, at + length))
        at += length
    return out


def group_problem(clip_groups: Sequence[int], min_clips: int, max_group_runs: int) -> str:
    """Why a video with clips of these groups is unusable, or "".

    At least ``min_clips`` clips, and no group in more than min(max_group_runs, clips // 3) of them.
    """
    n = len(clip_groups)
    if n < min_clips:
        return f"{n} clips, fewer than curate.min_clips {min_clips}"
    most = min(max_group_runs, n // 3)
    for group in sorted(set(clip_groups)):
        count = clip_groups.count(group) if isinstance(clip_groups, list) else list(clip_groups).count(group)
        if count > most:
            return f"one scene comes back in {count} of {n} clips (at most {most})"
    return ""
