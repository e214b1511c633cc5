"""A small training job on real files, started as a process the way a user starts it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tempo_fast.files import write_jsonl

RECIPE = """
output_dir: {out}
model: {{path: {model}, dtype: float32, device: cpu, threads: 1}}
data: {{videos: {data}/videos, sft: {data}/sft.jsonl}}
video: {{backend: pyav, fps: 2, max_pixels: 3136}}
reference: {{kl: always}}
pairs: {{r: [4, 2]}}
train:
  stages: [{{r: 4}}, {{r: 2}}]
  learning_rate: 1e-3
  batch_size: 2
  lora: {{r: 4, alpha: 8, dropout: 0.0}}
  gradient_checkpointing: false
  max_tokens: 4096
  save_steps: 1
  sft: {{batch_size: 2, vision_lora: false, control: false, learning_rate: 1e-3}}
"""


@pytest.fixture(scope="session")
def job_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three films with pairs at two difficulties, a different number of answers each, and SFT exchanges."""
    from tempo_fast.tinyworld.generate import generate_world

    out = tmp_path_factory.mktemp("data")
    generate_world(out, seed=6, n_train=3, n_heldout=0)
    films = sorted((out / "videos").glob("*.mp4"))
    for r in (4, 2):
        rows = []
        for i, film in enumerate(films):
            rejected = [{"text": f"It moves {r} right {k}.", "kind": "drop", "r": r} for k in range(1 + i % 2)]
            rows.append(
                {"id": f"f{i}", "video": str(film), "prompt": "Describe.", "chosen": f"A circle grows. {i}."}
                | {"rejected": rejected, "r": r}
            )
        write_jsonl(out / "pairs" / f"r{r}.jsonl", rows)
    told = [(f"s{i}", str(film), f"It moves {i}.") for i, film in enumerate(films)]
    exchanges = [{"id": i, "video": v, "prompt": "What happens?", "response": a} for i, v, a in told]
    write_jsonl(out / "sft.jsonl", exchanges)
    return out


@pytest.fixture
def start_job(job_data: Path, tiny_path: str) -> Callable[..., subprocess.Popen]:
    """start_job(folder, *flags, ranks=1): the command ``train`` on the job, its pairs already in the folder."""

    def start(out: Path, *flags: str, ranks: int = 1) -> subprocess.Popen:
        (out / "pairs").mkdir(parents=True, exist_ok=True)
        for r in (4, 2):
            (out / "pairs" / f"r{r}.jsonl").write_text((job_data / "pairs" / f"r{r}.jsonl").read_text())
        recipe = out / "recipe.yaml"
        recipe.write_text(RECIPE.format(out=out, model=tiny_path, data=job_data))
        words = [sys.executable, "-m"]
        if ranks > 1:
            words += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*words, "tempo_fast", "train", str(recipe), *flags], env=environment, stderr=subprocess.PIPE, text=True
        )

    return start
