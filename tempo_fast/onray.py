"""Steps of a run whose work is done by a pool of workers on a Ray cluster.

All machines see the run's folder and the videos under the same paths. What is finished is on disk, as without Ray: a
run that was stopped goes on, with Ray or without.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterable
from typing import Any

from tempo_fast.config import RunConfig
from tempo_fast.curate.work import Job, Shared, curate_file
from tempo_fast.runtime.pool import Outcome, run_isolated
from tempo_fast.runtime.progress import progress
from tempo_fast.runtime.ray_pool import map_on_ray


def pairs_on_ray(config: RunConfig, sizes: dict[int, int]) -> str:
    """Work on buckets of pairs.

    Args:
        config: the run's.
        sizes: videos by number of a bucket, in the order of ``Parts.buckets``.

    Returns:
        ``Parts.settings``, by which the parts are recognised.
    """
    ray, settings = config.ray, ""
    bar = progress(sum(sizes.values()), "pairs", "video")
    try:
        for number, found in map_on_ray(
            _pairs_worker,
            (config, os.getcwd()),
            sizes,
            workers=ray.pairs_workers,
            cpus=ray.pairs_cpus,
            gpus=ray.pairs_gpus,
            address=ray.address,
        ):
            settings = found
            bar.update(sizes[number])
    finally:
        bar.close()
    return settings


_FILES = 16  # curated by one isolated process, which loads its networks once
CurateWork = tuple[Shared, float, str]


def curate_pool(config: RunConfig) -> Any:
    """What ``curate.folder.CurateJob`` takes as ``pool``."""
    ray, limit_s = config.ray, config.curate.timeout_s

    def pool(jobs: Iterable[Job], shared: Shared) -> Generator[tuple[Job, Outcome], None, None]:
        shared = dataclasses.replace(shared, threads=max(1, int(ray.curate_cpus)))
        rest = iter(jobs)
        some = iter(lambda: list(itertools.islice(rest, _FILES)), [])
        done = map_on_ray(
            _curate_worker,
            (shared, limit_s, os.getcwd()),
            some,
            workers=ray.curate_workers,
            cpus=ray.curate_cpus,
            gpus=ray.curate_gpus,
            address=ray.address,
        )
        for _, outcomes in done:
            yield from outcomes

    return pool


def _curate_worker(shared: CurateWork) -> Callable[[list[Job]], list[tuple[Job, Outcome]]]:
    settings, limit_s, folder = shared
    os.chdir(folder)

    def work(jobs: list[Job]) -> list[tuple[Job, Outcome]]:
        # isolated here, too: a file that crashes its process is named, and does not take Ray's worker along
        return list(run_isolated(curate_file, jobs, workers=1, timeout=lambda job: limit_s, shared=settings))

    return work


def _pairs_worker(shared: tuple[RunConfig, str]) -> Callable[[int], str]:
    from tempo_fast.jobs import pairs_job
    from tempo_fast.runs import Run

    config, folder = shared
    os.chdir(folder)  # paths of a recipe are relative to where it was started
    job = pairs_job(Run(config))

    def work(number: int) -> str:
        job.work(job.parts.buckets[number])
        return job.parts.settings

    return work
