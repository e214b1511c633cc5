"""A stage on a random tiny model: learning, resuming, refusing, the same result however the work is cut."""

import copy
import dataclasses
import json
import threading
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tempo_fast.config import LoaderConfig, LoraConfig, ObjectiveConfig, TrainConfig
from tempo_fast.errors import InputError, Interrupted
from tempo_fast.files import file_digest
from tempo_fast.models.load import Bundle, load_bundle
from tempo_fast.reference.fill import fill
from tempo_fast.reference.store import ReferenceStore
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.adapters import attach_lora, load_lora, merge_lora
from tempo_fast.training.data import Item, plan_steps
from tempo_fast.training.decodable import DecodeCheck
from tempo_fast.training.loop import Context, Stage, finished, run_stage
from tempo_fast.trees.feature_store import FeatureStore
from tempo_fast.trees.layout import build_tree
from tempo_fast.trees.vision import FeatureCache
from tempo_fast.video.loader import WORKER

ANSWERS = [
    ["A red circle moves left. Then a blue square grows.", "Then a blue square grows. A red circle moves left."],
    ["It appears at last.", "A green triangle moves right. It appears at last.", "It.", "A circle appears."],
    ["A blue square moves left.", "A red circle grows at last."],
    ["Then a green circle grows.", "A red square appears.", "At last it moves."],
]


class StopAt:
    """Stands in for a signal: stops at the n-th look."""

    def __init__(self, looks: int = 0) -> None:
        self.left = looks

    def check(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted("stopped", 130)


@pytest.fixture(scope="module")
def items(tiny: Bundle, plan_type) -> list[Item]:
    out = []
    for i, answers in enumerate(ANSWERS):
        plans = [] if i == 3 else [plan_type(f"v{i}", 3 + 2 * i)]
        tree = build_tree(
            tiny.family, tiny.tokenizer, tiny.config, id=f"r{i}", prompt_text="Describe.", answers=answers, plans=plans
        )
        out.append(Item(tree, ["shuffle", "drop", "reverse"][: len(answers) - 1]))
    return out


def make_context(out: Path, reader, stopper=None, **train) -> Context:
    config = TrainConfig(gradient_checkpointing=False, save_steps=2, **train)
    checked = DecodeCheck(out / "decoded.jsonl", reader, Ranks())
    return Context(config, 7, out, reader, FeatureCache(), Ranks(), stopper or StopAt(), checked)


def make_stage(bundle_path: str, **changes) -> Stage:
    stage = Stage(
        name="stage1_r16",
        r=16,
        objective=ObjectiveConfig("dpo", {"beta": 0.5, "sft_weight": 0.2}),
        learning_rate=5e-3,
        epochs=3,
        batch_size=3,
        lora=LoraConfig(r=4, alpha=8, dropout=0.1),
        base=bundle_path,
        base_digest="0",
    )
    return dataclasses.replace(stage, **changes)


def fresh(tiny_path: str, stage: Stage) -> Bundle:
    bundle = load_bundle(tiny_path, "float32", "cpu")
    attach_lora(bundle, stage.lora, seed=7, vision=stage.vision_lora)
    return bundle


def filled(
    bundle: Bundle, items: list[Item], ctx: Context, root: Path, kl: bool = True, fields: dict | None = None
) -> ReferenceStore:
    store = ReferenceStore(root, fields or {"reference": "tiny"})
    store.kl = kl
    fill(bundle, store, [i.tree for i in items], ctx.reader, ctx.features, kl=kl, max_tokens=4096)
    return store


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(tmp: Path, tiny_path: str, items: list[Item], reader, *, stage_changes=None, stopper=None, **config):
    ctx = make_context(tmp / "train", reader, stopper, **config)
    stage = make_stage(tiny_path, **(stage_changes or {}))
    bundle = fresh(tiny_path, stage)
    store = filled(bundle, items, ctx, tmp / "store") if stage.objective.name != "sft" else None
    return run_stage(stage, ctx, bundle, items, store), tmp / "train" / stage.name


def test_learns_and_reports(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    result, folder = train(tmp_path, tiny_path, items, reader, stage_changes={"epochs": 12})
    rows = rows_of(folder)
    assert [r["stage_step"] for r in rows] == list(range(1, result["steps"] + 1))
    first = rows[0]
    # policy is reference before the first step, but for the rounding of other shapes: dropout is harmless while B is 0
    assert abs(first["rewards/margins"]) < 1e-5 and abs(first["rewards/chosen"]) < 1e-5
    assert first["kl/chosen"] == pytest.approx(0, abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.5 and result["accuracy"] == 1.0
    assert result["loss_last"] < result["loss_first"] and result["pairs"] == 7
    assert rows[-1]["kl/chosen"] > 1e-4
    assert {"rewards/accuracies/shuffle", "perf/tokens_per_s", "mem/peak_gib", "grad_norm"} <= set(first)
    assert not list(folder.glob("checkpoint-*"))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resumed_equals_uninterrupted(tmp_path: Path, tiny_path: str, items: list[Item], reader, stop: int) -> None:
    _, plain = train(tmp_path / "a", tiny_path, items, reader)
    behind = {"async_save": stop % 2 == 0}  # in the background it makes no difference
    with pytest.raises(Interrupted, match=f"after step {stop - 1} of"):
        train(tmp_path / "b", tiny_path, items, reader, stopper=StopAt(stop), **behind)
    assert len(list((tmp_path / "b/train/stage1_r16").glob("checkpoint-*"))) == min(2, (stop - 1) // 2 + (stop - 1) % 2)
    # as if it had been killed: rows of steps that no checkpoint holds
    with open(tmp_path / "b/train/stage1_r16/metrics.jsonl", "a") as f:
        f.write(json.dumps({"stage_step": 99, "num_tokens": 1, "loss": 0}) + '\n{"torn')
    _, resumed = train(tmp_path / "b", tiny_path, items, reader, **behind)
    for name in ("loss", "grad_norm", "rewards/margins", "kl/chosen", "num_tokens", "learning_rate"):
        assert [r[name] for r in rows_of(plain)] == [r[name] for r in rows_of(resumed)], name
    adapters = [file_digest(f / "adapter" / "adapter_model.safetensors") for f in (plain, resumed)]
    assert adapters[0] == adapters[1]


def test_the_state_of_a_finished_stage_is_kept_where_asked(
    tmp_path: Path, tiny_path: str, items: list[Item], reader
) -> None:
    result, folder = train(tmp_path, tiny_path, items, reader, keep_stage_states=True)
    (kept,) = folder.glob("checkpoint-*")
    about = json.loads((kept / "trainer_state.json").read_text())
    assert (
        kept.name == f"checkpoint-{result['steps']}" and about["stage_step"] == about["total_steps"] == result["steps"]
    )
    state = torch.load(kept / "engine_rank0.pt", weights_only=True)
    assert (
        state["engine"]["step"] == result["steps"] and state["own"]["num_tokens"] == rows_of(folder)[-1]["num_tokens"]
    )
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    pieces = {name: values for name, _, values in state["engine"]["pieces"]}
    for name, weight in saved.items():  # what it holds is the adapter, and its moments
        values = pieces["model." + name.replace(".weight", ".default.weight")]
        assert (
            torch.equal(values["master"].view_as(weight), weight) and values["exp_avg"].shape == values["master"].shape
        )
    assert len(pieces) == len(saved)  # frozen weights are left out


def test_a_checkpoint_of_another_reference_is_refused(
    tmp_path: Path, tiny_path: str, items: list[Item], reader
) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, tiny_path, items, reader, stopper=StopAt(3))
    ctx, stage = make_context(tmp_path / "train", reader), make_stage(tiny_path)
    bundle = fresh(tiny_path, stage)
    store = filled(bundle, items, ctx, tmp_path / "other", fields={"reference": "another"})
    with pytest.raises(InputError, match="another configuration: reference_store is"):
        run_stage(stage, ctx, bundle, items, store)


def test_cut_of_a_step_does_not_matter(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    longest = max(i.tree.n_tokens for i in items)
    dry = {"lora": LoraConfig(r=4, alpha=8, dropout=0.0), "batch_size": 7}
    runs = [
        train(tmp_path / name, tiny_path, items, reader, stage_changes=dry, **config)[1]
        for name, config in (
            ("packed", {"max_tokens": 4096}),
            ("singly", {"max_tokens": longest}),
            ("rows", {"max_tokens": 4096, "trees": False}),
        )
    ]
    expected = rows_of(runs[0])
    for folder in runs[1:]:
        for row, want in zip(rows_of(folder), expected, strict=True):
            assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    losses = []
    for on in (False, True):
        ctx = make_context(tmp_path / str(on), reader)
        ctx.train = dataclasses.replace(ctx.train, gradient_checkpointing=on)
        stage = make_stage(tiny_path)
        bundle = fresh(tiny_path, stage)
        store = filled(bundle, items, ctx, tmp_path / str(on) / "store")
        run_stage(stage, ctx, bundle, items, store)
        losses.append([r["loss"] for r in rows_of(tmp_path / str(on) / stage.name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_features_on_disk_change_nothing(tmp_path: Path, tiny_path: str, items: list[Item], reader, dtype: str) -> None:
    """Two runs that share a folder of features: the second decodes nothing, its losses are the first's bit by bit."""
    found = []
    for run in ("first", "second"):
        ctx = make_context(tmp_path / run, reader)
        ctx.features = FeatureCache(store=FeatureStore(tmp_path / "features", 1 << 30, dtype))
        stage, calls = make_stage(tiny_path), len(reader.calls)
        bundle = fresh(tiny_path, stage)
        run_stage(stage, ctx, bundle, items, filled(bundle, items, ctx, tmp_path / run / "store"))
        rows = rows_of(tmp_path / run / stage.name)
        found.append(([r["loss"] for r in rows], len(reader.calls) - calls, ctx.features.counts()))
        videos = sum(len(i.tree.plans) for i in items)
        # the reference was filled before, from the same memory
        assert sum(r["vision/hits"] for r in rows) == videos * stage.epochs
        assert all(r["vision/misses"] == r["vision/disk_hits"] == 0 for r in rows)
    (first, decoded, counts), (second, decoded_again, counts_again) = found
    assert first == second and (decoded, decoded_again) == (videos, 0)
    assert (counts["misses"], counts_again["misses"], counts_again["disk_hits"]) == (videos, 0, videos)
    with pytest.raises(InputError, match="features"):  # rounded ones or not is another training
        ctx.features = FeatureCache(store=None if dtype == "bfloat16" else FeatureStore(tmp_path, 1, "bfloat16"))
        finished(stage, ctx, items)


@pytest.mark.parametrize(("vision_lora", "kept"), [(False, 0), (False, 1 << 30), (True, 0)])
def test_decoding_ahead_changes_nothing(
    tmp_path: Path, tiny_path: str, items: list[Item], reader, monkeypatch, vision_lora: bool, kept: int
) -> None:
    """Losses bit by bit, with few and many workers; each video is still decoded as often, and no more, by the workers
    where there are any."""
    threads: list[str] = []
    pixels = type(reader).pixels
    monkeypatch.setattr(
        type(reader), "pixels", lambda *a: threads.append(threading.current_thread().name) or pixels(*a)
    )
    found = []
    changes = {"vision_lora": True, "objective": ObjectiveConfig("sft", {})} if vision_lora else {}
    for workers, ahead in ((0, 1), (1, 1), (3, 8)):
        out = tmp_path / str(workers)
        ctx, stage, calls = make_context(out, reader), make_stage(tiny_path, **changes), len(reader.calls)
        ctx.loader = LoaderConfig(workers=workers, ahead=ahead)
        ctx.features = FeatureCache(max_bytes=kept)  # 0 keeps nothing: every epoch decodes
        threads.clear()
        bundle = fresh(tiny_path, stage)
        store = None if vision_lora else filled(bundle, items, ctx, out / "store")
        filling = len(threads)  # without a loader
        run_stage(stage, ctx, bundle, items, store)
        # with all kept the fill has decoded everything; with nothing kept what comes twice in a row is not foreseen
        assert (WORKER in threads[filling:]) == (workers > 0 and not kept)
        assert vision_lora <= ({name == WORKER for name in threads} == {workers > 0})
        found.append(([r["loss"] for r in rows_of(out / stage.name)], len(reader.calls) - calls))
    assert found[0] == found[1] == found[2]
    videos = sum(len(i.tree.plans) for i in items)
    assert found[0][1] == videos * (1 if kept else stage.epochs + (not vision_lora))


def test_windows_of_length_are_another_training(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    _, folder = train(tmp_path / "w", tiny_path, items, reader, stage_changes={"epochs": 1}, length_window=9)
    lengths = [i.tree.n_tokens for i in items]
    steps = plan_steps([i.n_pairs for i in items], 3, 7, "stage1_r16", 1, lengths=lengths, window=9)
    seen = [row["num_tokens"] for row in rows_of(folder)]
    assert seen == list(accumulate(sum(lengths[i] for i in step) for step in steps))
    assert steps != plan_steps([i.n_pairs for i in items], 3, 7, "stage1_r16", 1)
    ctx, stage = make_context(tmp_path / "w" / "train", reader), make_stage(tiny_path, epochs=1)
    with pytest.raises(InputError, match="length_window is None now and was 9"):
        finished(stage, ctx, items)


def test_one_call_of_the_tower_for_a_micro_batch(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    losses, calls = [], []
    for batched in (False, True):
        ctx, stage = make_context(tmp_path / str(batched), reader, max_tokens=4096), make_stage(tiny_path, batch_size=7)
        ctx.features = FeatureCache(max_bytes=0, batched=batched)
        bundle, seen = fresh(tiny_path, stage), []
        store = filled(bundle, items, ctx, tmp_path / str(batched) / "store")
        bundle.family.vision_tower(bundle.model).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        run_stage(stage, ctx, bundle, items, store)
        losses.append([r["loss"] for r in rows_of(tmp_path / str(batched) / stage.name)])
        calls.append(len(seen))
    assert calls == [3 * stage.epochs, stage.epochs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with pytest.raises(InputError, match="batched_features is None now and was True"):
        ctx.features = FeatureCache()
        finished(stage, ctx, items)


def test_sft_with_vision_lora(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    single = [Item(dataclasses.replace(i.tree, branches=i.tree.branches[:1]), ["sft"]) for i in items]
    changes = {
        "name": "sft",
        "r": 0,
        "objective": ObjectiveConfig("sft", {}),
        "vision_lora": True,
        "epochs": 8,
        "batch_size": 4,
    }
    result, folder = train(tmp_path, tiny_path, single, reader, stage_changes=changes)
    assert result["loss_last"] < 0.7 * result["loss_first"]
    from safetensors.torch import load_file

    weights = load_file(str(folder / "adapter" / "adapter_model.safetensors"))
    moved = [n for n, w in weights.items() if "visual" in n and "lora_B" in n and w.abs().max() > 0]
    assert moved


def test_nan_is_named_and_stops(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    ctx, stage = make_context(tmp_path, reader), make_stage(tiny_path)
    bundle = fresh(tiny_path, stage)
    store = filled(bundle, items, ctx, tmp_path / "store")
    with torch.no_grad():
        next(p for n, p in bundle.model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(InputError, match=r"train\.stage1_r16: the loss is nan at step 1 \(records r\d"):
        run_stage(stage, ctx, bundle, items, store)


def test_checkpoint_of_another_config_is_refused(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    with pytest.raises(Interrupted):
        train(tmp_path, tiny_path, items, reader, stopper=StopAt(3))
    with pytest.raises(InputError, match="another configuration: stage.learning_rate is 0.001 now and was 0.005"):
        train(tmp_path, tiny_path, items, reader, stage_changes={"learning_rate": 1e-3})
    result, _ = train(tmp_path, tiny_path, items, reader)
    ctx, stage = make_context(tmp_path / "train", reader), make_stage(tiny_path)
    assert finished(stage, ctx, items) == result
    with pytest.raises(InputError, match="another configuration: data is"):
        finished(stage, ctx, items[:2])


def test_too_long_is_named_before_decoding(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    ctx, stage = make_context(tmp_path, reader, max_tokens=40), make_stage(tiny_path)
    with pytest.raises(InputError, match=r"record r\d: \d+ tokens exceed train.max_tokens 40"):
        run_stage(stage, ctx, fresh(tiny_path, stage), items, None)
    assert reader.calls == []


def test_unknown_objective(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    with pytest.raises(InputError, match="train.objective: unknown objective 'dop'"):
        train(tmp_path, tiny_path, items, reader, stage_changes={"objective": ObjectiveConfig("dop", {})})


def test_merged_model_is_base_plus_adapter(tmp_path: Path, tiny_path: str, items: list[Item], reader) -> None:
    _, folder = train(tmp_path, tiny_path, items, reader)
    errors = merge_lora(tiny_path, folder / "adapter", tmp_path / "merged", device="cpu")
    assert errors == {"max_rounding_error": 0.0, "max_relative_error": 0.0, "update_error": 0.0}
    merged = load_bundle(str(tmp_path / "merged"), "float32", "cpu")
    wrapped = copy.copy(load_bundle(tiny_path, "float32", "cpu"))
    load_lora(wrapped, folder / "adapter", trainable=False)
    tree = items[3].tree
    ids, positions = tree.prompt.input_ids[None], tree.prompt.position_ids[:, None]
    visual = torch.zeros_like(ids, dtype=torch.bool)
    with torch.no_grad():
        a = merged.family.hidden_states(merged.model, ids, positions, None, visual, None)
        b = wrapped.family.hidden_states(wrapped.model.eval(), ids, positions, None, visual, None)
        base = load_bundle(tiny_path, "float32", "cpu")
        c = base.family.hidden_states(base.model, ids, positions, None, visual, None)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (a - c).abs().max() > 1e-2
    assert merged.tokenizer.get_vocab() == base.tokenizer.get_vocab()
