"""``python -m bench uneven``: several ranks train on records as unequal as they come.

Answers of 1 to 400 tokens, one to three rejected ones a record, videos of 2 to 64 frames in four sizes, and records
without a video; a model of random weights trains through ``training.loop.run_stage`` under ``torchrun`` and ZeRO. Each
case runs with the vision tower frozen (a rank encodes its own videos when it meets them) or training (every rank calls
it once per micro-batch). What is measured:

- ``hangs``: a case that takes longer than ``--timeout`` is ended, and is an error;
- ``over_run``, ``over_step``, ``over_p95``: tokens of the fullest rank over the mean of all, minus 1: of the whole
  run, and the median and 95th percentile over its steps. What is repeated at weight 0, so that all ranks take equally
  many micro-batches, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.measure import environment, table, write

Row = dict[str, Any]
COLUMNS = (
    "case",
    "ranks",
    "steps",
    "tokens",
    "over_run",
    "over_step",
    "over_p95",
    "loss_first",
    "loss_last",
    "seconds",
)
CASES = {
    "zero2-frozen": (2, False),
    "zero2-vision": (2, True),
    "zero3-frozen": (3, False),
    "zero3-vision": (3, True),
}
MOST_OVER = 0.05
_SIZES = ((2, 4), (4, 4), (4, 6), (6, 6))  # patches in height and width
_BUDGET = 4096
_PAIRS = 16


def make_records(bundle: Any, count: int, seed: int = 0) -> list[Any]:
    """Records of random tokens, from 1 answer of 1 token and no video to 4 answers of 400 and 64 frames."""
    import random

    from bench.steps.shapes import Video
    from tempo_fast.models.family import Grid
    from tempo_fast.training.item import Item
    from tempo_fast.trees.layout import Branch, ResponseTree, prompt_of

    rng = random.Random(seed)
    words = range(200, 600)
    ends = [(1, 64), (400, 64), (1, 2), (400, 2), (1, 0), (400, 0)]
    out = []
    for i in range(count):
        longest, frames = ends[i] if i < len(ends) else (400, rng.choice([0, *range(2, 65)]))
        h, w = rng.choice(_SIZES)
        grids = [Grid(-(-frames // 2), h, w)] if frames else []
        videos = [Video(f"v{i}", grid) for grid in grids]
        prompt = prompt_of(bundle.family, bundle.tokenizer, bundle.config, "Describe what happens.", videos)
        answers = [[rng.choice(words) for _ in range(rng.randint(1, longest))] for _ in range(rng.randint(2, 4))]
        if i < len(ends):
            answers[0] = [rng.choice(words) for _ in range(longest)]
        tree = ResponseTree(str(i), prompt, [Branch.of(a) for a in answers], list(videos))
        out.append(Item(tree, ["drop", "shuffle", "reverse"][: len(answers) - 1], 4))
    return out


def work(zero: int, vision: bool, steps: int, out: Path) -> Row:
    """This rank's part of a case."""
    import torch

    torch.set_num_threads(1)
    from bench.steps.shapes import SHAPES, Reader, make_bundle
    from tempo_fast.config import LoaderConfig, LoraConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
    from tempo_fast.runtime.ranks import init_ranks
    from tempo_fast.runtime.signals import Stopper
    from tempo_fast.training.adapters import attach_lora
    from tempo_fast.training.data import micro_batches, plan_steps
    from tempo_fast.training.decodable import DecodeCheck
    from tempo_fast.training.loop import Context, Stage, run_stage
    from tempo_fast.trees.vision import FeatureCache

    train = TrainConfig(
        engine="deepspeed", zero_stage=zero, max_tokens=_BUDGET, batch_size=_PAIRS, save_steps=10**6,  # type: ignore[arg-type]
        gradient_checkpointing="none",
    )  # fmt: skip
    config = RunConfig(output_dir=str(out), model=ModelConfig(device="cpu", dtype="float32"), train=train)
    ranks = init_ranks(config)
    bundle, lora = make_bundle(SHAPES["micro"], "cpu", torch.float32), LoraConfig(4, 8, 0.0)
    if vision:
        bundle.model = bundle.model.unload()  # type: ignore[operator]
        attach_lora(bundle, lora, seed=0, vision=True)
    items = make_records(bundle, max(12, steps * 2))
    reader: Any = Reader(bundle.device, bundle.dtype)
    stage = Stage(
        name="uneven", r=4, objective=ObjectiveConfig("leanpo", {}), learning_rate=1e-3, epochs=64,
        batch_size=_PAIRS, lora=lora, base="random", base_digest="random", vision_lora=vision,
        max_steps=steps,
    )  # fmt: skip
    begun = time.perf_counter()
    with Stopper(ranks) as stopper:
        ctx = Context(
            train=train, seed=0, out=out, reader=reader, features=FeatureCache(0), ranks=ranks, stopper=stopper,
            checked=DecodeCheck(out / "decoded.jsonl", reader, ranks, [], lambda key: True, LoaderConfig()),
            loader=LoaderConfig(workers=0),
        )  # fmt: skip
        done = run_stage(stage, ctx, bundle, items, None)
    seconds = time.perf_counter() - begun
    plan = plan_steps([i.n_pairs for i in items], _PAIRS, 0, stage.name, stage.epochs)[:steps]
    mine = []
    for step in plan:
        rows, real = micro_batches(items, step, _BUDGET, ranks.rank, ranks.world)
        mine.append(sum(items[i].n_tokens for row in rows[:real] for i in row))
    every = list(zip(*ranks.all_gather_object(mine), strict=True))
    totals = [sum(tokens) for tokens in zip(*every, strict=True)]
    over = sorted(max(tokens) / mean(tokens) - 1 for tokens in every)
    return {
        "ranks": ranks.world, "steps": done["steps"], "tokens": sum(totals), "per_rank": totals, "seconds": seconds,
        "over_run": max(totals) / mean(totals) - 1, "over_step": median(over), "over_p95": over[int(0.95 * len(over))],
        "loss_first": done["loss_first"], "loss_last": done["loss_last"],
    }  # fmt: skip


def measure(name: str, steps: int, ranks: int, timeout: float) -> Row:
    """A case in processes of its own. Raises RuntimeError when it fails, or has not ended in time."""
    zero, vision = CASES[name]
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "bench.uneven"]
        words += ["--work", json.dumps([zero, vision, steps]), "--out", folder]
        path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        try:
            done = subprocess.run(
                [sys.executable, *words], capture_output=True, text=True, timeout=timeout, env=env, cwd=root
            )
        except subprocess.TimeoutExpired as e:
            raise RuntimeError(f"{name}: has not ended after {timeout:.0f} s") from e
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        row = json.loads((Path(folder) / "row.json").read_text())
    return {"case": name, "impl": "tempo_fast", "dtype": "float32", "shape": [_BUDGET], **row}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench uneven", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds after which a case counts as hanging")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.work:
        zero, vision, steps = json.loads(args.work)
        row = work(zero, vision, steps, args.out / "run")
        if os.environ.get("RANK", "0") == "0":
            (args.out / "row.json").write_text(json.dumps(row))
        return 0
    env, rows = environment(args.device), []
    for name in args.cases:
        rows.append(measure(name, args.steps, args.ranks, args.timeout))
        write(args.json, env, rows)
        print(table(rows[-1:], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows, COLUMNS))
    over = [row["case"] for row in rows if max(row["over_run"], row["over_step"]) > MOST_OVER]
    print(f"fullest rank within {MOST_OVER:.0%} of the mean: {len(rows) - len(over)} of {len(rows)} cases")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
