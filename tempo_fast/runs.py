"""What a run has done so far: its steps with their inputs and outputs, what they share, and the summary."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tempo_fast import __version__
from tempo_fast.config import RunConfig
from tempo_fast.errors import InputError
from tempo_fast.files import digest, read_json, write_json
from tempo_fast.runtime.shards import this_shard

log = logging.getLogger("tempo_fast")

STEPS = ("curate", "pairs", "reference", "train", "eval", "report")
SHARED = ("curate", "pairs")
"""Steps that several processes share without talking to one another (runtime.shards)."""
_POLL_S = 1.0


class Unfinished(Exception):
    """This process's part of a shared step is done, and other processes' parts are not. Nothing is wrong."""


@dataclass
class Run:
    """A config with what its steps share: the model, the reader, the feature cache, each made when first needed."""

    config: RunConfig
    rank: int = 0
    stopped: int = 0
    """Exit code of a signal that came while a step could not stop."""
    _last: Any = None

    def __post_init__(self) -> None:
        self.config.validate()
        self.out = Path(self.config.output_dir)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise InputError(f"output_dir: {self.out} cannot be made ({e.strerror})") from e
        if not os.access(self.out, os.W_OK):
            raise InputError(f"output_dir: {self.out} is not writable")
        if self.config.model.threads:
            import torch

            torch.set_num_threads(self.config.model.threads)

    @cached_property
    def light(self) -> Any:
        """The base without its weights: geometry, tokenizer, family."""
        from tempo_fast.models.load import load_bundle

        m = self.config.model
        return load_bundle(m.path, m.dtype, m.device, weights=False)

    def loaded(self, path: str) -> Any:
        """A frozen model, kept until another is asked for: models that share a base share its visual features."""
        from tempo_fast.models.load import load_bundle, resolve_path

        path = str(resolve_path(path))
        if self._last is None or self._last.path != path:
            self._last = None
            m = self.config.model
            self._last = load_bundle(path, m.dtype, m.device)
        return self._last

    def forget(self) -> None:
        """Drop the model that is kept: training loads its own."""
        self._last = None

    @cached_property
    def model_digest(self) -> str:
        from tempo_fast.models.load import checkpoint_digest

        return checkpoint_digest(self.config.model.path)

    @cached_property
    def reader(self) -> Any:
        from tempo_fast.video.reader import VideoReader

        light = self.light
        return VideoReader(
            self.config.video, light.geometry, light.device, self.config.loader.timeout_s, dtype=light.dtype
        )

    @cached_property
    def features(self) -> Any:
        from tempo_fast.trees.feature_store import FeatureStore
        from tempo_fast.trees.vision import FeatureCache

        f = self.config.features
        store = FeatureStore(f.disk, int(f.disk_gib * 2**30), f.disk_dtype) if f.disk else None
        return FeatureCache(int(f.memory_gib * 2**30), store, batched=f.batched)

    @cached_property
    def data(self) -> Any:
        """Paths of the data, with the generated world where it was asked for."""
        data = self.config.data
        if data.videos != "tinyworld":
            return data
        from tempo_fast.runtime.progress import progress
        from tempo_fast.tinyworld.generate import generate_world

        world, size = self.out / "world", data.tinyworld
        made = _state(self.out / "state" / "world.json")
        if not made and this_shard().count > int(os.environ.get("WORLD_SIZE", "1")):
            raise InputError("data.videos: one process generates tinyworld; run the command once without the array")

        def work() -> dict[str, Any]:
            bar = lambda jobs: progress(jobs, desc="world", unit="video")  # noqa: E731
            made = generate_world(world, seed=size.seed, n_train=size.train, n_heldout=size.heldout, progress=bar)
            return {"digest": made["digest"]}

        self.step("world", size, work)
        return dataclasses.replace(
            data,
            videos=str(world / "videos" / "train_*.mp4"),
            sft=data.sft or str(world / "sft.jsonl"),
            eval_truth=data.eval_truth or str(world / "truth.jsonl"),
            eval_questions=data.eval_questions or str(world / "questions.jsonl"),
        )

    def step(
        self,
        name: str,
        inputs: Any,
        work: Callable[[], dict[str, Any]],
        *,
        outputs: Callable[[], list[Path]] = list,
        collective: bool = False,
    ) -> dict[str, Any]:
        """Run ``work`` unless it was done with the same inputs and its outputs are still there.

        The result is kept in ``state/<name>.json``, which is removed while the work goes on: what a failed or stopped
        step leaves never counts as done. With several ranks all of them run a ``collective`` step; the first one runs
        the others. In both, the rest go on when its result is on disk. (A file is waited for, not a process group:
        captions can take longer than any timeout.) A result with "again": True (left out of what is kept) is not
        skipped by the next run: something failed that may go well another time.
        """
        path = self.out / "state" / f"{name}.json"
        key = digest([__version__, name, inputs])
        state = _state(path)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        # ranks do not repeat it: a quick one could take the old result before the first has removed it
        again = state.get("again", False) and world == 1
        if state.get("inputs") == key and not again and all(
            (self.out / file).is_file() and (self.out / file).stat().st_size == size
            for file, size in state["outputs"].items()
        ):
            log.info("%s: inputs unchanged, skipped", name)
            return state["result"]
        if self.rank > 0 and not collective:
            return self._wait(path, key)
        if self.rank == 0:
            path.unlink(missing_ok=True)
        begin = time.perf_counter()
        try:
            result = work()
        except Unfinished:
            if not self.rank:
                raise
        if self.rank > 0:
            return self._wait(path, key)
        sizes = {os.path.relpath(f, self.out): f.stat().st_size for f in outputs() if f.is_file()}
        seconds = time.perf_counter() - begin
        again = result.pop("again", False)
        if again and world > 1:
            log.info("%s: some failures are worth another try: run this step again without torchrun", name)
        state = {"inputs": key, "seconds": seconds, "outputs": sizes, "again": again, "result": result}
        write_json(path, state)
        return result

    def await_shards(self, name: str, missing: Callable[[], list[str]]) -> None:
        """Return when nothing of a shared step is missing, in the process that has the rest to do.

        Under ``torchrun`` the first rank waits for the others, which go on to wait for the step's result. Other
        launchers' processes may start hours apart: the one that ends last goes on.

        Raises:
            Unfinished: it is not this process that goes on.
        """
        shard = this_shard()
        if self.rank > 0:
            raise Unfinished(f"{name}: part {shard.index} of {shard.count} is done")
        left = missing()
        together = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if left and not together:
            raise Unfinished(
                f"{name}: part {shard.index} of {shard.count} is done, {len(left)} pieces of others are not; "
                "the process that ends last, or the same command later, puts them together"
            )
        if left:
            log.info("%s: waiting for %d pieces of other ranks", name, len(left))
        while left:
            time.sleep(_POLL_S)
            left = missing()

    def _wait(self, path: Path, key: str) -> dict[str, Any]:
        """The first rank's result. (A rank that fails takes the job down: the launcher ends the others.)"""
        state: dict[str, Any] = {}
        while state.get("inputs") != key:
            time.sleep(0.5)
            state = _state(path)
        return state["result"]


def _state(path: Path) -> dict[str, Any]:
    """A step's state, empty where there is none: another process may take the file away at any moment."""
    try:
        return read_json(path)
    except InputError:
        if path.is_file():
            raise
        return {}


def summarize(run: Run) -> dict[str, Any]:
    """What ``summary.json`` holds, from the steps done so far."""
    states: dict[str, Any] = {}
    for name in ("world", *STEPS):
        if state := _state(run.out / "state" / f"{name}.json"):
            states[name] = state
    results = {name: state["result"] for name, state in states.items()}
    curated, built, trained = (results.get(n, {}) for n in ("curate", "pairs", "train"))
    timings = {name: round(state["seconds"], 3) for name, state in states.items()}
    timings["total"] = round(sum(timings.values()), 3)
    # reference and train meet the same videos
    found = [q for r in results.values() for q in r.get("quarantined", [])]
    quarantined = list({q["video"]: q for q in found}.values())
    return {
        "version": __version__,
        "config_digest": digest(run.config),
        "model": {"path": run.config.model.path, "weights": run.model_digest, "dtype": run.config.model.dtype},
        "counts": {
            "videos": curated.get("videos", built.get("videos", 0)),
            "usable": curated.get("usable", built.get("videos", 0)),
            "filtered": len(curated.get("filtered", [])),
            "quarantined": len(quarantined),
            "records": built.get("records", 0),
            "pairs": built.get("pairs", 0),
        },
        "stages": [_without_identity(s) for s in trained.get("stages", [])],
        "sft": _without_identity(trained.get("sft")),
        "control": _without_identity(trained.get("control")),
        "merged": trained.get("merged", ""),
        "lmms_eval": _lmms_eval(run, trained.get("merged", "")),
        "eval": results.get("eval", {}).get("rows", []),
        "timings_s": timings,
        "quarantined": quarantined,
        "filtered": curated.get("filtered", []),
    }


def _lmms_eval(run: Run, merged: str) -> str:
    """The command that runs public benchmarks on the trained model, with this run's limits, or a comment that says why
    there is none; it is not run here."""
    if not merged:
        return ""
    from tempo_fast.evaluation import lmms_eval_command

    try:
        return lmms_eval_command(merged, run.config.video, model_type=run.light.config.model_type)
    except InputError as e:
        return f"# {e}"


def _without_identity(row: dict[str, Any] | None) -> dict[str, Any] | None:
    return row and {k: v for k, v in row.items() if k != "identity"}
