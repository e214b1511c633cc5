"""Curricula other than the default: single, reversed, mixed, replayed, by stage; adaptive; SFT before and between."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from curricula import After, curriculum, first_row, rows_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tempo_fast.config import AdaptiveConfig, LoraConfig, StageConfig, StageObjectiveConfig
from tempo_fast.errors import Interrupted
from tempo_fast.files import file_digest, read_json
from tempo_fast.models.load import load_bundle, weights_digest
from tempo_fast.training.adapters import load_lora
from tempo_fast.training.curriculum import Curriculum, Outcome


@pytest.fixture
def make(tiny_path: str, reader: Any, plan_type: Any) -> Any:
    def build(folder: Path, stages: list[StageConfig], **changes: Any) -> Curriculum:
        return curriculum(folder, tiny_path, reader, plan_type, **{"sft": False, "train__stages": stages, **changes})

    return build


def data_of(folder: Path, outcome: Outcome) -> list[dict]:
    """The audits of the stages, as on disk."""
    rows = [read_json(folder / "train" / s["name"] / "stage.json") for s in outcome.stages]
    assert rows == outcome.stages
    return [row["data"] for row in rows]


def test_single_reversed_mixed_and_by_kind(tmp_path: Path, make: Any) -> None:
    def all_of(r: int) -> dict:
        return {str(r): {"records": 3, "pairs": {"drop": 3, "shuffle": 3}}}

    single = make(tmp_path / "single", [StageConfig(r=4)]).run()
    assert data_of(tmp_path / "single", single) == [{"records": 3, "pairs": 6, "r": all_of(4)}]

    turned = make(tmp_path / "turned", [StageConfig(r=2), StageConfig(r=4, max_steps=1)]).run()
    assert [s["name"] for s in turned.stages] == ["stage1_r2", "stage2_r4"]
    assert turned.stages[1]["steps"] == 1 < turned.stages[0]["steps"]

    stages = [StageConfig(r=[4, 2], kinds=["drop"]), StageConfig(r=2, replay=0.5, epochs=2)]
    both = make(tmp_path / "mixed", stages).run()
    assert [s["name"] for s in both.stages] == ["stage1_r4_2", "stage2_r2"] and both.stages[0]["r"] == [4, 2]
    drops = {str(r): {"records": 3, "pairs": {"drop": 3}} for r in (4, 2)}
    first, second = data_of(tmp_path / "mixed", both)
    assert first == {"records": 6, "pairs": 6, "r": drops}
    # three easier pairs are all there are: less than half
    replayed = {"4": {"records": 3, "pairs": {"drop": 3}}}
    assert second == {
        "records": 6,
        "pairs": 9,
        "r": {**replayed, **all_of(2)},
        "replayed": {"records": 3, "pairs": 3, "r": replayed},
    }
    seen = [row["epoch"] for row in rows_of(tmp_path / "mixed", "stage2_r2")]
    assert seen[-1] == 2.0 and both.stages[1]["pairs"] == 9
    # a finished run is recognised, whatever was drawn
    assert make(tmp_path / "mixed", stages).run() == both


def test_losses_and_references_of_stages(tmp_path: Path, make: Any, tiny_path: str) -> None:
    stages = [
        StageConfig(r=4, objective=StageObjectiveConfig("leanpo"), learning_rate=2e-3),
        StageConfig(r=4, objective=StageObjectiveConfig("ipo", {"beta": 0.2})),
        StageConfig(r=2, reference="previous_stage"),
        StageConfig(r=2),
    ]
    c = make(tmp_path, stages)
    assert [row["stage"] for row in c.fill_reference()] == ["stage2_r4"]  # LeanPO needs none, r = 2 waits for a merge
    outcome = c.run()
    assert [s["reference"]["read_misses"] for s in outcome.stages] == [0] * 4
    assert outcome.stages[0]["reference"]["misses"] == 0
    merged = str(tmp_path / "train" / "stage2_r4" / "merged")
    assert [s["base"] for s in outcome.stages] == [tiny_path, tiny_path, merged, merged]
    assert set(outcome.stages[1]["merge"]) == {"max_rounding_error", "max_relative_error", "update_error"}
    assert "merge" not in outcome.stages[0] and "merge" in outcome.stages[3]
    # the LoRA goes on into stage 2 and 4 and is new in 3
    assert abs(first_row(tmp_path, "stage2_r4")["rewards/chosen"]) > 1e-4
    assert abs(first_row(tmp_path, "stage3_r2")["rewards/chosen"]) < 1e-5
    assert abs(first_row(tmp_path, "stage4_r2")["rewards/chosen"]) > 1e-4
    data_of(tmp_path, outcome)


ADAPTIVE = AdaptiveConfig(every=2, holdout=0.3, threshold=2.0, patience=2)
"""The share of right pairs never reaches 2: patience or the steps end a stage."""


def adaptive_run(make: Any, folder: Path, config: AdaptiveConfig, **changes: Any) -> Curriculum:
    stages = [StageConfig(r=4, epochs=4, learning_rate=2e-3), StageConfig(r=2, epochs=4)]
    return make(folder, stages, videos=8, train__adaptive=config, **changes)


def decisions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train" / "decisions.jsonl").read_text().splitlines()]


def test_decisions_end_stages_and_are_written_down(tmp_path: Path, make: Any) -> None:
    c = adaptive_run(make, tmp_path, ADAPTIVE)
    c.fill_reference()
    outcome = c.run()
    rows = decisions_of(tmp_path)
    assert rows == [row for s in outcome.stages for row in s["decisions"]]
    for stage in outcome.stages:
        looks = stage["decisions"]
        assert [row["step"] for row in looks[:-1]] == list(range(2, 2 * len(looks), 2))
        assert looks[-1]["step"] == stage["steps"] and looks[-1]["decision"] == "advance"
        assert {row["decision"] for row in looks[:-1]} <= {"go on"}
        values = [row["accuracy"]["value"] for row in looks]
        assert [row["best"] for row in looks] == [max(values[: k + 1]) for k in range(len(values))]
        # by hand: the first look at which the two before it have not been better
        ends = [k for k in range(len(values)) if k - values.index(max(values[: k + 1])) >= 2]
        assert looks[-1]["why"].endswith("steps are over") if not ends else ends[0] == len(values) - 1
        held = stage["data"]["held_out"]
        assert held["pairs"] == looks[0]["accuracy"]["items"] and looks[0]["accuracy"]["n"] == held["records"]
        shares = looks[0]["accuracy"]
        assert 0 <= shares["lo"] <= shares["value"] <= shares["hi"] <= 1
        assert sum(k["items"] for k in looks[0]["kinds"].values()) == held["pairs"]
    # the whole is also resumed when it is finished
    assert adaptive_run(make, tmp_path, ADAPTIVE).run() == outcome and decisions_of(tmp_path) == rows


def test_a_threshold_and_a_budget(tmp_path: Path, make: Any) -> None:
    low = adaptive_run(make, tmp_path / "low", AdaptiveConfig(every=3, holdout=0.3, threshold=1e-6)).run()
    assert [s["steps"] for s in low.stages] == [3, 3]
    assert all("at least the threshold" in s["decisions"][0]["why"] for s in low.stages)
    never = AdaptiveConfig(every=2, holdout=0.3, threshold=2.0, patience=0, max_steps=9)
    spent = adaptive_run(make, tmp_path / "spent", never).run()
    assert [s["steps"] for s in spent.stages] == [4, 5]  # 9 // 2, then what is left
    assert [row["step"] for row in spent.stages[1]["decisions"]] == [2, 4, 5]


def test_held_out_margins_are_those_of_the_saved_model(tmp_path: Path, make: Any, tiny_path: str, reader: Any) -> None:
    """The last look of a stage against log-softmax over full logits of the model that was saved then."""
    from tempo_fast.trees.batch import collate
    from tempo_fast.trees.forward import tree_hidden
    from tempo_fast.trees.vision import FeatureCache

    c = adaptive_run(make, tmp_path, AdaptiveConfig(every=100, holdout=0.3, threshold=2.0))
    outcome = c.run()
    stage = outcome.stages[0]
    items = c.chosen(0).held_out
    sums_of: dict[str, list[list[float]]] = {}  # of each record: with the adapter, without
    for adapter in (stage["adapter"], ""):
        bundle = load_bundle(tiny_path, "float32", "cpu")
        if adapter:
            load_lora(bundle, Path(adapter), trainable=False)
        bundle.model.eval()
        for item in items:
            packed = collate([item.tree])
            with torch.no_grad():
                visual = FeatureCache().features(bundle.family, bundle.model, reader, packed.plans)
                hidden = tree_hidden(bundle.family, bundle.model, packed, visual)
                logits = hidden.double() @ bundle.family.head(bundle.model).weight.double().T
                logp = logits.log_softmax(-1).gather(1, packed.labels[:, None])[:, 0]
            sums = [float(logp[packed.branch == b].sum()) for b in range(packed.n_branches)]
            sums_of.setdefault(item.id, []).append(sums)
    right = 0
    for tuned, base in sums_of.values():
        gains = [t - b for t, b in zip(tuned, base, strict=True)]
        right += sum(gains[0] > gain for gain in gains[1:])
    assert stage["decisions"][-1]["accuracy"]["value"] == pytest.approx(right / stage["data"]["held_out"]["pairs"])
    assert 0 < right


@pytest.mark.parametrize("looks", [9, 12, 14, 17])
def test_resumed_runs_decide_the_same(tmp_path: Path, make: Any, looks: int) -> None:
    """With SFT between: the batches, the decisions and the weights of an undisturbed run, whenever it was stopped."""
    changes = {"sft": True, "train__save_steps": 3}

    def run(name: str, **more: Any) -> Outcome:
        c = adaptive_run(make, tmp_path / name, ADAPTIVE, **changes, **more)
        c.config.train.sft.when, c.config.train.sft.ratio, c.config.train.sft.control = "interleaved", 0.5, False
        return c.run()

    whole = run("a")
    with pytest.raises(Interrupted):
        run("b", stopper=After(looks))
    again = run("b")
    assert decisions_of(tmp_path / "b") == decisions_of(tmp_path / "a")
    assert weights_digest(again.merged) == weights_digest(whole.merged)
    for name in ("stage1_r4", "stage2_r2"):
        one, two = (
            [(r.get("loss"), r.get("sft/loss"), r["num_tokens"]) for r in rows_of(tmp_path / k, name)] for k in "ab"
        )
        assert one == two


def test_sft_first(tmp_path: Path, make: Any, tiny_path: str) -> None:
    def build(name: str) -> Curriculum:
        c = make(tmp_path / name, [StageConfig(r=4), StageConfig(r=2)], sft=True)
        c.config.train.sft.when = "before"
        return c

    c = build("a")
    assert c.fill_reference() == []  # of a model that is not there yet
    outcome = c.run()
    assert outcome.sft["name"] == "sft_first" and outcome.sft["base"] == tiny_path and outcome.control is None
    first = str(tmp_path / "a" / "train" / "sft_merged")
    assert [s["base"] for s in outcome.stages] == [first, first]
    assert outcome.merged == str(tmp_path / "a" / "train" / "merged")
    # the reference is the SFT model: rewards start at zero, and the statistics of the base are not read
    assert abs(first_row(tmp_path / "a", "stage1_r4")["rewards/chosen"]) < 1e-5
    assert outcome.stages[0]["reference"]["misses"] == 9
    assert len({weights_digest(p) for p in (tiny_path, first, outcome.merged)}) == 3
    for looks in (3, 6, 9):
        with pytest.raises(Interrupted):
            c = build(str(looks))
            c.ctx.stopper = After(looks)
            c.run()
        assert weights_digest(build(str(looks)).run().merged) == weights_digest(outcome.merged)


def test_sft_between(tmp_path: Path, make: Any, tiny_path: str) -> None:
    c = make(tmp_path, [StageConfig(r=4, epochs=2), StageConfig(r=2, epochs=2)], sft=True, videos=4)
    sft = c.config.train.sft
    sft.when, sft.ratio, sft.learning_rate, sft.epochs = "interleaved", 0.5, 5e-3, 3
    outcome = c.run()
    rows = [row for s in outcome.stages for row in rows_of(tmp_path, s["name"])]
    between = [row for row in rows if "sft/loss" in row]
    assert all(("loss" in row) != ("sft/loss" in row) for row in rows)
    preferred = [row for row in rows if "loss" in row]
    assert len(between) == sum(s["sft_steps"] for s in outcome.stages) == 6  # 3 passes of 4 records, two at a time
    assert len(preferred) == 16 and [s["pairs"] for s in outcome.stages] == [8, 8]
    kinds = ["sft" if "sft/loss" in row else "pair" for row in rows_of(tmp_path, "stage1_r4")]
    assert kinds[:7] == ["pair", "pair", "sft", "pair", "pair", "sft", "pair"]
    assert between[-1]["sft/loss"] < between[0]["sft/loss"]
    peaks = [max(row["learning_rate"] for row in some) for some in (between, preferred)]
    assert peaks[0] > 2 * peaks[1]
    assert outcome.sft is None and outcome.control["steps"] == 6 and outcome.control["base"] == tiny_path
    assert outcome.stages[0]["loss_last"] > 0 and outcome.stages[1]["base"] == tiny_path
    assert file_digest(tmp_path / "train" / "stage2_r2" / "adapter" / "adapter_model.safetensors")


class Logits(TorchDispatchMode):
    """Whether any operator makes a tensor of half as many rows over the vocabulary as there are tokens, or more."""

    def __init__(self, tokens: int, head: torch.Tensor) -> None:
        super().__init__()
        self.tokens, self.head = tokens, tuple(head.shape)
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                wide = self.head[0] in x.shape and set(x.shape) != set(self.head)
                if wide and x.numel() >= self.tokens * self.head[0] // 2:
                    self.found.append(tuple(x.shape))
        return out


@pytest.mark.parametrize("head_trains", [False, True])
def test_sft_makes_no_logits(
    tmp_path: Path, make: Any, tiny_path: str, reader: Any, monkeypatch: pytest.MonkeyPatch, head_trains: bool
) -> None:
    """A step of the SFT stage, forward and backward, with the head frozen and trained; the eager head would be seen."""
    import tempo_kernels.head
    from tempo_fast.training.adapters import attach_lora
    from tempo_fast.training.data import branch_batch
    from tempo_fast.training.module import TrainModule
    from tempo_fast.trees.batch import collate
    from tempo_fast.trees.vision import prepare_pixels
    from tempo_kernels import sweep
    from tempo_kernels.objectives import make_objective

    monkeypatch.setattr(sweep, "SLICE", 16)
    taken: list[str] = []
    for name in ("one_pass_logp", "recompute_logp", "eager_logp"):
        path = getattr(tempo_kernels.head, name)
        monkeypatch.setattr(
            tempo_kernels.head, name, lambda *a, path=path, name=name, **k: taken.append(name) or path(*a, **k)
        )
    items = make(tmp_path, [], sft=True, videos=8).sft_trees()
    bundle = load_bundle(tiny_path, "float32", "cpu")
    attach_lora(bundle, LoraConfig(r=4, alpha=8, dropout=0.0), seed=0, vision=True)
    head = bundle.family.head(bundle.model).weight
    head.requires_grad_(head_trains)
    packed = collate([i.tree for i in items])  # no branches beside an answer: rows of prompt and answer
    assert all(len(branches) == 1 for branches in packed.tree_branches)
    batch, kinds = branch_batch(items, packed)
    module = TrainModule(bundle.model, bundle.family, make_objective("sft"))
    pixels = prepare_pixels(reader, packed.plans, bundle.device, bundle.dtype)
    with Logits(len(packed.labels), head) as seen:
        loss, sums = module(packed, batch, kinds, pixels=pixels)
        loss.backward()
    assert not seen.found
    assert taken == ["recompute_logp" if head_trains else "one_pass_logp"]
    assert (head.grad is not None and bool(head.grad.any())) == head_trains
    trained = [n for n, p in bundle.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("visual" in n for n in trained) and any("layers" in n for n in trained)
    # against the whole logits, which the same watch sees
    with Logits(len(packed.labels), head) as seen:
        hidden = torch.zeros(len(packed.labels), head.shape[1])
        tempo_kernels.head.linear_logp(hidden, head, packed.labels, impl="eager")
    assert seen.found
    assert sums.means()["loss"] == pytest.approx(float(loss.detach()) / 8)
