"""Steps of a run whose work is done by a pool of workers on a Ray cluster.

All machines see the run's folder and the videos under the same paths. What is finished is on disk, as without Ray: a
run that was stopped goes on, with Ray or without.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tempo_fast.config import RunConfig
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
