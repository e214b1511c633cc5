"""The SLURM scripts, with stand-ins for what a cluster has: signals, exit codes, requeueing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "docs" / "slurm"

# a rank: ends with $CODE when it is told to stop, or by itself with $END after a moment
RANK = """#!/bin/bash
echo "$@" >> {folder}/ranks
trap 'sleep 0.2; exit $CODE' TERM
echo up > {folder}/up
[ -n "${{END:-}}" ] && exit "$END"
while :; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder of commands: ``srun`` runs its words, ``torchrun`` and ``tempo-fast`` are RANK, ``scontrol`` notes."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {
        "srun": '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n',
        "torchrun": RANK.format(folder=tmp_path),
        "tempo-fast": RANK.format(folder=tmp_path),
        "scontrol": f'#!/bin/bash\n[ "$1" = show ] && echo node7 && exit\necho "$@" >> {tmp_path}/scontrol\n',
    }.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return tmp_path


def start(cluster: Path, script: str, *words: str, **variables: str) -> subprocess.Popen[bytes]:
    env = {
        **os.environ, "PATH": f"{cluster / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32",
        "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3", "CODE": "75", **variables,
    }  # fmt: skip
    return subprocess.Popen(["bash", str(SCRIPTS / script), *words], env=env, stderr=subprocess.PIPE)


def asked(cluster: Path) -> list[str]:
    path = cluster / "scontrol"
    return path.read_text().splitlines() if path.is_file() else []


def up(cluster: Path) -> None:
    stop = time.monotonic() + 30
    while not (cluster / "up").is_file():
        assert time.monotonic() < stop
        time.sleep(0.01)


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.sbatch")))
def test_scripts_are_bash(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)]).returncode == 0
    text = (SCRIPTS / script).read_text()
    assert "#SBATCH --requeue" in text
    first = [line for line in text.splitlines() if line and not line.startswith("#")][0]
    assert all(text.index(line) < text.index(first) for line in text.splitlines() if line.startswith("#SBATCH"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("code", ["75", "1"])
def test_a_signal_stops_the_ranks_and_requeues(cluster: Path, number: int, code: str) -> None:
    """75 from srun's own tasks, 1 from torchrun: either way the job goes on later."""
    job = start(cluster, "train.sbatch", "mine.yaml", "--train.batch_size", "32", CODE=code)
    up(cluster)
    job.send_signal(number)
    assert job.wait(30) == 75
    assert asked(cluster) == ["requeue 41"]
    line = (cluster / "ranks").read_text()
    assert "--nnodes 2 --nproc-per-node 4" in line
    assert "--rdzv-endpoint node7:29500" in line
    assert line.rstrip().endswith("-m tempo_fast run mine.yaml --train.batch_size 32")


def test_a_second_signal_does_not_cut_saving_short(cluster: Path) -> None:
    job = start(cluster, "train.sbatch", "mine.yaml")
    up(cluster)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        job.send_signal(number)
        time.sleep(0.05)
    assert job.wait(30) == 75
    assert asked(cluster) == ["requeue 41"]


@pytest.mark.parametrize("end", ["0", "1", "2"])
def test_other_ends_are_the_jobs_own(cluster: Path, end: str) -> None:
    job = start(cluster, "train.sbatch", "mine.yaml", END=end)
    assert job.wait(30) == int(end)
    assert asked(cluster) == []


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05])
@pytest.mark.parametrize("script", ["train.sbatch", "pairs-array.sbatch"])
def test_a_signal_at_any_moment_of_the_start_ends_the_job(cluster: Path, script: str, delay: float) -> None:
    """Before the trap is set it ends the script, before the step has a number it is handed on later."""
    job = start(cluster, script, *(["curate"] if "array" in script else []), "mine.yaml", CODE="75")
    time.sleep(delay)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) != 0
    assert not asked(cluster) or asked(cluster)[0].startswith("requeue 41")


def test_75_without_a_signal_requeues(cluster: Path) -> None:
    """The cluster may signal the tasks alone."""
    job = start(cluster, "train.sbatch", "mine.yaml", END="75")
    assert job.wait(30) == 75
    assert asked(cluster) == ["requeue 41"]


def test_a_task_of_the_array(cluster: Path) -> None:
    job = start(cluster, "pairs-array.sbatch", "pairs", "mine.yaml")
    up(cluster)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75
    assert asked(cluster) == ["requeue 41_3"]
    assert (cluster / "ranks").read_text() == "pairs mine.yaml\n"
    done = start(cluster, "pairs-array.sbatch", "curate", "mine.yaml", END="0")
    assert done.wait(30) == 0
    assert asked(cluster) == ["requeue 41_3"]


@pytest.mark.parametrize("words", [(), ("train", "mine.yaml")])
def test_usage(cluster: Path, words: tuple[str, ...]) -> None:
    job = start(cluster, "pairs-array.sbatch", *words)
    assert job.wait(30) == 2
    assert b"usage: sbatch pairs-array.sbatch" in job.stderr.read()  # type: ignore[union-attr]
