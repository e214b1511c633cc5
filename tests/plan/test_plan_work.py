"""FLOP and hours: against the bench's own count, and against arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.config import VideoConfig
from tempo_fast.errors import InputError
from tempo_fast.models.family import Grid
from tempo_fast.plan import work
from tempo_fast.plan.gpus import find_gpu
from tempo_fast.plan.record import Record, frames_of, with_words
from tempo_fast.plan.setting import Setting
from tempo_fast.plan.shapes import built_in, shape_of
from tempo_fast.video.sampling import sample_frames

SHAPE = shape_of("qwen2.5-vl-7b", *built_in("qwen2.5-vl-7b"))
GPU = Setting(size=2, cuda=True, rank=32, dropout=0.05, policy="full", world=8)
RECORD = Record(72, 448, 560, Grid(36, 32, 40), 11520, 480, 4, 300.0)


def test_tokens_of_a_record_are_those_of_the_rules() -> None:
    """A minute at 1 fps, 9 Mpx a video: as many frames and pixels as a file would get."""
    config = VideoConfig(fps=1, max_frames=600)
    found = frames_of(config, SHAPE.geometry, 60, 720, 1280)
    indices = sample_frames("qwen_vl_utils", 1800, 30.0, fps=1, min_frames=4, max_frames=600)
    assert found.frames == len(indices) == 60
    budget = 9_000_000 / 60 * 2
    assert found.height * found.width <= budget < (found.height + 28) * (found.width + 28)
    assert found.visual == found.grid.t * found.height * found.width // 28**2
    made = with_words(found, SHAPE, 50, 4, 300)
    assert made.tokens == found.visual + 50 + 1200
    assert made.rows(False) == 4 * (found.visual + 50) + 1200
    with pytest.raises(InputError, match="aspect ratio"):
        frames_of(config, SHAPE.geometry, 60, 10, 5000)


def test_longer_videos_have_smaller_frames() -> None:
    config = VideoConfig(fps=1, max_frames=600)
    seen = [frames_of(config, SHAPE.geometry, s, 720, 1280).visual for s in (30, 120, 500)]
    assert all(6000 <= n <= 11480 for n in seen)  # the budget: 9e6 pixels of temporal patches of 28 x 28


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("trees", [True, False])
def test_flop_are_those_of_bench_step(policy: str, trees: bool) -> None:
    """The same formula from a real module's layers and packed rows; a step of one record, nothing cached but vision."""
    import torch

    from bench.steps.flops import work_of
    from bench.steps.shapes import SHAPES
    from bench.steps.sides import SIDES, Rig

    bench_shape = SHAPES["micro"]
    rig = Rig(bench_shape, "cpu", torch.float32, policy=policy, cached_vision=True, attention="auto")
    rig.load(1, 3)
    model = rig.bundle
    shape = shape_of("micro", model.family, model.config)
    visual = bench_shape.grid.t * bench_shape.grid.h * bench_shape.grid.w // 4
    record = Record(4, 56, 56, bench_shape.grid, visual, bench_shape.prefix - visual, 4, float(bench_shape.answer))
    s = Setting(size=4, cuda=False, rank=4, dropout=0.0, policy=policy, trees=trees)
    found = work.flop_of(shape, record, s, encoded=0.0)
    # rows of all four answers: the bench's rows are pairs, with the chosen answer once more for each
    side = work_of(rig, SIDES["tree_1"]) if trees else None
    if side is not None:
        assert found.necessary == pytest.approx(side.necessary)
        assert found.run == pytest.approx(side.run)
    else:
        tree = work.flop_of(shape, record, replace(s, trees=True), encoded=0.0)
        assert found.necessary > tree.necessary


def test_flop_of_the_vision_tower_are_those_of_bench_step() -> None:
    import torch
    import transformers

    from bench.steps.flops import vision_forward

    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(SHAPE.config)
    assert work.vision(SHAPE, RECORD) == pytest.approx(vision_forward(model, RECORD.grid), rel=0.01)


def test_seven_billion_parameters_by_hand() -> None:
    """About 6 FLOP a parameter and token with full checkpointing and LoRA, attention on top."""
    found = work.flop_of(SHAPE, RECORD, GPU, encoded=0.0)
    dense = 6 * 6.525e9 * RECORD.tokens
    assert dense < found.run < 1.5 * dense
    assert found.fill < found.necessary < found.run
    assert work.flop_of(SHAPE, RECORD, replace(GPU, rank=0), encoded=0.0).run > found.run


@given(st.integers(1, 5000), st.integers(1, 64), st.integers(1, 4), st.integers(1, 64))
def test_stages_add_up(records: int, pairs: int, epochs: int, world: int) -> None:
    s = replace(GPU, world=world)
    flop = work.Flop(1e15, 2e15, 5e14)
    found = work.train_stage("s", records, epochs, pairs, RECORD, flop, s, 4e14)
    per_step = found.tokens_per_step / RECORD.tokens
    assert found.steps >= epochs * records / max(1, per_step) - 1e-9
    assert found.hours == pytest.approx(found.steps * found.step_s / 3600)
    # no rank does more than its share of the slowest one's time, and together they do all of it
    assert found.hours * 3600 * world * 4e14 >= epochs * records * flop.run * 0.999
    assert 0 < found.busy <= 1
    fill = work.fill_stage("f", records, RECORD, flop, s, 4e14)
    assert fill.hours * 3600 * world == pytest.approx(records * flop.fill / 4e14)


def test_answers_take_longer_for_more_tokens_and_less_in_batches() -> None:
    gpu = find_gpu("h100")
    one = work.answers_hours(SHAPE, GPU, gpu, 0.4, 100, 1000, 300, 1)
    assert work.answers_hours(SHAPE, GPU, gpu, 0.4, 100, 1000, 600, 1) > 1.5 * one
    assert work.answers_hours(SHAPE, GPU, gpu, 0.4, 100, 1000, 300, 16) < 0.2 * one
    # a token of one answer reads 14 GB of weights: at half of 3.35 TB/s, some 8.5 ms
    assert one * 3600 / 100 / 300 == pytest.approx(8.5e-3, rel=0.1)


def test_gpus() -> None:
    assert find_gpu("A100-80").memory_gib < 80
    assert find_gpu("cpu").memory_gib > 0.5
    with pytest.raises(InputError, match="--gpu: v100 is none of h100"):
        find_gpu("v100")
