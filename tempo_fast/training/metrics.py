"""Where metrics go: JSON lines always, TensorBoard when it is installed."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from tempo_fast.files import read_jsonl, write_jsonl


def peak_memory_gib() -> float:
    """Peak memory in GiB: of the CUDA allocator, or of this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


class MetricsWriter:
    """Appends rows to ``<folder>/metrics.jsonl`` (complete lines, flushed per row) and to TensorBoard.

    ``keep_steps``: on resume, rows of later steps are dropped, since those steps will run again.
    """

    def __init__(self, folder: Path, tensorboard: Path | None, *, keep_steps: int) -> None:
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _drop_torn_line(self.path)
            rows = [row for _, row in read_jsonl(self.path) if row["stage_step"] <= keep_steps]
            write_jsonl(self.path, rows)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the writer
        self.board = _board(tensorboard, keep_steps) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name not in ("step", "stage_step"):
                    self.board.add_scalar(name, value, row["stage_step"])

    def close(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        if self.board is not None:
            self.board.close()


def _drop_torn_line(path: Path) -> None:
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        path.write_bytes(data[: data.rfind(b"\n") + 1])


def _board(folder: Path, keep_steps: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=keep_steps + 1 if keep_steps else None)
