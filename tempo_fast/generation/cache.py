"""Answers on disk: append-only, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tempo_fast.errors import InputError
from tempo_fast.files import digest
from tempo_fast.generation.base import Engine, Request, request_identity
from tempo_fast.runtime.progress import progress


class AnswerCache:
    """One JSON line per answer: ``{"key", "prompt", "text"}``, the key a digest of engine provenance and request.

    Requests are answered in chunks of fixed size, and a chunk of which any answer is missing is asked again as a
    whole, so that batches, and with them the last bits of every sum, are the same after a resume. A torn last line
    (the process was killed while writing) is cut off.

    Args:
        path: the file; made when missing.
        engine: who answers what is not in the file.
        chunk: requests per call of the engine; also how much work a kill can lose.
    """

    def __init__(self, path: str | Path, engine: Engine, chunk: int = 256) -> None:
        self.path, self.engine, self.chunk = Path(path), engine, chunk
        self.asked = 0
        self._texts: dict[str, str] = {}
        self._load()

    def answers(self, requests: Sequence[Request], desc: str = "") -> list[str]:
        """Texts in the order of ``requests``; equal requests are asked once.

        Raises:
            InputError: from the engine, or when the file cannot be written.
        """
        identity = digest(self.engine.provenance())
        keys = [digest([identity, request_identity(r)]) for r in requests]
        unique = list(dict(zip(keys, requests, strict=True)).items())
        bar = progress(len(unique), desc, "answer") if desc else None
        for i in range(0, len(unique), self.chunk):
            part = unique[i : i + self.chunk]
            if any(key not in self._texts for key, _ in part):
                texts = self.engine.generate([request for _, request in part])
                self.asked += len(part)
                self._append([(key, r, text) for (key, r), text in zip(part, texts, strict=True)])
            if bar is not None:
                bar.update(len(part))
        if bar is not None:
            bar.close()
        return [self._texts[key] for key in keys]

    def _append(self, rows: Sequence[tuple[str, Request, str]]) -> None:
        lines = []
        for key, request, text in rows:
            if key not in self._texts:
                self._texts[key] = text
                row = {"key": key, "prompt": request.prompt, "text": text}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as f:
                f.write("".join(lines).encode())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def _load(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as e:
            if e.errno == errno.ENOENT:
                return
            raise InputError(f"{self.path}: cannot be read ({e.strerror})") from e
        good = 0
        lines = data.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                key, text = row["key"], row["text"]
            except (ValueError, KeyError, TypeError) as e:
                if number < len(lines):
                    raise InputError(f"{self.path}:{number}: not an answer; remove the file to redo them") from e
                break
            if not line.endswith(b"\n"):
                break
            self._texts[key] = text
            good += len(line)
        if good < len(data):
            with open(self.path, "r+b") as f:
                f.truncate(good)
