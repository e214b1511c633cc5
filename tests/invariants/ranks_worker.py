"""Train a few steps on whatever ranks there are; run by ``torchrun`` from test_ranks_zero.py, or called directly."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import tiny_qwen  # noqa: E402
import torch  # noqa: E402
from frame_models import FramesPlan, FramesReader  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402

from tempo_fast.config import TrainConfig  # noqa: E402
from tempo_fast.runtime import optimizer  # noqa: E402
from tempo_fast.runtime.engine import TorchEngine, make_train_engine  # noqa: E402
from tempo_fast.runtime.head import apply_head  # noqa: E402
from tempo_fast.runtime.ranks import Ranks  # noqa: E402
from tempo_fast.training.activations import set_recompute  # noqa: E402
from tempo_fast.training.module import TrainModule  # noqa: E402
from tempo_fast.trees.batch import collate  # noqa: E402
from tempo_fast.trees.layout import build_tree  # noqa: E402
from tempo_fast.trees.vision import FeatureCache  # noqa: E402
from tempo_kernels.head import HeadOutput, head_statistics, linear_logp  # noqa: E402
from tempo_kernels.objectives import BranchBatch, make_objective  # noqa: E402

STEPS = 4
LONG = 20
LINEAR = torch.nn.functional.linear
ANSWERS = ["A red circle moves left.", "Then a blue square grows.", "x", "It appears at last.", "A green triangle"]


def make_trees(bundle: Any, *, single: bool = False) -> list[Any]:
    """Six trees of 1 + 1 to 1 + 3 answers (``single``: of one), odd frame counts, one without a video."""
    out = []
    for i in range(6):
        answers = [f"{i} {ANSWERS[(i + j) % 5]}" for j in range(1 if single else 2 + i % 3)]
        if bundle.geometry.side:
            video: Any = FramesPlan(f"v{i}", 1 + i, bundle.geometry)
        else:
            video = tiny_qwen.FakePlan(f"v{i}", 1 + i, 28, 28 if i % 2 else 56)
        plans = [] if i == 3 else [video]
        spans = [[[2, len(a)]] for a in answers]
        out.append(
            build_tree(
                bundle.family,
                bundle.tokenizer,
                bundle.config,
                id=str(i),
                prompt_text="What happened?",
                answers=answers,
                spans=spans,
                plans=plans,
            )  # fmt: skip
        )
    return out


def pairs_of(packed: Any) -> BranchBatch:
    chosen = [b[0] for b in packed.tree_branches for _ in b[1:] or b]
    rejected = [x for b in packed.tree_branches for x in b[1:] or b]
    return BranchBatch(
        branch=packed.branch,
        n_branches=packed.n_branches,
        chosen=torch.tensor(chosen),
        rejected=torch.tensor(rejected),
        spans=packed.spans,
    )


def reference_of(bundle: Any, packed: Any, visual: Any) -> Any:
    from tempo_fast.reference.fill import reference_mode
    from tempo_fast.trees.forward import tree_hidden

    with reference_mode(bundle.model):
        hidden = tree_hidden(bundle, bundle.model, packed, visual)
        return head_statistics(hidden, bundle.family.head(bundle.model).weight, packed.labels)


OPTIONS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3, "sft_weight": 1.0},
    "rrpo": {"beta": 0.3, "alpha": 0.5},
    "leanpo": {"beta": 2.0, "gamma": 0.5},
    "sft": {},
}


def make_engine(module: Any, config: TrainConfig, ranks: Ranks) -> Any:
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if config.engine == "torch":
        return make_train_engine(module, params, config, ranks)
    from tempo_fast.runtime.zero import DeepSpeedEngine

    return DeepSpeedEngine(module, params, config, ranks, persist_below=0)  # so that tiny weights are partitioned


def set_up(bundle: Any, objective: str) -> tuple[TrainModule, list[Any]]:
    """As training sets it: activations recomputed in the backward, the frozen tower in eval mode, one tree per
    micro-batch with its reference."""
    made = make_objective(objective, **OPTIONS[objective])
    reader: Any = FramesReader() if bundle.geometry.side else tiny_qwen.FakeReader()
    cache, batches = FeatureCache(), []
    for tree in make_trees(bundle, single=objective == "sft"):
        packed = collate([tree])
        visual = cache.features(bundle.family, bundle.model, reader, packed.plans)
        reference = reference_of(bundle, packed, visual) if made.needs_reference else None
        batches.append((packed, pairs_of(packed), visual, reference))
    bundle.model.train()
    bundle.family.vision_tower(bundle.model).eval()
    set_recompute(bundle.model, recomputed(objective))
    return TrainModule(bundle.model, bundle.family, made), batches


def one_step(engine: Any, batches: list[Any], ranks: Ranks, lr: float) -> tuple[float, float]:
    """Loss over all ranks, each of which takes every world-th tree, and the gradient norm."""
    total, loss_sum = sum(len(b[1].chosen) for b in batches), torch.zeros(1, dtype=torch.float64)
    for packed, batch, visual, reference in batches[ranks.rank :: ranks.world]:
        visual = visual() if callable(visual) else visual
        loss, _ = engine(packed, batch, ["drop"] * len(batch.chosen), features=visual, reference=reference)
        engine.backward(loss * (ranks.world / total))
        loss_sum += loss.detach().double() / total
    return float(ranks.all_reduce_sum(loss_sum)), engine.step(lr)


def train(
    bundle: Any, config: TrainConfig, ranks: Ranks, objective: str, *, resume_at: int = 0, steps: int = STEPS
) -> dict[str, Any]:
    """Losses and gradient norms of the steps over all ranks, and the trained weights after ``sync_adapter``.
    ``resume_at`` goes on in a second engine from the first one's states."""
    # a key's bias has next to no gradient: with AdamW's 1e-8 the rounding in it would make steps of full size
    optimizer.ADAM_EPS = 1e-4 if config.tune == "full" else 1e-8
    module, batches = set_up(bundle, objective)
    batches = batches[2:] if steps == LONG else batches  # for time's sake
    before = {n: p.detach().clone() for n, p in bundle.model.named_parameters() if p.requires_grad}
    engine = make_engine(module, config, ranks)
    lr = 1e-3 if steps == LONG or config.tune == "full" else 1e-2
    losses, norms = [], []
    for step in range(steps):
        if resume_at and step == resume_at:
            states = ranks.all_gather_object(engine.state_dict())
            engine.sync_adapter()
            with torch.no_grad():
                for n, p in bundle.model.named_parameters():
                    if n in before:
                        p.copy_(before[n])
            engine = make_engine(module, config, ranks)
            engine.load_state_dict(states[ranks.rank :] + states[: ranks.rank])
        loss, norm = one_step(engine, batches, ranks, lr)
        losses.append(loss)
        norms.append(norm)
    partitioned = sum(hasattr(p, "ds_id") for p in module.parameters())
    vision_outside = not any(hasattr(p, "ds_id") for p in bundle.family.vision_tower(bundle.model).parameters())
    engine.sync_adapter()
    plain = not any(hasattr(x, "ds_id") for x in [*module.parameters(), *module.modules()])
    plain = plain and torch.nn.functional.linear is LINEAR
    # the module works without the engine, and another engine takes it up
    packed, batch, visual, reference = batches[0]
    again, _ = module(packed, batch, ["drop"] * len(batch.chosen), features=visual, reference=reference)
    TorchEngine(module, {n: p for n, p in module.named_parameters() if p.requires_grad}, config)
    weights = {n: p.detach().double().sum().item() for n, p in module.named_parameters() if p.requires_grad}
    squares = {n: p.detach().double().square().sum().item() for n, p in module.named_parameters() if p.requires_grad}
    return {
        "losses": losses, "norms": norms, "sums": weights, "squares": squares, "after": float(again.detach()),
        "partitioned": partitioned, "vision_outside": vision_outside, "plain": plain,
        "dtypes": sorted({str(p.dtype) for p in module.parameters()}),
    }  # fmt: skip


def go_on(bundle: Any, config: TrainConfig, ranks: Ranks, states: list[Any] | None, steps: int) -> dict[str, Any]:
    """The first ``steps`` steps, or those after ``states`` of any number of ranks; and the states afterwards."""
    module, batches = set_up(bundle, "rrpo")
    engine = make_engine(module, config, ranks)
    if states is not None:
        engine.load_state_dict(states)
    losses = [one_step(engine, batches, ranks, 1e-2)[0] for _ in range(steps)]
    after = ranks.all_gather_object(engine.state_dict())
    engine.sync_adapter()
    return {"losses": losses, "states": after}


def skip_vision(bundle: Any, ranks: Ranks) -> dict[str, Any]:
    """Under ZeRO-3 the last rank encodes every video in the step, the others find their features: losses of 4 steps."""
    module, batches = set_up(bundle, "dpo")
    engine = make_engine(module, config_of("deepspeed", 3), ranks)
    calls: list[int] = []
    bundle.family.vision_tower(bundle.model).register_forward_hook(lambda *_: calls.append(1))
    if ranks.rank == ranks.world - 1:
        reader, cache = tiny_qwen.FakeReader(), FeatureCache(max_bytes=0)

        def lazily(packed: Any) -> Any:
            return lambda: cache.features(bundle.family, bundle.model, reader, packed.plans)

        batches = [(packed, batch, lazily(packed), reference) for packed, batch, _, reference in batches]
    losses = [one_step(engine, batches, ranks, 1e-2)[0] for _ in range(STEPS)]
    engine.sync_adapter()
    return {"losses": losses, "calls": len(calls)}


def skip_a_bad_step(bundle: Any, config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """Two steps, between them one whose loss is not finite on the last rank alone: its norm, and the losses."""
    module, batches = set_up(bundle, "dpo")
    engine = make_engine(module, config, ranks)
    losses = [one_step(engine, batches, ranks, 1e-2)[0]]
    packed, batch, visual, reference = batches[ranks.rank]
    loss, _ = engine(packed, batch, ["drop"] * len(batch.chosen), features=visual, reference=reference)
    engine.backward(loss * (float("nan") if ranks.rank == ranks.world - 1 else 1.0))
    norm = engine.step(1e-2)
    losses += [one_step(engine, batches, ranks, 1e-2)[0] for _ in range(2)]
    steps = engine.state_dict()["step"]
    engine.sync_adapter()
    return {"norm": norm, "losses": losses, "steps": steps}


def fill_together(bundle: Any, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """All ranks fill one store; what each put, and what is missing afterwards."""
    from tempo_fast.reference.fill import fill
    from tempo_fast.reference.store import ReferenceStore

    store, trees, reader = ReferenceStore(folder, {"reference": "tiny"}), make_trees(bundle), tiny_qwen.FakeReader()
    budget = max(t.n_tokens for t in trees)
    report = fill(bundle, store, trees, reader, FeatureCache(), kl=True, max_tokens=budget)
    again = fill(bundle, store, trees, reader, FeatureCache(), kl=True, max_tokens=budget)
    keys = [store.key(tree, b) for tree in trees for b in range(len(tree.branches))]
    return {
        "computed": report.computed, "again": again.computed, "answers": len(set(keys)),
        "missing": len(store.missing(keys)), "videos": sorted(set(reader.calls)),
        "logp": store.get(keys, kl=True).logp.double().sum().item(),
    }  # fmt: skip


def stop_together(ranks: Ranks) -> int:
    """The last rank gets SIGTERM; the exit code with which every rank stops."""
    import os
    import signal

    from tempo_fast.errors import Interrupted
    from tempo_fast.runtime.signals import Stopper

    with Stopper() as stopper:
        stopper.check()
        if ranks.rank == ranks.world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            stopper.check()
        except Interrupted as stopped:
            return stopped.exit_code
    return 0


class FrozenHead(torch.nn.Module):
    """A layer that trains under a frozen head, which ``recompute`` reads once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = torch.nn.Linear(24, 24), torch.nn.Linear(24, 211, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        def values(hidden: torch.Tensor, weight: torch.Tensor) -> HeadOutput:
            self.full = StorageWeakRef(weight.untyped_storage())
            return linear_logp(hidden, weight, labels, reference=x, softcap=5.0)

        out = apply_head(self.head, self.layer(x), values)
        return (out.kl - out.logp).sum()


def train_below_a_frozen_head(ranks: Ranks, engine: str, stage: int) -> dict[str, Any]:
    """Losses and weights of STEPS steps, half of the tokens on each of two ranks, and whether the full head was still
    there between forward and backward."""
    from tempo_fast.runtime.zero import DeepSpeedEngine

    module = FrozenHead()
    params = {n: p for n, p in module.named_parameters() if p.requires_grad}
    made = TorchEngine if engine == "torch" else partial(DeepSpeedEngine, ranks=ranks, persist_below=0)
    trainer = made(module, params, config_of(engine, stage))
    g = torch.Generator().manual_seed(1)
    x, labels = torch.randn(8, 24, generator=g), torch.randint(0, 211, (8,), generator=g)
    losses, held = [], []
    for _ in range(STEPS):
        loss = trainer(x[ranks.rank :: ranks.world], labels[ranks.rank :: ranks.world])
        # the communication's own threads and cycles may let go of the gathered weight a moment later
        patience = time.monotonic() + (0 if engine == "torch" else 5)
        while not module.full.expired() and time.monotonic() < patience:
            gc.collect()
            time.sleep(0.01)
        held.append(not module.full.expired())
        trainer.backward(loss * (ranks.world / len(x)))
        losses.append(float(ranks.all_reduce_sum(loss.detach().double()[None])))
        trainer.step(1e-2)
    trainer.sync_adapter()
    return {"losses": losses, "held": held, "layer": module.layer.weight.tolist()}


def config_of(engine: str, stage: int, **changes: Any) -> TrainConfig:
    config = dataclasses.replace(TrainConfig(), engine=engine, zero_stage=stage, max_grad_norm=0.5, weight_decay=0.1)
    return dataclasses.replace(config, **changes)


def recomputed(objective: str) -> str:
    """What is computed again; which objective does it does not matter, so that there is one of each."""
    return "selective" if objective == "rrpo" else "full"


def make_checkpoint(folder: Path, *, tie: bool = True, biases: bool = True) -> None:
    """The tiny model, untied or not, with biases that are not zero, as real ones are, or without."""
    bundle = tiny_qwen.make_bundle(folder, tie=tie)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in bundle.model.named_parameters():
            if biases and name.endswith("_proj.bias"):
                p.copy_(torch.randn(p.shape, generator=draw) * 0.3)
    bundle.model.save_pretrained(folder)


def bundle_of(path: str, dtype: str, tune: str = "lora") -> Any:
    """The bundle in a folder, with adapters or all of the language model; ``FOLDER+head`` trains the head as well."""
    from tempo_fast.models.load import load_bundle
    from tempo_fast.training.adapters import unfreeze

    folder, _, head = path.partition("+")
    bundle = load_bundle(folder, dtype, "cpu")
    if tune == "full":
        unfreeze(bundle, head=bool(head))
        return bundle
    bundle = tiny_qwen.add_lora(bundle)
    if head:
        bundle.family.head(bundle.model).weight.requires_grad_()
    return bundle


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(v).rpartition("/")[2] for v in case.values())


def main(folder: str, out: str, cases: list[dict[str, Any]]) -> None:
    from tempo_fast.runtime.ranks import init_ranks

    ranks = init_ranks()
    results: dict[str, Any] = {}
    began = time.monotonic()
    tied = lambda: bundle_of(f"{folder}/tied", "float32")  # noqa: E731
    filled = fill_together(tied(), ranks, Path(out + ".store"))
    results["fill"] = ranks.all_gather_object(filled)
    results["stop"] = ranks.all_gather_object(stop_together(ranks))
    results["frozen head"] = ranks.all_gather_object(train_below_a_frozen_head(ranks, "deepspeed", 3))
    results["skipped vision"] = ranks.all_gather_object(skip_vision(tied(), ranks))
    for stage in (0, 2, 3):
        config = config_of("deepspeed", stage)
        bad = skip_a_bad_step(tied(), config, ranks)
        results[f"bad step {stage}"] = ranks.all_gather_object(bad)
        # from one rank to two, and what two leave for one
        config = dataclasses.replace(config, gradient_checkpointing=recomputed("rrpo"))
        first = torch.load(f"{folder}/one.pt", weights_only=True)
        results[f"go on {stage}"] = go_on(tied(), config, ranks, [first], 2)["losses"]
        made = go_on(tied(), config, ranks, None, 2)
        if ranks.is_main:
            torch.save(made["states"], f"{folder}/two-{stage}.pt")
    for case in cases:
        known = ("model", "stage", "dtype", "objective", "resume_at", "steps")
        changes = {k: v for k, v in case.items() if k not in known}
        bundle = bundle_of(f"{folder}/{case['model']}", case["dtype"], changes.get("tune", "lora"))
        changes["gradient_checkpointing"] = recomputed(case["objective"])
        config = config_of("deepspeed", case["stage"], **changes)
        how = {"resume_at": case.get("resume_at", 0), "steps": case.get("steps", STEPS)}
        begun = time.process_time()
        result = train(bundle, config, ranks, case["objective"], **how) | {"cpu_s": time.process_time() - begun}
        every = ranks.all_gather_object(result)
        assert all(r["sums"] == result["sums"] for r in every), "ranks hold different weights"
        results[name_of(case)] = result
    results["seconds"] = time.monotonic() - began
    if ranks.is_main:
        Path(out).write_text(json.dumps(results))
    ranks.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
