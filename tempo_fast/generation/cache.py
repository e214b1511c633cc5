"""Answers on disk: append-only, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation.base import Engine, RefusedRequest, Request, request_identity
from tempo_fast.runtime.progress import progress

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)


class AnswerCache:
    """JSON lines. One for each engine that answered, ``{"engine", "seed", "provenance"}`` with all sampling parameters,
    before its first answer; and one for each answer, ``{"key", "engine", "prompt", "text"}``, with ``"own"`` where the
    request sets turns, sample number or sampling itself. The key is a digest of engine provenance and request.

    Requests are answered in chunks of fixed size, and a chunk of which any answer is missing is asked again as a
    whole, so that batches, and with them the last bits of every sum, are the same after a resume. A torn last line
    (the process was killed while writing) is cut off. One process at a time: the file is locked until ``close``, the
    end of a ``with`` block, or the object's own end.

    Args:
        path: the file; made when missing.
        engine: who answers what is not in the file.
        chunk: requests per call of the engine, several times what it answers at once; also how much work a kill can
            lose.
        also: finished files of others, in which answers are looked up and which are never written.

    Attributes:
        asked: requests that went to the engine.

    Raises:
        InputError: the file cannot be read or made, holds something else, or another process has it open.
    """

    def __init__(self, path: str | Path, engine: Engine, chunk: int = 256, also: Sequence[str | Path] = ()) -> None:
        self.path, self.engine, self.chunk = Path(path), engine, chunk
        self.also = [Path(p) for p in also]
        self.asked = 0
        self._texts: dict[str, str] = {}
        self._engines: set[tuple[str, int]] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(self.path, "a+b")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e
        try:
            self._lock()
            self._load()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def answers(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """Texts in the order of ``requests``; equal requests are asked once.

        Raises:
            RefusedRequest: some are refused; the answers to all others are kept.
            InputError: from the engine, or when the file cannot be written.
        """
        provenance = self.engine.provenance()
        identity, seed = digest(provenance), int(getattr(self.engine, "seed", 0))
        keys = [_key(identity, seed, provenance, r) for r in requests]
        unique = dict(zip(keys, requests, strict=True))
        known = self._elsewhere(unique) if any(key not in self._texts for key in unique) else {}
        mine = [(key, request) for key, request in unique.items() if key not in known]
        refused: dict[str, str] = {}
        bar = progress(len(unique), desc, "answer") if desc else None
        try:
            if bar is not None:
                bar.update(len(known))
            for i in range(0, len(mine), self.chunk):
                part = mine[i : i + self.chunk]
                if any(key not in self._texts for key, _ in part):
                    try:
                        texts, reasons = self.engine.generate([request for _, request in part]), {}
                    except RefusedRequest as e:
                        texts, reasons = e.texts, e.reasons
                    self.asked += len(part)
                    refused |= {part[k][0]: reason for k, reason in reasons.items()}
                    head = {"engine": identity, "seed": seed, "provenance": provenance}
                    rows = [(key, r, text) for (key, r), text in zip(part, texts, strict=True) if key not in refused]
                    if rows:
                        self._append(head, rows)
                if bar is not None:
                    bar.update(len(part))
        finally:
            if bar is not None:
                bar.close()
        told = self._texts | known
        if refused:
            reasons = {k: refused[key] for k, key in enumerate(keys) if key in refused}
            raise RefusedRequest(reasons, ["" if key in refused else told[key] for key in keys])
        return [told[key] for key in keys]

    def _append(self, head: dict[str, Any], rows: Sequence[tuple[str, Request, str]]) -> None:
        lines: list[dict[str, Any]] = []
        engine = (head["engine"], head["seed"])
        if engine not in self._engines:
            self._engines.add(engine)
            lines.append(head)
        for key, request, text in rows:
            if key not in self._texts:
                self._texts[key] = text
                own = request_identity(request)[3:]
                row = {"key": key, "engine": head["engine"][:12], "prompt": request.prompt, "text": text}
                lines.append({**row, "own": own[0]} if own else row)
        try:
            self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise InputError(f"{self.path}: another process is writing answers to it") from e
        except OSError as e:  # a file system without locks
            log.warning("%s: cannot be locked (%s); see that no other run writes to it", self.path, e.strerror)

    def _load(self) -> None:
        good = 0
        self._file.seek(0)
        try:
            for number, line in enumerate(self._file, 1):
                try:
                    row = json.loads(line)
                    if "provenance" in row:
                        found = (row["engine"], row["seed"])
                    else:
                        key, text = row["key"], row["text"]
                except (ValueError, KeyError, TypeError) as e:
                    if self._file.read(1):
                        raise InputError(f"{self.path}:{number}: not an answer; remove the file to redo them") from e
                    break
                if not line.endswith(b"\n"):
                    break
                if "provenance" in row:
                    self._engines.add(found)
                else:
                    self._texts[key] = text
                good += len(line)
        except OSError as e:
            raise InputError(f"{self.path}: cannot be read ({e.strerror})") from e
        if good < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(good)
        self._file.seek(0, os.SEEK_END)

    def _elsewhere(self, wanted: dict[str, Request]) -> dict[str, str]:
        """Answers that other files hold, whatever this one does: chunks are the same before and after a kill."""
        found: dict[str, str] = {}
        for path in self.also:
            for key, line in _lines(path):
                if key in wanted and key not in found:
                    try:
                        found[key] = json.loads(line)["text"]
                    except (ValueError, KeyError):  # torn
                        continue
        return found


def _key(identity: str, seed: int, provenance: dict[str, Any], request: Request) -> str:
    parts: list[Any] = [identity, request_identity(request)]
    # a greedy engine's provenance leaves the seed out, which a request that samples depends on
    if request.temperature and "seed" not in provenance:
        parts.append(seed)
    return digest(parts)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Key and line of each answer, of which only those that are wanted are worth parsing."""
    start = b'{"key": "'
    try:
        with open(path, "rb") as f:
            for line in f:
                if line.startswith(start):
                    yield line[len(start) : len(start) + 64].decode(errors="replace"), line
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
