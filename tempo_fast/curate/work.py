"""One file of many: the part of curation that runs in worker processes, each failure with its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tempo_fast.config import CurateConfig
from tempo_fast.curate.journal import Place
from tempo_fast.curate.sources import Stamp, stamp_of
from tempo_fast.curate.video import Unusable, curate_video
from tempo_fast.files import digest, to_plain
from tempo_fast.video.container import DecodeError
from tempo_fast.video.frames import not_of_the_file
from tempo_fast.video.probe import content_digest

Finding = dict[str, Any]
"""``key``, ``status``, ``reason``, ``failure``, ``clips``: see ``journal.Row``; and ``same``."""
_RULES = 3  # part of every key: raise it when the same config must give other clips


class Job(NamedTuple):
    """A file to curate, as it was when found; ``known`` is the key of a file with the same ends, or ""; ``number``
    and ``place``, where the row of that file lies, are the caller's."""

    path: str
    stamp: Stamp | None
    known: str = ""
    number: int = 0
    place: Place | None = None


@dataclass(frozen=True)
class Shared:
    """What every job needs; ``threads`` is for networks and pictures in one process."""

    config: CurateConfig
    backend: str = "auto"
    threads: int = 1


def rules_digest(config: CurateConfig, backend: str) -> str:
    """What decides clips besides a file's bytes: the thresholds, and who decodes."""
    return digest([replace(config, workers=0, timeout_s=0.0), backend, _RULES])


def curate_file(job: Job, shared: Shared, report: Callable[[Finding], None] = lambda found: None) -> Finding:
    """Curate one file; every way in which the file, its disk or the memory is at fault becomes a finding.

    A file whose bytes are those of the key ``job.known`` is not curated again: ``same`` is true then, unless it
    changed meanwhile.

    Raises:
        InputError: what is wrong with every file: a package or checkpoint that is missing.
    """
    import cv2
    import torch

    torch.set_num_threads(shared.threads)
    cv2.setNumThreads(shared.threads)
    found: Finding = {
        "key": "", "same": False, "status": "quarantined", "reason": "", "failure": "", "clips": None,
    }  # fmt: skip
    try:
        found["key"] = digest([content_digest(job.path), rules_digest(shared.config, shared.backend)])
        if found["key"] == job.known:
            found["same"] = True
        else:
            found["clips"] = to_plain(curate_video(job.path, shared.config, shared.backend))
            found["status"] = "ok"
    except Unusable as e:
        found |= {"status": "filtered", "reason": e.reason}
    except (DecodeError, OSError, MemoryError) as e:
        if isinstance(e, DecodeError):
            found["reason"] = str(e).removeprefix(f"{job.path}: ")
        else:
            found["reason"] = f"cannot be read ({e.strerror})" if isinstance(e, OSError) else "does not fit into memory"
        found["failure"] = not_of_the_file(e)
    if job.stamp is None:
        found["failure"] = found["failure"] or "io"  # it may be there next time
    elif stamp_of(job.path) != job.stamp:
        found |= {
            "same": False, "status": "quarantined", "reason": "changed while it was read", "failure": "changed",
            "clips": None,
        }  # fmt: skip
    return found
