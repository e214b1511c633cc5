"""``python -m bench plan``: the memory that ``tempo-fast plan`` predicts, beside the peak of a real training.

Each case trains a model of random weights for a few steps through ``training.loop.run_stage``, in a process of its own
(two under ``torchrun`` where the case says so): the model is made, the reference filled, the steps run. Measured is the
highest sum of live bytes of torch's allocator, from the profiler's memory events; ``rss_mib``, the process's highest
resident size over that before the model was made, also holds libraries, the interpreter and the profiler's own events.
``ratio`` is predicted over measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.measure import environment, table, write

Row = dict[str, Any]
COLUMNS = (
    "case", "parameters", "trained", "tokens", "dtype", "checkpointing", "engine", "phase", "predicted_mib",
    "measured_mib", "ratio", "rss_mib",
)  # fmt: skip
MOST_OFF = 0.15


@dataclass(frozen=True)
class Case:
    """A model by its sizes, and what it trains on. ``grid``: patches of a video in time, height and width."""

    name: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    keys: int
    vocabulary: int
    vision: tuple[int, int, int]
    """Depth, width and heads of the tower."""
    grid: tuple[int, int, int]
    words: int
    """Prompt tokens that are not visual."""
    answer: int
    policy: str
    records: int = 4
    per_step: int = 1
    """Records of an optimizer step and rank."""
    max_tokens: int = 100_000
    rejected: int = 3
    rank: int = 16
    dropout: float = 0.05
    dtype: str = "float32"
    zero: int | None = None
    ranks: int = 1
    offload: bool = False
    tune: bool = False
    """The model itself trains, in its dtype."""
    objective: str = "dpo"
    """``sft`` trains on one answer a record, with adapters on the vision tower."""
    steps: int = 2

    @property
    def engine(self) -> str:
        zero = "torch" if self.zero is None else f"zero{self.zero}{'+offload' if self.offload else ''}"
        return f"{zero} x{self.ranks}"


_3M = Case("3m", 192, 512, 5, 6, 2, 2048, (3, 128, 4), (6, 12, 12), 60, 60, "full")
_30M = Case("30m", 512, 1536, 6, 8, 2, 12000, (4, 256, 4), (8, 16, 16), 60, 80, "none")
_150M = Case("150m", 1024, 2816, 10, 16, 4, 16000, (4, 384, 6), (6, 16, 20), 60, 100, "full")
_WIDE = replace(_30M, policy="full", rank=256, grid=(2, 12, 12))
_TUNE = replace(_30M, policy="full", grid=(2, 12, 12), tune=True)
CASES = {
    case.name: case
    for case in (
        *(replace(_3M, name=f"3m-{p}", policy=p) for p in ("none", "selective", "full")),
        *(replace(_30M, name=f"30m-{p}", policy=p) for p in ("none", "selective", "full")),
        *(replace(_150M, name=f"150m-{p}", policy=p) for p in ("none", "selective", "full")),
        replace(_30M, name="30m-bf16", policy="none", dtype="bfloat16"),
        replace(_30M, name="30m-bf16-full", policy="full", dtype="bfloat16"),
        replace(_30M, name="30m-no-dropout", dropout=0.0),
        replace(_30M, name="30m-packed", policy="full", per_step=4, steps=1),
        replace(_30M, name="30m-micros", per_step=4, steps=1, max_tokens=1100, policy="selective"),
        replace(_30M, name="30m-kl", objective="tdpo2", policy="full"),
        replace(_30M, name="30m-long", policy="full", grid=(8, 32, 32)),
        replace(_30M, name="30m-sft", objective="sft", rejected=0, policy="full"),
        replace(_30M, name="30m-sft-none", objective="sft", rejected=0),
        # what trains outweighs activations
        replace(_WIDE, name="30m-wide"),
        replace(_WIDE, name="30m-wide-zero0", zero=0, ranks=2),
        replace(_WIDE, name="30m-wide-zero2", zero=2, ranks=2),
        replace(_WIDE, name="30m-wide-zero3", zero=3, ranks=2),
        replace(_TUNE, name="30m-tune"),
        replace(_TUNE, name="30m-tune-bf16", dtype="bfloat16"),
        replace(_TUNE, name="30m-tune-zero2", zero=2, ranks=2),
        replace(_TUNE, name="30m-tune-zero3", zero=3, ranks=2),
        replace(_TUNE, name="30m-tune-zero2-bf16", zero=2, ranks=2, dtype="bfloat16"),
        replace(_TUNE, name="30m-tune-zero3-bf16", zero=3, ranks=2, dtype="bfloat16"),
    )
}
DEFAULT = ("3m-none", "3m-selective", "3m-full", "30m-none", "30m-selective", "30m-full", "150m-none", "150m-full")


# -- what is predicted ------------------------------------------------------------------------------------------------


def predict(case: Case) -> Row:
    """The plan of a case: phase, MiB and its parts."""
    from tempo_fast.plan.memory import Load, memory
    from tempo_fast.plan.setting import buckets, setting_of
    from tempo_fast.plan.states import trained_elements

    config, shape = run_config(case, Path("unused")), shape_of_case(case)
    setting = setting_of(config, cuda=False, world=case.ranks, sft=case.objective == "sft")
    t, h, w = case.grid
    visual, responses = t * h * w // 4, (1 + case.rejected) * case.answer
    one = visual + case.words + responses
    together = min(case.per_step, case.max_tokens // one)
    micros = -(-case.per_step // together)
    filled = 0 if case.objective == "sft" else min(-(-case.records // case.ranks), case.max_tokens // one)
    load = Load(
        tokens=together * one, responses=together * responses, visual=together * visual, patches=together * t * h * w,
        largest_video=t * h * w, micros=micros, videos=case.records if case.ranks == 1 else case.records // case.ranks,
        feature_bytes=visual * case.hidden * setting.size, fill_tokens=filled * one, fill_responses=filled * responses,
    )  # fmt: skip
    zero = buckets(config.train, trained_elements(shape, setting)) if setting.deepspeed else {}
    found = memory(shape, setting, load, zero, config.features, config.loader)
    return {
        "parameters": shape.total, "trained": trained_elements(shape, setting), "tokens": load.tokens,
        "phase": found.phase, "predicted_mib": found.device / 2**20,
        "parts": {name: value / 2**20 for name, value in found.parts.items()},
        "phases": {name: value / 2**20 for name, value in found.phases.items()},
    }  # fmt: skip


def shape_of_case(case: Case) -> Any:
    from bench.steps.shapes import make_config, make_tokenizer
    from tempo_fast.models import get_family
    from tempo_fast.plan.shapes import shape_of

    config = make_config(bench_shape(case), make_tokenizer())
    return shape_of(case.name, get_family(config.model_type), config)


def bench_shape(case: Case) -> Any:
    from bench.steps.shapes import Shape, _small
    from tempo_fast.config import LoraConfig
    from tempo_fast.models.family import Grid

    depth, width, heads = case.vision
    text = {
        "vocab_size": case.vocabulary, "hidden_size": case.hidden, "intermediate_size": case.mlp,
        "num_hidden_layers": case.layers, "num_attention_heads": case.heads, "num_key_value_heads": case.keys,
    }  # fmt: skip
    vision = {"depth": depth, "embed_dim": width, "num_heads": heads}
    t, h, w = case.grid
    return Shape(
        case.name, lambda ids: _small(ids, text, vision), Grid(t, h, w), t * h * w // 4 + case.words, case.answer,
        LoraConfig(r=case.rank, alpha=2 * case.rank, dropout=case.dropout),
    )  # fmt: skip


def run_config(case: Case, out: Path) -> Any:
    from tempo_fast.config import (
        LoaderConfig,
        LoraConfig,
        ModelConfig,
        ObjectiveConfig,
        RunConfig,
        StageConfig,
        TrainConfig,
    )

    train = TrainConfig(
        objective=ObjectiveConfig("dpo" if case.objective == "sft" else case.objective, {}),
        stages=[StageConfig(r=4)],
        lora=LoraConfig(case.rank, 2 * case.rank, case.dropout),
        gradient_checkpointing=case.policy,  # type: ignore[arg-type]
        batch_size=case.per_step * max(1, case.rejected) * case.ranks,
        max_tokens=case.max_tokens,
        engine="torch" if case.zero is None else "deepspeed",
        zero_stage=case.zero or 0,  # type: ignore[arg-type]
        offload_optimizer=case.offload,
        tune="full" if case.tune else "lora",
    )
    return RunConfig(
        output_dir=str(out),
        model=ModelConfig(dtype=case.dtype, device="cpu"),  # type: ignore[arg-type]
        loader=LoaderConfig(workers=0),
        train=train,
    )


# -- what is measured -------------------------------------------------------------------------------------------------


def work(case: Case, out: Path) -> Row:
    """One training in this process: MiB of live bytes at its highest, by the allocator and by the system."""
    import torch

    torch.set_num_threads(1)
    from bench.steps.shapes import make_items
    from tempo_fast.config import ObjectiveConfig
    from tempo_fast.reference.fill import fill
    from tempo_fast.reference.store import ReferenceStore
    from tempo_fast.runtime.ranks import init_ranks
    from tempo_fast.runtime.signals import Stopper
    from tempo_fast.training.decodable import DecodeCheck
    from tempo_fast.training.loop import Context, Stage, run_stage
    from tempo_fast.trees.vision import FeatureCache
    from tempo_kernels.objectives import make_objective

    config, shape = run_config(case, out), bench_shape(case)
    ranks = init_ranks(config)
    _warm_up()
    resident = _resident("VmRSS")
    _reset_resident()
    objective, sft = make_objective(case.objective), case.objective == "sft"
    stage = Stage(
        name="stage1_r4", r=4, objective=ObjectiveConfig(case.objective, {}), learning_rate=1e-4, epochs=1,
        batch_size=config.train.batch_size, lora=config.train.lora, base="random", base_digest="random",
        dtype=case.dtype, max_steps=case.steps, vision_lora=sft,
    )  # fmt: skip
    peaks: Row = {}
    # from before the model: the allocator's events leave out what is freed and was there before they began
    with Stopper(ranks) as stopper, _peak(peaks):
        bundle = _bundle(case)
        model = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(bundle)}
        items = make_items(shape, bundle, case.records, case.rejected)
        for item in items:
            item.kinds = ["sft"] if sft else item.kinds
        reader: Any = Noise(bundle.dtype)
        ctx = Context(
            train=config.train, seed=0, out=out, reader=reader,
            features=FeatureCache(int(config.features.memory_gib * 2**30)), ranks=ranks, stopper=stopper,
            checked=DecodeCheck(out / "decoded.jsonl", reader, ranks, [], lambda key: True, config.loader),
            loader=config.loader,
        )  # fmt: skip
        store = None
        if objective.needs_reference:
            store = ReferenceStore(out / "reference", {"reference": "random"})
            store.kl = objective.needs_kl
            fill(
                bundle, store, [i.tree for i in items], reader, ctx.features, kl=store.kl, max_tokens=case.max_tokens,
                ranks=ranks, loader=config.loader,
            )  # fmt: skip
        done = run_stage(stage, ctx, bundle, items, store)
    return {
        "rank": ranks.rank,
        "steps": done["steps"],
        "model_mib": sum(model.values()) / 2**20,
        "measured_mib": peaks["mib"],
        "rss_mib": _resident("VmHWM") - resident,
    }


def _bundle(case: Case) -> Any:
    """A model of random weights with a fresh adapter, as training attaches it."""
    import torch
    from transformers import AutoModelForImageTextToText

    from bench.steps.shapes import make_config, make_tokenizer
    from tempo_fast.models import get_family
    from tempo_fast.models.load import TINYWORLD_BASE, Bundle
    from tempo_fast.training.adapters import attach_lora, unfreeze

    shape, tokenizer, dtype = bench_shape(case), make_tokenizer(), getattr(torch, case.dtype)
    config = make_config(shape, tokenizer)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).requires_grad_(False)
    family, cpu = get_family(config.model_type), torch.device("cpu")
    bundle = Bundle(model, tokenizer, family, config, family.geometry(config), cpu, dtype, str(TINYWORLD_BASE))
    if case.tune:
        unfreeze(bundle)
    else:
        attach_lora(bundle, shape.lora, seed=0, vision=case.objective == "sft")
    return bundle


class Noise:
    """Pixels of any video, made when they are asked for and not kept, as a reader decodes them."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def pixels(self, plan: Any) -> Any:
        """[P, C*t*p*p]"""
        import torch

        t, h, w = plan.grid
        return torch.zeros(t * h * w, 3 * 2 * 14**2, dtype=self.dtype)


def _tensors(bundle: Any) -> list[Any]:
    return [*bundle.model.parameters(), *bundle.model.buffers()]


def _warm_up() -> None:
    """What the first use of torch's operators takes once: thread pools, oneDNN, autograd."""
    import torch

    layer = torch.nn.Linear(64, 64)
    layer(torch.randn(8, 64)).sum().backward()


@contextmanager
def _peak(into: Row) -> Iterator[None]:
    """The highest sum of live bytes, in MiB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    into["mib"] = highest / 2**20


def _resident(name: str) -> float:
    """MiB of a line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def _reset_resident() -> None:
    """The highest resident size starts anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def measure(case: Case, timeout: float = 900) -> Row:
    """Train a case in processes of its own; of several ranks the one that took most."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if case.ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        command += ["-m", "bench.plan", "--work", json.dumps(asdict(case)), "--out", folder]
        # small blocks too go back to the system, so that the resident size follows what is live
        env = {**os.environ, "DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        root = str(Path(__file__).parents[1])
        env["PYTHONPATH"] = os.pathsep.join([root, str(Path(root) / "kernels"), env.get("PYTHONPATH", "")])
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=root)
        found = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
        if done.returncode or len(found) != case.ranks:
            raise RuntimeError(f"{case.name}: {done.stderr[-3000:]}")
    return max(found, key=lambda row: row["measured_mib"])


def compare(case: Case) -> Row:
    """A row of the table."""
    row: Row = {"case": case.name, "impl": "plan", "shape": list(case.grid), "dtype": case.dtype,
                "checkpointing": case.policy, "engine": case.engine}  # fmt: skip
    row |= predict(case) | measure(case)
    row["peak_mib"] = row["measured_mib"]
    row["ratio"] = row["predicted_mib"] / row["measured_mib"]
    return row


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench plan", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=(*CASES, "all"), default=list(DEFAULT))
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--json", help="also write the rows to this file, as they come")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.work:
        rank = os.environ.get("RANK", "0")
        row = work(Case(**json.loads(args.work)), args.out / "run")
        (args.out / f"rank{rank}.json").write_text(json.dumps(row))
        return 0
    env, rows = environment(args.device), []
    for name in CASES if "all" in args.cases else args.cases:
        rows.append(compare(CASES[name]))
        write(args.json, env, rows)
        print(table(rows[-1:], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows, COLUMNS))
    off = [row["case"] for row in rows if abs(row["ratio"] - 1) > MOST_OFF]
    print(f"within {MOST_OFF:.0%}: {len(rows) - len(off)} of {len(rows)}" + (f"; off: {', '.join(off)}" if off else ""))
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
