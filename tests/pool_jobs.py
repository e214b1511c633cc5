"""Jobs for ``tempo_fast.runtime.pool`` that misbehave for real; workers import this file by its name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from tempo_fast.errors import InputError


class Late:
    """Does something as soon as a worker unpickles it."""

    def __init__(self, action: str, argument: str) -> None:
        self.words = action, argument

    def __reduce__(self) -> Any:
        return begin, self.words


def begin(action: str, argument: str) -> None:
    """What ``Late`` does."""
    if action.startswith("note"):
        Path(argument).write_text(str(os.getpid()))
        time.sleep(0.0 if action == "note-exit" else 60.0)
    if action == "kill":
        os.kill(os.getpid(), signal.Signals(int(argument)))
    os._exit(int(argument) if action == "exit" else 1)


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
    if verb == "note-exit":
        begin(verb, rest)
    if verb == "note":
        Path(rest).write_text(str(os.getpid()))
        time.sleep(60)
    return job, shared, os.getpid()
