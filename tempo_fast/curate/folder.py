"""Many videos to clips: resumable per file, one bad file never stops the run."""

from __future__ import annotations

import glob
import itertools
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_fast.config import CurateConfig
from tempo_fast.curate.embed import make_embedder
from tempo_fast.curate.shots import make_detector
from tempo_fast.curate.video import Unusable, curate_video
from tempo_fast.errors import InputError
from tempo_fast.files import digest, to_plain, write_jsonl
from tempo_fast.runtime.progress import progress as progress_bar
from tempo_fast.schema import Clips
from tempo_fast.video.decode import open_decoder
from tempo_fast.video.probe import content_digest

VIDEO_SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".webm",
    ".wmv",
}  # fmt: skip
_LIST_SUFFIXES = {".txt", ".lst", ".list"}
_RULES = 2  # part of the journal's key: raise it when the same config must give other clips


@dataclass
class CurateResult:
    """``clips`` of the usable videos, in the order of the paths; ``filtered`` could be read but the method cannot use
    them; ``quarantined`` could not be read. Rows of the last two: {"video", "reason"}."""

    clips: list[Clips] = field(default_factory=list)
    quarantined: list[dict[str, str]] = field(default_factory=list)
    filtered: list[dict[str, str]] = field(default_factory=list)


def list_videos(spec: str) -> list[Path]:
    """The videos a user means: a folder (with subfolders), a glob, one video file, or a text file with a path a line.

    Folders give files with a video's suffix, sorted; lines of a text file are relative to that file, ``#`` starts a
    comment, and are kept even when no such file exists (the run then names it in the quarantine).

    Raises:
        InputError: nothing is found.
    """
    path = Path(spec)
    if not spec:
        raise InputError("data.videos: is empty; give a folder, a glob, or a text file with one path a line")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not found:
            raise InputError(f"data.videos: {spec} holds no video files ({', '.join(sorted(VIDEO_SUFFIXES))})")
        return found
    if path.is_file():
        if path.suffix.lower() not in _LIST_SUFFIXES:
            return [path]
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"data.videos: {spec} cannot be read as a list of paths ({e})") from e
        names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not names:
            raise InputError(f"data.videos: {spec} lists no paths")
        return [path.parent / name for name in dict.fromkeys(names)]
    matches = sorted(p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file())
    if not matches:
        raise InputError(f"data.videos: {spec} matches no file")
    return matches


def curate_folder(
    paths: Sequence[str | os.PathLike[str]],
    config: CurateConfig,
    out: str | os.PathLike[str],
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    check: Callable[[], None] | None = None,
    backend: str = "auto",
) -> CurateResult:
    """Curate every video, writing ``clips.jsonl``, ``filtered.jsonl`` and ``quarantine.jsonl`` into ``out``.

    Each finished file is first appended, as one whole synced line, to ``journal.jsonl`` under the digest of its bytes,
    the config and the decoder: a run that was killed, or that sees new files or another config, does only what is
    missing. The three result files are written at the end, in the order of ``paths``.

    Args:
        paths: the videos.
        config: thresholds.
        out: folder, made when missing.
        workers: processes; 1 runs in this one.
        progress: called with (done, total) after each file; by default a bar on the terminal.
        check: called after each file; may raise to stop the run (the journal keeps what is done).
        backend: decoder name.

    Raises:
        InputError: ``out`` cannot be written, or the detector, embedder or decoder asked for is missing.
    """
    open_decoder(backend)  # a missing package is an error of the run, not of each file
    make_detector(config, 25.0)
    make_embedder(config)
    journal = _Journal(Path(out) / "journal.jsonl")
    rules = digest([config, backend, _RULES])
    rows: dict[int, dict[str, Any]] = {}
    todo: dict[str, list[int]] = {}  # the same bytes under several names are curated once
    for i, path in enumerate(paths):
        try:
            key = digest([content_digest(path), rules])
        except InputError as e:
            rows[i] = _row("", os.fspath(path), "quarantined", reason=str(e))
            continue
        if key in journal.rows:
            rows[i] = journal.rows[key]
        else:
            todo.setdefault(key, []).append(i)

    bar = None if progress else progress_bar(len(paths), "curate", "video")
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if progress:
            progress(done, len(paths))
        elif bar is not None:
            bar.update(n)

    try:
        if rows:
            advance(len(rows))
        jobs = [(key, os.fspath(paths[which[0]])) for key, which in todo.items()]
        for row in _work(jobs, config, backend, workers):
            journal.append(row)
            for i in todo[row["key"]]:
                rows[i] = row
            advance(len(todo[row["key"]]))
            if check:
                check()
    finally:
        if bar is not None:
            bar.close()

    result = CurateResult()
    for i, path in enumerate(paths):
        name, row = os.fspath(path), rows[i]
        if row["status"] == "ok":
            result.clips.append(Clips.from_row({**row["clips"], "video": name}))
        else:
            # Reasons stand without the path, which may be another name of the same bytes.
            entry = {"video": name, "reason": row["reason"].removeprefix(f"{row['video']}: ")}
            (result.filtered if row["status"] == "filtered" else result.quarantined).append(entry)
    for name, items in (("clips", result.clips), ("filtered", result.filtered), ("quarantine", result.quarantined)):
        write_jsonl(Path(out) / f"{name}.jsonl", items)
    return result


def _row(key: str, video: str, status: str, *, reason: str = "", clips: Clips | None = None) -> dict[str, Any]:
    return {"key": key, "video": video, "status": status, "reason": reason, "clips": to_plain(clips)}


def _one(key: str, path: str, config: CurateConfig, backend: str) -> dict[str, Any]:
    """Curate one file; every way in which the file itself is at fault becomes a row."""
    try:
        return _row(key, path, "ok", clips=curate_video(path, config, backend))
    except Unusable as e:
        return _row(key, path, "filtered", reason=e.reason)
    except InputError as e:
        return _row(key, path, "quarantined", reason=str(e))
    except MemoryError:
        return _row(key, path, "quarantined", reason="does not fit into memory")


def _work(
    jobs: Sequence[tuple[str, str]], config: CurateConfig, backend: str, workers: int
) -> Iterator[dict[str, Any]]:
    """Yield one row per job, as they finish."""
    if workers <= 1 or len(jobs) <= 1:
        for key, path in jobs:
            yield _one(key, path, config, backend)
        return
    left = dict(jobs)
    try:
        for row in _pooled(jobs, config, backend, min(workers, len(jobs))):
            del left[row["key"]]
            yield row
        return
    except BrokenProcessPool:
        pass
    # A decoder took its process down, and the pool does not say on which file: the rest goes through one at a time.
    while left:
        try:
            for row in _pooled(list(left.items()), config, backend, 1):
                del left[row["key"]]
                yield row
        except BrokenProcessPool:
            key, path = next(iter(left.items()))
            del left[key]
            yield _row(key, path, "quarantined", reason="the process that read it died")


def _pooled(
    jobs: Sequence[tuple[str, str]], config: CurateConfig, backend: str, workers: int
) -> Iterator[dict[str, Any]]:
    """One row per job, as they finish; never more jobs handed out than there are workers, so that with one worker
    BrokenProcessPool is about the first job without a row."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    waiting: set[Future[dict[str, Any]]] = set()
    queue = iter(jobs)
    try:
        while True:
            for key, path in itertools.islice(queue, workers - len(waiting)):
                waiting.add(pool.submit(_one, key, path, config, backend))
            if not waiting:
                return
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread per process, and Ctrl-C is for the parent."""
    import cv2
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


class _Journal:
    """Append-only JSON lines; a last line without its newline, left by a kill, is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_bytes() if path.exists() else b""
            whole = text.rfind(b"\n") + 1
            for line in text[:whole].splitlines():
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (ValueError, KeyError, TypeError):
                    continue  # a line damaged on disk is done again
            with open(path, "ab") as f:
                if whole < len(text):
                    f.truncate(whole)
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})") from e

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            with open(self.path, "ab") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e
        self.rows[row["key"]] = row
