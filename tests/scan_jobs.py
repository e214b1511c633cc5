"""Jobs for ``tempo_fast.scan.pool`` that misbehave for real; workers import this file by its name."""

import os
import time
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError


def act(job: str, shared: Any, report: Any) -> Any:
    """One word says what to do."""
    verb, _, rest = job.partition(" ")
    if verb == "abort":
        os.abort()
    if verb == "exit":
        os._exit(int(rest))
    if verb == "hang":
        with open(rest, "rb") as f:  # a named pipe that nobody writes to
            f.read()
    if verb == "spin":
        report("spinning")
        while True:
            pass
    if verb == "report-abort":
        report("so far")
        os.abort()
    if verb == "raise":
        raise ValueError(rest)
    if verb == "refuse":
        raise InputError(rest)
    if verb == "note":
        Path(rest).write_text(str(os.getpid()))
        time.sleep(60)
    return job, shared, os.getpid()
