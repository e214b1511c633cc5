"""A pool of workers on a Ray cluster, through Ray Data: actors that are made once and then fed."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tempo_fast.errors import InputError

log = logging.getLogger(__name__)

_MOST_BLOCKS = 2048


def map_on_ray(
    make: Callable[[Any], Callable[[Any], Any]],
    shared: Any,
    jobs: Iterable[Any],
    *,
    workers: int,
    cpus: float,
    gpus: float,
    address: str = "",
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, result) as jobs finish, in no particular order.

    Args:
        make: called once per actor as ``make(shared)``; gives the function that is called with each job. Importable by
            name. What it returns must depend on nothing but the job: Ray asks again where an actor died.
        shared: picklable.
        jobs: picklable.
        workers: actors.
        cpus: CPU cores that an actor reserves.
        gpus: GPUs that an actor reserves; fractions share one.
        address: of the cluster, as ``ray.init`` takes it; empty joins the one of RAY_ADDRESS or starts one here.

    Raises:
        InputError: Ray is not installed, the cluster cannot be reached or has not the room for one actor, or a job
            raised it.
    """
    try:
        import ray
        import ray.data
    except ImportError as e:
        raise InputError(f"ray: is not installed ({e}); pip install 'tempo-fast[ray]'") from e
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address or None, log_to_driver=False, logging_level=logging.ERROR, **_local(address))
        except (ConnectionError, ValueError, RuntimeError) as e:
            raise InputError(f"ray.address: no cluster at {address or 'this machine'} ({_line(e)})") from e
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    _room(ray.cluster_resources(), cpus, gpus)
    try:
        rows = [{"job": pickle.dumps(job)} for job in jobs]
        if rows:
            # small blocks: what is finished is seen soon, and workers end together
            blocks = max(1, min(len(rows), _MOST_BLOCKS))
            done = ray.data.from_items(rows, override_num_blocks=blocks).map(
                _actor(make, shared),
                concurrency=(1, max(1, min(workers, len(rows)))),
                num_cpus=cpus,
                num_gpus=gpus or None,
            )
            for row in done.iter_rows():
                failed, value = pickle.loads(row["result"])
                if failed:
                    raise value
                yield pickle.loads(row["job"]), value
    finally:
        if started:
            ray.shutdown()


def _actor(make: Callable[[Any], Callable[[Any], Any]], shared: Any) -> Any:
    """The class whose objects Ray Data keeps. It carries what it needs: an actor that is made again elsewhere must not
    look for arguments that are gone."""

    class Actor:
        def __init__(self) -> None:
            self.work: Callable[[Any], Any] | None = None

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            try:
                if self.work is None:  # here, where an error reaches the driver as it is
                    self.work = make(shared)
                result = False, self.work(pickle.loads(row["job"]))
            except InputError as e:
                result = True, InputError(str(e))
            return {"job": row["job"], "result": pickle.dumps(result)}

    return Actor


def _local(address: str) -> dict[str, Any]:
    import os

    return {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}


def _room(has: dict[str, float], cpus: float, gpus: float) -> None:
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if wanted > has.get(name, 0.0):
            raise InputError(f"ray: a worker wants {wanted:g} {name} and the cluster has {has.get(name, 0.0):g}")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
