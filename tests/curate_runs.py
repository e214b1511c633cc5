"""Runs of curation in processes of their own, which tests kill; processes import this file by its name."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from tempo_fast.config import CurateConfig
from tempo_fast.curate import curate_folder, list_videos
from tempo_fast.curate.work import curate_file
from tempo_fast.errors import InputError
from tempo_fast.runtime.shards import Shard

SERVER_GONE = 77
"""Exit code of a run that had no server to fork its workers from: a client that is killed while it connects takes
CPython's server with it. (A run of a user has a server of its own, which is to end with it.)"""


def run(videos: str, out: str, workers: int = 1, index: int = 0, count: int = 1) -> None:
    """One process of a curation. Its workers are forked from the server that it was forked from itself, which has all
    modules: a server of its own would import torch again, for seconds."""
    forkserver._forkserver.ensure_running = forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    try:
        curate_folder(list_videos(videos), CurateConfig(), out, workers=workers, shard=Shard(index, count))
    except (OSError, EOFError, InputError):
        try:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(forkserver._forkserver._forkserver_address)  # type: ignore[attr-defined]
        except OSError:
            os._exit(SERVER_GONE)
        raise


def misbehave(job: Any, shared: Any, report: Any) -> Any:
    """Curates, but a file named crash.mp4 ends its process, and hang.mp4 never ends."""
    name = Path(job.path).name
    if name == "crash.mp4":
        os.abort()
    if name == "hang.mp4":
        time.sleep(600)
    if name == "memory.mp4":
        raise MemoryError
    return curate_file(job, shared, report)
