"""A pool on a real Ray, started here: results, errors, a worker that dies, and pairs equal to those made without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

from tempo_fast.errors import InputError  # noqa: E402
from tempo_fast.runtime.ray_pool import map_on_ray  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    mark = tmp_path_factory.mktemp("ray") / "mark"
    paths = os.pathsep.join(map(str, (Path(__file__).parent, ROOT, ROOT / "kernels")))
    env = {"PYTHONPATH": paths, "RAY_TEST_MARK": str(mark)}
    context = ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": env}
    )
    yield context.address_info["address"]
    ray.shutdown()


def squares(shared, jobs, **how):
    import importlib.util

    spec = importlib.util.spec_from_file_location("ray_jobs", Path(__file__).with_name("ray_jobs.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["ray_jobs"] = module
    spec.loader.exec_module(module)
    return dict(map_on_ray(module.make, shared, jobs, **{"workers": 2, "cpus": 1, "gpus": 0, **how}))


def test_results_errors_and_a_worker_that_dies(cluster):
    got = squares("", range(40))
    assert {job: value[0] for job, value in got.items()} == {i: i**2 for i in range(40)}
    assert os.getpid() not in {value[1] for value in got.values()}
    assert max(value[2] for value in got.values()) > 1  # a worker is made once, not for each job
    assert squares("", []) == {}
    with pytest.raises(InputError, match="^job -7 is bad$"):
        squares("", [1, 2, -7])
    with pytest.raises(InputError, match="^model.path: nothing there$"):
        squares("no model", [1, 2])
    with pytest.raises(InputError, match="a worker wants 1 GPU and the cluster has 0"):
        squares("", [1], gpus=1)
    assert {job: value[0] for job, value in squares("dies once", range(6)).items()} == {i: i**2 for i in range(6)}


def test_clips_and_pairs_of_a_run_are_the_same_bytes(cluster, tmp_path):
    small = ["--data.tinyworld.train", "3", "--data.tinyworld.heldout", "1", "--pairs.bucket_videos", "1"]

    def run(*words):
        command = [sys.executable, "-m", "tempo_fast", *words, *small, "--model.threads", "1"]
        env = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    run("run", "tinyworld", "--until", "pairs", "--output_dir", "here")
    made = {p.name: p.read_bytes() for p in (tmp_path / "here" / "pairs").glob("*.json*")}
    assert len(made) == 5
    clips = (tmp_path / "here" / "curate" / "clips.jsonl").read_bytes()
    for folder in ("pairs", "curate", "state"):
        shutil.rmtree(tmp_path / "here" / folder)
    on_ray = ["--ray.pairs_workers", "2", "--ray.pairs_gpus", "0", "--ray.pairs_cpus", "1", "--ray.curate_workers", "2"]
    run("run", "tinyworld", "--until", "pairs", "--output_dir", "here", *on_ray)
    assert (tmp_path / "here" / "curate" / "clips.jsonl").read_bytes() == clips
    assert {p.name: p.read_bytes() for p in (tmp_path / "here" / "pairs").glob("*.json*")} == made
