"""Many clips of one video, decoded together: windows share files, and seeking to each clip would decode runs twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tempo_fast.video.decoder import pick


def by_video(plans: Sequence[Any]) -> list[list[Any]]:
    """Distinct plans grouped by file, in order of appearance."""
    groups: dict[str, dict[str, Any]] = {}
    for plan in plans:
        groups.setdefault(plan.path, {})[plan.key] = plan
    return [list(group.values()) for group in groups.values()]


def shared_reader(reader: Any, plans: Sequence[Any]) -> Any:
    """A reader for these plans of one file, all their frames decoded in one pass.

    The pixels are the reader's own: only its frames are picked from those in memory.

    Raises:
        InputError: the file cannot be decoded.
    """
    indices = sorted({i for plan in plans for i in plan.indices})
    frames = reader.frames(reader.plan(plans[0].path, indices))
    shared = copy.copy(reader)
    shared.frames = lambda plan: pick(frames, indices, plan.indices)
    return shared
