"""The command: find the videos, scan them in worker processes, repair what wants it, tell what was found."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tempo_fast.config import TrainConfig, VideoConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.files import digest, drop_stale, write_atomic, write_json, writing
from tempo_fast.imports import held_signals
from tempo_fast.runtime.pool import Outcome, how_ended, run_isolated, warm_up
from tempo_fast.scan.rows import Row, RowFile
from tempo_fast.scan.sources import find_videos, reaches
from tempo_fast.scan.summary import Summary

if TYPE_CHECKING:
    from tempo_fast.models.family import VideoGeometry
    from tempo_fast.scan.row import Decode, Job, Shared
    from tempo_fast.video.repair import RepairConfig

log = logging.getLogger(__name__)

_SCRATCH = ".scan-"
_RULES = 2  # part of a row's settings: raise it when the same file must give another row
_RETRIED = {"crash", "error", "io", "memory"}  # failures that say nothing of the file's bytes


@dataclass(frozen=True)
class Options:
    """``out`` keeps the rows, and a scan that was stopped goes on from them unless ``fresh``; ``workers`` 0 is one per
    core; ``timeout_s`` is for one file; ``fix`` names the folder of repaired copies, made by ``gop`` and ``max_gop`` of
    ``RepairConfig``."""

    out: Path | None = None
    fresh: bool = False
    workers: int = 0
    timeout_s: float = 60.0
    decode: Decode = "sampled"
    fix: Path | None = None
    gop: int = 48
    max_gop: int = 250


def scan_command(videos: str, options: Options, *, recipe: str = "", overrides: Sequence[str] = ()) -> None:
    """Print a table and a summary; with ``out`` also write JSON lines and ``<out>.summary.json``, with ``fix`` copies
    of the files that want one and ``videos.txt``, a list of what to train on.

    Tokens are counted as the recipe's model counts them, as Qwen2-VL does where its directory is not there.

    Raises:
        InputError: what was asked for cannot be done at all. Bad files are findings, not errors.
        Interrupted: SIGINT or SIGTERM came; without ``out`` it cannot be resumed.
    """
    warm_up(["tempo_fast.scan.row"])
    with held_signals():
        from tempo_fast.runtime.signals import Stopper
        from tempo_fast.video.decode import open_decoder
        from tempo_fast.video.repair import RepairConfig

        config, geometry, family, max_tokens = _settings(recipe, overrides)
        open_decoder(config.backend)  # a missing package is an error of the scan, not of each file
    paths = [os.fspath(p) for p in find_videos(videos)]
    repairs = RepairConfig(gop=options.gop, max_gop=options.max_gop)
    if options.out is not None:
        _check_target("--out", options.out, [videos, *paths])
    if options.fix is not None:
        _check_folder(options.fix, videos, paths)
        _check_target("--fix", _list_path(options.fix), [videos, *([options.out] if options.out else [])])
    with closing(RowFile(options.out, fresh=options.fresh)) as rows, Stopper() as stopper:
        scan = _Scan(options, config, geometry, repairs, paths, rows, stopper.check)
        try:
            scan.run()
            stopper.check()
        except Interrupted as e:
            if options.out:
                raise
            raise Interrupted("stopped, and without --out no row is kept", e.exit_code, resumable=False) from e
        totals = Summary(config, family, max_tokens)
        for row in rows.ordered(paths):
            totals.add(row)
        if options.fix is not None:
            _write_list(_list_path(options.fix), rows.ordered(paths))
        rows.finish(paths)
    if text := totals.table():
        print(text)
    print(totals.text())
    if options.out is not None:
        write_json(summary_path(options.out), totals.as_dict())
        print(f"{options.out}: {totals.videos} rows" + (f", {scan.kept} of them from before" if scan.kept else ""))
    if options.fix is not None:
        print(f"{_list_path(options.fix)}: what to train on")


def summary_path(out: Path) -> Path:
    """``scan.jsonl`` -> ``scan.summary.json``."""
    return out.with_name(f"{out.stem}.summary.json")


def _list_path(folder: Path) -> Path:
    return folder / "videos.txt"


@dataclass
class _Scan:
    options: Options
    config: VideoConfig
    geometry: VideoGeometry
    repairs: RepairConfig
    paths: Sequence[str]
    rows: RowFile
    check: Callable[[], None]
    kept: int = 0

    def run(self) -> None:
        """Rows of all files, then repairs of those that want one."""
        from tempo_fast.scan.row import Job, Shared
        from tempo_fast.video.repair import RULES

        o = self.options
        settings = digest([self.config, self.geometry, o.decode, _RULES])[:16]
        fix_settings = digest([self.repairs, RULES, str(o.fix.resolve())])[:16] if o.fix is not None else ""
        todo = [p for p in self.paths if not _still_holds(self.rows.get(p), p, settings, o.timeout_s)]
        self.kept = len(self.paths) - len(todo)
        shared = Shared(self.config, self.geometry, o.decode, self.repairs)
        with closing(self._work("scan", [Job(p, limit_s=o.timeout_s) for p in todo], shared)) as found:
            for job, outcome in found:
                self.rows.append({**_scanned(job, outcome), "settings": settings})
        if o.fix is None:
            return
        drop_stale(o.fix, f"{_SCRATCH}*")
        with writing(o.fix):
            scratch = tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=o.fix)
        with scratch:
            jobs = []
            for row in self.rows.ordered(self.paths):
                wanted = self._repair_job(row)
                if row.get("fix_settings") == fix_settings and _fix_still_holds(row, wanted):
                    continue
                if wanted is None:
                    none = {"fix": "none", "fixed": "", "fix_reason": "", "fix_settings": fix_settings}
                    self.rows.append({**_scan_part(row), **none})
                else:
                    jobs.append(wanted)
            shared = Shared(self.config, self.geometry, o.decode, self.repairs, str(o.fix), scratch.name)
            with closing(self._work("fix", jobs, shared)) as found:
                for job, outcome in found:
                    scanned = _scan_part(self.rows.get(job.path) or {})
                    self.rows.append({**scanned, **_repaired(job, outcome), "fix_settings": fix_settings})

    def _work(self, name: str, jobs: Sequence[Job], shared: Shared) -> Generator[tuple[Job, Outcome], None, None]:
        from tempo_fast.runtime.progress import progress
        from tempo_fast.scan.row import work

        workers = min(self.options.workers or _cores(), len(jobs))
        with progress(len(jobs), name, "video") as bar:
            found = run_isolated(
                work, jobs, workers=workers, timeout=lambda job: job.limit_s, shared=shared, check=self.check
            )
            with closing(found):
                for job, outcome in found:
                    yield job, outcome
                    bar.update(1)

    def _repair_job(self, row: Row) -> Job | None:
        from tempo_fast.scan.row import Job
        from tempo_fast.video.repair import why_repair

        limit = self.options.timeout_s
        why = why_repair(row["edit_list"], row["longest_gop"], self.repairs) if "longest_gop" in row else ""
        if row["ok"] or row.get("failure") == "timeout":
            # re-encoding is slower than real time on one core
            return Job(row["video"], True, why, limit + 20 * row["duration_s"]) if why else None
        if row.get("failure") or "size_bytes" not in row:
            return None
        return Job(row["video"], True, "", limit + 20 * row["duration_s"] if "duration_s" in row else 10 * limit)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _scan_part(row: Row) -> Row:
    """A row without what was found by trying to repair the file."""
    return {k: v for k, v in row.items() if not k.startswith("fix")}


def _again(failure: str, had_s: float, have_s: float) -> bool:
    """Whether to try again what failed with so many seconds: for another reason than the file's bytes, and after a
    timeout when there is more time."""
    return have_s > had_s if failure == "timeout" else failure in _RETRIED


def _still_holds(row: Row | None, path: str, settings: str, timeout_s: float) -> bool:
    """Whether a row of an earlier scan is about the file as it is now."""
    if row is None or row["settings"] != settings:
        return False
    if _again(row.get("failure", ""), row.get("timeout_s", 0.0), timeout_s):
        return False
    try:
        stat = os.stat(path)
    except OSError:
        return False
    return (row.get("size_bytes"), row.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)


def _fix_still_holds(row: Row, wanted: Job | None) -> bool:
    """Whether what an earlier scan made of a file, or failed to make, is what there is to have."""
    if row["fixed"] and not os.path.exists(row["fixed"]):
        return False
    limit = wanted.limit_s if wanted else 0.0
    return not _again(row.get("fix_failure", ""), row.get("fix_timeout_s", 0.0), limit)


def _scanned(job: Job, outcome: Outcome) -> Row:
    if not outcome.failure:
        row: Row = outcome.value
        return row
    row = outcome.value or {"video": job.path, "ok": False}
    try:
        stat = os.stat(job.path)
        row |= {"size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    except OSError:
        pass
    row |= {"reason": _failed(job, outcome), "failure": outcome.failure}
    return row | ({"timeout_s": job.limit_s} if outcome.failure == "timeout" else {})


def _repaired(job: Job, outcome: Outcome) -> Row:
    if not outcome.failure:
        made: Row = outcome.value
        return made
    reason = f"{job.why or 'is damaged'}; its repair {_failed(job, outcome)}"
    row = {"fix": "none", "fixed": "", "fix_reason": reason, "fix_failure": outcome.failure}
    return row | ({"fix_timeout_s": job.limit_s} if outcome.failure == "timeout" else {})


def _failed(job: Job, outcome: Outcome) -> str:
    """What kept a job from returning. Raises InputError for what is wrong with more than this one file."""
    if isinstance(outcome.error, InputError):
        raise outcome.error
    if outcome.error is not None:
        log.debug("%s: %s", job.path, outcome.error.__cause__)
        return f"failed ({outcome.error})"
    if outcome.failure == "timeout":
        return f"took longer than {job.limit_s:g} s"
    return f"crashed the process ({how_ended(outcome.exitcode)})"


def _check_target(option: str, target: Path, others: Iterable[str | Path]) -> None:
    """Raises InputError where a file to write is one of those to read, or another one to write."""
    place = target.resolve()
    if any(Path(other).resolve() == place for other in others):
        raise InputError(f"{option}: {target} is one of the other files of this scan and would be overwritten")


def _check_folder(folder: Path, videos: str, paths: Sequence[str]) -> None:
    """Raises InputError where copies would lie among the originals, or cannot be written."""
    from tempo_fast.video.repair import possible_names

    inside = folder.resolve()
    if reaches(videos, folder, {copy for path in paths for copy in possible_names(path)}):
        raise InputError(f"--fix: {folder} is reached by {videos}, whose next scan would take the copies for originals")
    if any(Path(p).resolve().is_relative_to(inside) for p in paths):
        raise InputError(f"--fix: {folder} holds some of the videos to scan; copies need a folder of their own")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise InputError(f"--fix: {folder} cannot be written ({e.strerror})") from e


def _write_list(path: Path, rows: Iterable[Row]) -> None:
    """What to train on: the copy of a file that has one, else the file where it can be read."""
    names = [os.path.abspath(r["fixed"] or r["video"]) for r in rows if r["fixed"] or r["ok"]]
    write_atomic(path, lambda f: f.write("".join(f"{name}\n" for name in names).encode()))


def _settings(recipe: str, overrides: Sequence[str]) -> tuple[VideoConfig, VideoGeometry, str, int]:
    """Configuration, geometry, the family whose geometry it is, and the most tokens of a row in training."""
    from tempo_fast.models.family import CLIP_MEAN, CLIP_STD, VideoGeometry

    qwen2_vl = VideoGeometry(patch=14, merge=2, temporal=2, mean=CLIP_MEAN, std=CLIP_STD)
    if not recipe and not overrides:
        return VideoConfig(), qwen2_vl, "qwen2_vl", TrainConfig().max_tokens
    from tempo_fast.configio import load_config
    from tempo_fast.models.load import load_family, resolve_path

    config = load_config(recipe or "temple", overrides)
    try:
        folder = resolve_path(config.model.path)
    except InputError:
        return config.video, qwen2_vl, "qwen2_vl", config.train.max_tokens
    family, hf_config = load_family(folder)
    geometry: Any = family.geometry(hf_config)
    return config.video, geometry, family.name, config.train.max_tokens
