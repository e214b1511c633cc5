"""Reading ahead of the step: a thread finds, reads and puts together what the next micro-batches need.

The step then neither hashes prompts for keys, nor waits for the disk, nor copies; on CUDA what it gets lies in pinned
memory, and goes to the device while the step runs.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tempo_fast.reference.store import Reference, ReferenceStore
from tempo_fast.trees.layout import ResponseTree
from tempo_kernels.head import HeadStatistics

READER = "tempo-fast-reference"
"""Name of the thread."""

Trees = Sequence[ResponseTree]
_Names = list[tuple[str, int]]
_Read = tuple[_Names | None, int, Reference | BaseException]
"""For which trees (None: for any), how many answers, what was read."""


class ReadAhead:
    """The reference of micro-batches, read before it is asked for.

    Args:
        store: its ``kl`` and ``form`` decide what is read.
        upcoming: the trees of the micro-batches in the order in which they will be asked for, known again by their
            ids; read in the thread, as room comes free. None: nothing is read ahead.
        device: where ``get`` puts it.
        depth: most micro-batches read and not taken yet.
        hint: the disk is told of as many more.
    """

    def __init__(
        self,
        store: ReferenceStore,
        upcoming: Iterable[Trees] | None,
        *,
        device: torch.device | str = "cpu",
        depth: int = 2,
        hint: int = 4,
    ) -> None:
        self.store, self.device = store, torch.device(device)
        self._ready: queue.Queue[_Read | None] = queue.Queue(depth)
        self._closed = threading.Event()
        self._hint = hint
        self._empty: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None
        if self.device.type == "cuda":
            # torch keeps pinned blocks for the next of the same size, and knows when a copy from them is done
            self._empty = lambda shape, dtype: torch.empty(shape, dtype=dtype, pin_memory=True)
        self._thread: threading.Thread | None = None
        if upcoming is not None:
            self._thread = threading.Thread(target=self._work, args=(iter(upcoming),), name=READER, daemon=True)
            self._thread.start()

    def get(self, trees: Trees) -> Reference:
        """The reference of these trees' answers on the device, tree after tree and branch after branch. Trees that were
        not foreseen are read here and now, and what was foreseen before them is let go.

        Raises:
            InputError: some are missing.
        """
        asked = _names(trees)
        while self._thread is not None:
            found = self._ready.get()
            if found is None:
                self._thread = None
                break
            named, answers, result = found
            if named is not None and named != asked:
                continue
            if isinstance(result, BaseException):
                raise result
            self.store.hits += answers
            return self._placed(result)
        keys = [key for tree in trees for key in self.store.keys(tree)]
        result = self.store.read(keys, empty=self._empty)
        self.store.hits += len(keys)
        return self._placed(result)

    def close(self) -> None:
        """Let the thread go."""
        self._closed.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        self._thread = None

    def _placed(self, found: Reference) -> Reference:
        if isinstance(found, Tensor):
            return found.to(self.device, non_blocking=True)
        moved = [None if value is None else value.to(self.device, non_blocking=True) for value in found]
        return HeadStatistics(*moved)  # type: ignore[arg-type]

    def _work(self, upcoming: Iterator[Trees]) -> None:
        coming: deque[tuple[_Names, list[str]]] = deque()
        try:
            while not self._closed.is_set():
                while len(coming) <= self._hint and (trees := next(upcoming, None)) is not None:
                    keys = [key for tree in trees for key in self.store.keys(tree)]
                    self.store.willneed(keys)
                    coming.append((_names(trees), keys))
                if not coming:
                    break
                names, keys = coming.popleft()
                self._put((names, len(keys), self._read(keys)))
        except BaseException as e:  # of ``upcoming``: raised for whoever asks next
            self._put((None, 0, e))
        self._put(None)

    def _read(self, keys: list[str]) -> Reference | BaseException:
        try:
            return self.store.read(keys, empty=self._empty)
        except BaseException as e:  # handed to whoever asks for just this
            return e

    def _put(self, found: _Read | None) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(found, timeout=0.1)
            except queue.Full:
                continue


def _names(trees: Trees) -> _Names:
    return [(tree.id, len(tree.branches)) for tree in trees]


@contextmanager
def reading_ahead(
    store: ReferenceStore | None, upcoming: Iterable[Trees], *, device: torch.device | str = "cpu"
) -> Iterator[ReadAhead | None]:
    """A ``ReadAhead``, closed at the end; None without a store."""
    if store is None:
        yield None
        return
    ahead = ReadAhead(store, upcoming, device=device)
    try:
        yield ahead
    finally:
        ahead.close()
