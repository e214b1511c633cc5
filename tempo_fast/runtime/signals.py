"""Stopping on request, at points where the state can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch

from tempo_fast.errors import Interrupted
from tempo_fast.runtime.ranks import Ranks, current_ranks

SIGINT_CODE, SIGTERM_CODE = 130, 75


class Stopper:
    """Context in which SIGINT and SIGTERM become :class:`Interrupted` at the next ``check()``.

    A second SIGINT is a plain KeyboardInterrupt at once: the work under way is lost, what was saved is not.
    With several ranks ``check()`` is a collective: all ranks stop at the same point, whichever got the signal.
    ``ranks`` None takes the process group as it is at each check.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks
        self._code = 0
        self._interrupts = 0
        self._previous: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """Exit code of the signal that has arrived at this process, 0 when none has."""
        return self._code

    def check(self) -> None:
        """Raise Interrupted (exit code 130 for SIGINT, 75 for SIGTERM) if a stop was asked for."""
        code = self._code
        ranks = self.ranks or current_ranks()
        if ranks.world > 1:
            code = int(ranks.all_reduce_max(torch.tensor([code], device=ranks.device)))
        if code:
            name = "SIGINT" if code == SIGINT_CODE else "SIGTERM"
            raise Interrupted(f"stopped by {name}; the same command resumes", code)

    def __enter__(self) -> Stopper:
        # handlers can only be set in the main thread; elsewhere check() never fires by itself
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._code = SIGTERM_CODE
            return
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._code = self._code or SIGINT_CODE
