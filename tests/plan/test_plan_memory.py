"""The memory formulas: against what autograd keeps, against a real training's peak, and against one another."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import plan as bench_plan
from tempo_fast.config import FeaturesConfig, LoaderConfig, TrainConfig
from tempo_fast.plan.activations import kept, kept_by_layer
from tempo_fast.plan.memory import Load, Memory, head_bytes, memory
from tempo_fast.plan.setting import Setting, buckets
from tempo_fast.plan.shapes import built_in, shape_of
from tempo_fast.plan.states import states, trained_elements

SMALL = bench_plan.Case("small", 160, 352, 3, 5, 1, 512, (2, 64, 2), (2, 8, 8), 40, 21, "none", records=1)
SHAPE = shape_of("qwen2.5-vl-7b", *built_in("qwen2.5-vl-7b"))
CPU = Setting(size=4, cuda=False, rank=8, dropout=0.0, policy="none")
GPU = Setting(size=2, cuda=True, rank=32, dropout=0.05, policy="full", deepspeed=True, stage=2, world=8)


def load_of(tokens: int, responses: int = 900) -> Load:
    visual = tokens - responses - 60
    return Load(tokens, responses, visual, 4 * visual, 4 * visual, videos=1000, feature_bytes=visual * 3584 * 2)


def plan_of(s: Setting, tokens: int = 12000, **more: Any) -> Memory:
    train = TrainConfig(
        engine="deepspeed", zero_stage=s.stage, offload_optimizer=s.offload_optimizer,  # type: ignore[arg-type]
        offload_parameters=s.offload_parameters,
    )  # fmt: skip
    zero = buckets(train, trained_elements(SHAPE, s)) if s.deepspeed else {}
    return memory(SHAPE, s, replace(load_of(tokens), **more), zero, FeaturesConfig(), LoaderConfig())


# -- what autograd keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_autograd_keeps_of_the_decoder(dtype: str, dropout: float) -> None:
    """Bytes of all storages that are saved for the backward, without parameters: within one in a hundred."""
    case = replace(SMALL, dtype=dtype, dropout=dropout)
    saved, tokens = _saved_bytes(case)
    shape = bench_plan.shape_of_case(case)
    s = Setting(size=4 if dtype == "float32" else 2, cuda=False, rank=case.rank, dropout=dropout, policy="none")
    d, f32 = case.hidden, s.size == 4
    # the first layer's norm and the masks of its q, k and v need no gradient; without a mask its input is still kept
    first = 3 * s.mask * d + (4 * d if f32 or dropout else 4 * d)
    final_norm = 4 * d
    answers = (1 + case.rejected) * case.answer
    rotary = 2 * s.size * d // case.heads
    expected = tokens * (kept(shape.text, s) - first + final_norm + rotary) + 4 * d * answers
    assert saved == pytest.approx(expected, rel=0.01)


def _saved_bytes(case: Any) -> tuple[int, int]:
    from bench.steps.shapes import make_items
    from tempo_fast.training.data import branch_batch
    from tempo_fast.training.module import TrainModule
    from tempo_fast.trees.batch import collate
    from tempo_kernels.objectives import make_objective

    bundle = bench_plan._bundle(case)
    bundle.model.train()
    items = make_items(bench_plan.bench_shape(case), bundle, 1, case.rejected)
    packed = collate([i.tree for i in items])
    batch, kinds = branch_batch(items, packed)
    features = torch.randn(int(packed.visual.sum()), case.hidden).to(bundle.dtype)
    module = TrainModule(bundle.model, bundle.family, make_objective("simpo"))
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)  # no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        module(packed, batch, kinds, features=features)
    return sum(found.values()), packed.n_tokens


# -- a real training --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_within_15_percent_of_a_measured_training() -> None:
    case = replace(bench_plan.CASES["3m-full"], grid=(4, 12, 12), records=2)
    row = bench_plan.compare(case)
    assert row["steps"] == 2
    assert row["model_mib"] == pytest.approx(row["parts"]["weights"], rel=0.01)
    assert row["ratio"] == pytest.approx(1.0, abs=bench_plan.MOST_OFF)


# -- the formulas among themselves ------------------------------------------------------------------------------------


def test_the_table_of_zero() -> None:
    """Bytes of a 7 B model with rank 32 on 8 ranks, by hand."""
    q, total, vision = trained_elements(SHAPE, GPU), SHAPE.total, SHAPE.vision
    assert q == 28 * 32 * ((3584 + 3584) * 2 + (3584 + 512) * 2 + (3584 + 18944) * 3)
    plain = states(SHAPE, replace(GPU, deepspeed=False, stage=0), {})
    assert plain.device == {"weights": 2 * total + 4 * q, "gradients": 4 * q, "optimizer": 8 * q}
    two = states(SHAPE, GPU, {"reduce_bucket_size": 1000})
    assert two.device["optimizer"] == pytest.approx(12 * q / 8)
    assert two.device["gradients"] == pytest.approx(4 * q / 8)
    assert two.turn == {"buckets": 4000}
    zero = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    three = states(SHAPE, replace(GPU, stage=3), zero)
    whole = vision + SHAPE.small
    assert three.device["weights"] == 2 * whole  # the frozen tower, and what is too small to cut
    assert three.device["weights partition"] == pytest.approx((2 * (total - whole) + 4 * q) / 8)
    assert three.turn["gathered"] == 2 * SHAPE.head
    near = states(SHAPE, replace(GPU, stage=3), {**zero, "stage3_max_reuse_distance": 2e9})
    assert near.turn["gathered"] - three.turn["gathered"] == pytest.approx(2 * 1e9, rel=0.05)  # a few are adapters


def test_offloading_moves_to_the_host() -> None:
    for stage in (2, 3):
        here = replace(GPU, stage=stage)
        there = replace(here, offload_optimizer=True, offload_parameters=stage == 3)
        a, b = states(SHAPE, here, {}), states(SHAPE, there, {})
        assert b.host["optimizer"] == a.device["optimizer"]
        assert "optimizer" not in b.device
        assert ("weights partition" in b.host) == (stage == 3)
        assert plan_of(there).phases["turn"] < plan_of(here).phases["turn"]


def test_training_the_model_itself_needs_masters() -> None:
    full = replace(GPU, rank=0, dropout=0.0)
    q = trained_elements(SHAPE, full)
    assert q == SHAPE.total - SHAPE.vision - SHAPE.head
    assert states(SHAPE, full, {}).device["optimizer"] == pytest.approx(12 * q / 8)
    alone = states(SHAPE, replace(full, deepspeed=False, stage=0, world=1), {}).device
    assert alone["weights"] == 2 * SHAPE.total
    assert alone["optimizer"] == 12 * q
    assert plan_of(full).device > plan_of(GPU).device


def test_every_rank_has_the_model_whole_before_the_training() -> None:
    for stage in (0, 2, 3):
        found = plan_of(replace(GPU, stage=stage, world=64), fill_tokens=12000, fill_responses=900)
        assert found.phases["load"] >= 2 * SHAPE.total
        assert found.phases["fill"] > found.phases["load"]


@given(
    st.sampled_from(["none", "selective", "full"]), st.sampled_from([0, 2, 3]), st.integers(1, 64),
    st.integers(2000, 60_000), st.booleans(), st.sampled_from([0.0, 0.05]),
)  # fmt: skip
def test_parts_add_up_and_grow(policy: str, stage: int, world: int, tokens: int, kl: bool, dropout: float) -> None:
    s = replace(GPU, policy=policy, stage=stage, world=world, kl=kl, dropout=dropout)
    found = plan_of(s, tokens)
    assert found.device == pytest.approx(sum(found.parts.values()))
    assert found.device == pytest.approx(max(found.phases.values()))
    assert all(value >= 0 for value in found.parts.values())
    more = plan_of(s, tokens + 500)
    assert more.device >= found.device
    assert more.phases["turn"] > found.phases["turn"]
    # two ranks and more have NCCL's buffers; from there on more ranks never need more
    assert plan_of(replace(s, world=2 * world), tokens).device <= found.device * (1 + 1e-9) or world == 1
    assert plan_of(s, tokens, micros=2).device >= found.device


def test_policies_in_order() -> None:
    for s in (GPU, replace(CPU, policy="full"), replace(GPU, attention="split")):
        none, selective, full = (kept(SHAPE.text, replace(s, policy=p)) for p in ("none", "selective", "full"))
        assert none > selective > full
        assert full == 28 * s.size * 3584


def test_options_that_change_what_is_kept() -> None:
    layer = lambda s: sum(kept_by_layer(SHAPE.text, s).values())  # noqa: E731
    assert layer(replace(GPU, liger=True)) < layer(GPU)
    assert layer(replace(GPU, attention="split")) > layer(GPU)
    assert layer(replace(GPU, dropout=0.0)) < layer(GPU)
    assert layer(replace(GPU, cuda=False)) > layer(GPU)  # a float32 mask, and repeated heads
    assert head_bytes(SHAPE, replace(GPU, kl=True), 900) - head_bytes(SHAPE, GPU, 900) == 8 * 900 * 3584


def test_no_part_depends_on_the_overhead_of_a_cpu() -> None:
    assert "overhead" not in plan_of(replace(CPU, world=1)).parts
    assert plan_of(GPU).parts["overhead"] > 2**29


def test_settings_know_every_field() -> None:
    """A field that a plan ignores would be a lie: each of these changes some plan."""
    base = replace(GPU, policy="none")
    changed = {
        "size": 4, "cuda": False, "rank": 8, "dropout": 0.0, "policy": "full", "stage": 3, "world": 2,
        "deepspeed": False, "offload_optimizer": True, "trees": False, "attention": "split", "liger": True, "kl": True,
        "train_vision": True,
    }  # fmt: skip
    before = plan_of(base).phases
    for name, value in changed.items():
        if name == "trees":
            continue  # the load's tokens say it
        other = replace(base, **{name: value, **({"stage": 0} if name == "deepspeed" else {})})
        assert plan_of(other).phases != before, name
    assert {f.name for f in dataclasses.fields(Setting)} - set(changed) == {"offload_parameters", "train_head"}
