"""``python -m bench step`` on a very small model: the sides do the same work, and the formulas count it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import step
from bench.head import NO_TIME
from bench.measure import Deadline
from bench.steps import flops
from bench.steps.shapes import SHAPES, make_config, make_items, make_tokenizer
from bench.steps.sides import SECTIONS, SIDES, Rig, Sections
from tempo_fast.models import get_family
from tempo_fast.models.family import Grid
from tempo_fast.training.activations import POLICIES

MICRO = SHAPES["micro"]
RECORDS, REJECTED = 3, 2


def make_rig(policy: str = "full", cached_vision: bool = True) -> Rig:
    rig = Rig(MICRO, "cpu", torch.float32, policy=policy, cached_vision=cached_vision, attention="auto")
    rig.load(RECORDS, REJECTED)
    return rig


@pytest.fixture(scope="module")
def rig() -> Rig:
    return make_rig()


@pytest.fixture(scope="module")
def expected(rig: Rig) -> tuple[float, list[torch.Tensor]]:
    gradients: list[torch.Tensor] = []
    return rig.step(SIDES["rows"], Sections("cpu"), gradients)[0], gradients


@pytest.mark.parametrize("name", SIDES)
def test_every_side_takes_the_same_step(name: str, rig: Rig, expected: tuple[float, list[torch.Tensor]]) -> None:
    found: list[torch.Tensor] = []
    loss, _ = rig.step(SIDES[name], Sections("cpu"), found)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert len(found) == len(expected[1]) > 20
    for ours, theirs in zip(found, expected[1], strict=True):
        assert 0 < theirs.norm() and (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", SIDES)
def test_tokens_and_sections(name: str, rig: Rig) -> None:
    side, sections = SIDES[name], Sections("cpu")
    rig.step(side, Sections("cpu"))  # fills the cached reference
    _, counts = rig.step(side, sections)
    tree = RECORDS * (MICRO.prefix + (1 + REJECTED) * MICRO.answer)
    rows = RECORDS * 2 * REJECTED * (MICRO.prefix + MICRO.answer)
    assert counts.tokens == (tree if side.trees else rows)
    assert counts.reference_tokens == (counts.tokens if side.live else 0)
    split, wall, _ = sections.milliseconds()
    assert sum(split.values()) == pytest.approx(wall)
    assert all(split[section] > 0 for section in SECTIONS)
    assert (split["reference"] > 0.2 * split["llm"]) == side.live


def test_trees_encode_each_video_once_and_rows_once_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, seen = make_rig(cached_vision=False), []
    encode = type(rig.bundle.family).encode_vision

    def spy(self: Any, model: Any, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
        seen.extend(grids)
        return encode(self, model, pixels, grids)

    monkeypatch.setattr(type(rig.bundle.family), "encode_vision", spy)
    for name, videos in (("tree_4", RECORDS), ("tree_1", RECORDS), ("rows", RECORDS * 2 * REJECTED)):
        seen.clear()
        _, counts = rig.step(SIDES[name], Sections("cpu"))
        assert counts.videos == len(seen) == videos, name


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tree_1", "tree_4", "rows", "rows_1", "rows_4"])
def test_pairs_of_queries_and_keys_are_those_of_the_mask(name: str, rig: Rig) -> None:
    side = SIDES[name]
    for items in rig.batches(side):
        packed = rig.pack(side, items)
        seen = sum(
            flops.pairs_seen(MICRO.prefix, [MICRO.answer] * len(i.tree.branches), trees=side.trees, width=width)
            for i in items
            for width in [packed.input_ids.shape[1]]
        )
        assert seen == int(packed.allowed().sum())


def counted(counter: FlopCounterMode) -> int:
    """Of all matmuls and convolutions outside attention."""
    found = counter.get_flop_counts()["Global"]
    return sum(n for op, n in found.items() if str(op).split(".")[-1] in ("mm", "addmm", "convolution"))


@pytest.mark.parametrize("policy", POLICIES)
def test_matmuls_of_a_step_are_those_of_the_formula(policy: str) -> None:
    """``rows``, whose head is a linear layer; what the formula leaves out is the adapters' own."""
    rig, side = make_rig(policy), SIDES["rows"]
    rig.bundle.model.enable_input_require_grads()  # type: ignore[operator]
    rig.step(side, Sections("cpu"))
    with FlopCounterMode(display=False) as counter:
        _, counts = rig.step(side, Sections("cpu"))
    adapters = sum(p.numel() for n, p in rig.bundle.model.named_parameters() if "lora_" in n)
    text = rig.bundle.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    width = MICRO.prefix + MICRO.answer
    pairs = RECORDS * 2 * REJECTED * width * (width + 1) // 2
    attention = 4 * text.num_hidden_layers * text.num_attention_heads * head_dim * pairs
    # ``selective`` computes again only what widens: the second halves of adapters
    widening = sum(p.numel() for n, p in rig.bundle.model.named_parameters() if "lora_B" in n)
    again = {"none": 0, "selective": widening, "full": adapters}[policy]
    # the recompute stops once it has all that is saved: before the second half of each layer's last adapter
    never_again = text.num_hidden_layers * MICRO.lora.r * text.hidden_size if again else 0
    of_adapters = (6 * adapters + 2 * again - 2 * never_again) * counts.tokens
    assert counted(counter) == flops.work_of(rig, side).run - (3 + (policy == "full")) * attention + of_adapters


def test_matmuls_of_the_tower_are_those_of_the_formula(rig: Rig) -> None:
    model, config = rig.bundle.model, rig.bundle.config.vision_config
    pixels = rig.reader.pixels(rig.items[0].tree.plans[0])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rig.bundle.family.encode_vision(model, pixels, [MICRO.grid])
    t, h, w = MICRO.grid
    attention = 4 * config.embed_dim * t * (h * w) ** 2 * config.depth
    assert counted(counter) == flops.vision_forward(model, MICRO.grid) - attention


@pytest.mark.parametrize("grid", [Grid(1, 16, 16), Grid(1, 10, 22), Grid(1, 4, 9)])
def test_windows_are_counted_one_by_one(grid: Grid) -> None:
    side = 8
    sizes = [
        min(side, grid.h - top) * min(side, grid.w - left)
        for top in range(0, grid.h, side)
        for left in range(0, grid.w, side)
    ]
    assert flops._squares(grid.h, side) * flops._squares(grid.w, side) == sum(n**2 for n in sizes)


@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_has_the_tokens_of_its_shape(name: str) -> None:
    """Through the family's own prompt, its video included; only sizes and names of a bundle are asked for."""
    shape, tokenizer = SHAPES[name], make_tokenizer()
    config = make_config(shape, tokenizer)
    bundle: Any = SimpleNamespace(family=get_family(config.model_type), tokenizer=tokenizer, config=config)
    (item,) = make_items(shape, bundle, 1, 3)
    assert len(item.tree.prompt.input_ids) == shape.prefix
    assert int(item.tree.prompt.visual.sum()) == shape.grid.t * shape.grid.h * shape.grid.w // 4
    assert item.tree.n_tokens == shape.prefix + 4 * shape.answer and item.n_pairs == 3


def test_the_large_shape_is_the_published_model() -> None:
    """Parameters of Qwen2.5-VL-7B-Instruct as its checkpoint's index gives them: 16,584,333,312 bytes in bfloat16."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_config(SHAPES["7b"], make_tokenizer()))
    assert sum(p.numel() for p in model.parameters()) == 16_584_333_312 // 2


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_rows_and_says_what_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    impls = ["tree_4", "rows", "rows_live"]
    arguments = ["--shape", "micro", "--records", "2", "--repetitions", "2", "--rejected", "1", "2", "--json", str(out)]
    assert step.main([*arguments, "--impls", *impls, "--vision", "cached", "encoded"]) == 0
    data = json.loads(out.read_text())
    assert set(data) == {"env", "rows", "matmul_tflops", "liger"}
    done = [row for row in data["rows"] if "ms" in row]
    cases = [(v, c, i) for v in ("cached", "encoded") for c in ("1+1", "1+2") for i in impls]
    assert [(row["vision"], row["case"], row["impl"]) for row in done] == cases
    for row in done:
        assert row["repetitions"] == 2 and row["dtype"] == "float32" and row["checkpointing"] == "full"
        assert row["ms_min"] <= row["ms"] <= row["ms_max"] and row["peak_mib"] > 0
        assert row["records_per_s"] == pytest.approx(2e3 / row["ms"])
        assert row["tflops"] == pytest.approx(1e3 * row["tflop"] / row["ms"]) and row["tflop_run"] > row["tflop"]
        assert row["error"]["loss"] < 1e-5 and row["error"]["grad"] < 1e-4
        assert set(row["over"]) == {"rows", "rows_live"} and (row["impl"] != "rows" or row["over"]["rows"] == 1)
        assert set(row["split"]) == set(SECTIONS) and row["videos"] == 0 or row["vision"] == "encoded"
    printed = capsys.readouterr().out
    assert all(f"skipped {name}: " in printed for name in step.PEERS)


def test_a_side_that_runs_out_of_memory_is_a_line(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    take = rig.step

    def step_of(side: Any, *rest: Any, **more: Any) -> Any:
        if side.name == "full_live":
            raise torch.OutOfMemoryError("no room for 1 TiB\nmore words")
        return take(side, *rest, **more)

    monkeypatch.setattr(rig, "step", step_of)
    args = step.parse(["--shape", "micro", "--records", str(RECORDS), "--repetitions", "1"])
    rows = step.measure_case(rig, [SIDES["tree_1"], SIDES["full_live"], SIDES["rows"]], REJECTED, args, 0.0)
    assert [row["impl"] for row in rows] == ["tree_1", "full_live", "rows"]
    assert rows[1]["skipped"] == "out of memory: no room for 1 TiB"
    assert "ms" in rows[0] and "ms" in rows[2] and set(rows[0]["over"]) == {"rows"}
    assert "skipped full_live: out of memory: no room for 1 TiB" in step.report(rows)


def test_no_side_starts_after_the_deadline(rig: Rig) -> None:
    moments = iter([0.0, 1.0, 9.0, *[11.0] * 9])
    deadline = Deadline(10.0, lambda: next(moments))
    args = step.parse(["--shape", "micro", "--records", str(RECORDS), "--repetitions", "5"])
    sides = [SIDES[name] for name in ("rows", "tree_1", "tree_4")]
    rows = step.measure_case(rig, sides, REJECTED, args, 0.0, deadline)
    assert [row.get("skipped") for row in rows] == [None, None, NO_TIME]
    assert [row.get("repetitions") for row in rows] == [1, 1, None]  # the round that was begun is ended


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "7b"], "--shape 7b needs --device cuda"),
        (["--liger"], "--liger"),
        (["--rejected", "0"], "at least 1"),
        (["--impls", "row"], "invalid choice"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step.parse(arguments)
    assert stop.value.code == 2 and words in capsys.readouterr().err
