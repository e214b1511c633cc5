"""What stages train on: drawn, mixed, replayed, held out; and what of a configuration is refused."""

import pickle
import threading
from typing import Any

import pytest
import torch
from curricula import Reader, records
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.config import AdaptiveConfig, RunConfig, SFTConfig, StageConfig, StageObjectiveConfig
from tempo_fast.config.curriculum import easier_before, needed_r, objective_of
from tempo_fast.errors import InputError
from tempo_fast.models.family import Grid, Prompt
from tempo_fast.runtime.ranks import Ranks
from tempo_fast.training.adaptive import budget_of
from tempo_fast.training.data import preference_items
from tempo_fast.training.item import Item, Trees
from tempo_fast.training.sft import Interleaved
from tempo_fast.training.stages import choose, draw, mixed, stage_name
from tempo_fast.trees.layout import Branch, ResponseTree


class Plan:
    def __init__(self, key: str) -> None:
        self.key = key


def item(video: int, r: int, kinds: list[str]) -> Item:
    prompt = Prompt(torch.arange(5), torch.arange(5).expand(3, -1), torch.zeros(5, dtype=torch.bool))
    branches = [Branch.of([7, video, r, k]) for k in range(1 + len(kinds))]
    return Item(ResponseTree(f"v{video}-r{r}", prompt, branches, [Plan(f"v{video}")]), kinds, r)


KINDS = ["drop", "shuffle", "reverse"]


def pool_of(videos: int) -> Any:
    """Records of 1 to 3 pairs, cut down to the kinds asked for."""

    def pool(r: int, kinds: tuple[str, ...]) -> list[Item]:
        all_kinds = [KINDS[: 1 + (v + r) % 3] for v in range(videos)]
        kept = [[k for k in row if not kinds or k in kinds] for row in all_kinds]
        return [item(v, r, row) for v, row in enumerate(kept) if row]

    return pool


OFF, ON = AdaptiveConfig(), AdaptiveConfig(every=2, holdout=0.2, max_records=0)


def pairs(items: list[Item]) -> int:
    return sum(i.n_pairs for i in items)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.floats(0, 150), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_a_draw_comes_as_close_as_records_allow(sizes: list[int], wanted: float, seed: int) -> None:
    items = [item(i, 4, KINDS[:n]) for i, n in enumerate(sizes)]
    drawn = draw(items, wanted, seed)
    places = [items.index(i) for i in drawn]
    assert places == sorted(set(places)) and drawn
    assert len(drawn) in (1, len(items)) or abs(pairs(drawn) - wanted) <= 1.5
    assert len(drawn) < len(items) or pairs(drawn) <= wanted + 1.5 or len(items) == 1
    assert draw(items, wanted, seed) == drawn


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=4), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_mixtures_have_their_proportions(weights: list[float], seed: int) -> None:
    parts = [pool_of(60 + 20 * k)(2**k, ()) for k in range(len(weights))]
    drawn = mixed(parts, weights, seed, "s")
    sizes = [pairs([i for i in drawn if i.r == 2**k]) for k in range(len(weights))]
    unit = min(pairs(part) / w for part, w in zip(parts, weights, strict=True))
    assert all(abs(size - unit * w) <= 3 for size, w in zip(sizes, weights, strict=True))
    full = [k for k, part in enumerate(parts) if sizes[k] == pairs(part)]
    assert full and len({i.id for i in drawn}) == len(drawn)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_replay_is_a_share_of_easier_pairs_of_earlier_stages(share: float) -> None:
    stages = [
        StageConfig(r=2),  # harder than the last: not replayed
        StageConfig(r=16, kinds=["drop"]),
        StageConfig(r=[8, 16]),
        StageConfig(r=4, replay=share),
    ]
    chosen = choose(stages, 3, pool_of(60), OFF, seed=0)
    own = [i for i in chosen.trained if i.r == 4]
    assert own == chosen.own and {i.r for i in chosen.replayed} <= {8, 16}
    assert {i.r for i in chosen.replayed} == {8, 16} and len({i.id for i in chosen.replayed}) == len(chosen.replayed)
    there = pairs(chosen.replayed)
    assert abs(there / (there + pairs(own)) - share) < 3 / pairs(own)
    assert [i.id for i in choose(stages, 3, pool_of(60), OFF, 1).replayed] != [i.id for i in chosen.replayed]
    audit = chosen.audit()
    assert audit["pairs"] == there + pairs(own) and audit["replayed"]["pairs"] == there
    assert sum(n for row in audit["r"].values() for n in row["pairs"].values()) == audit["pairs"]
    assert list(audit["r"]) == sorted(audit["r"], key=int, reverse=True)
    plain_stage = [[i.id for i in choose(stages, 2, pool_of(9), OFF, seed).trained] for seed in (0, 1)]
    assert plain_stage[0] == plain_stage[1] and len(plain_stage[0]) == 18  # nothing is drawn where all are taken


def test_all_there_is_is_replayed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    stages = [StageConfig(r=8, kinds=["reverse"]), StageConfig(r=4, replay=0.9)]
    chosen = choose(stages, 1, pool_of(12), OFF, 0)
    assert {i.r for i in chosen.replayed} == {8} and len(chosen.replayed) == 4
    assert "stage2_r4: all 4 easier pairs are replayed" in caplog.text


def test_held_out_videos_are_never_trained_on_in_any_stage_of_any_seed() -> None:
    stages = [StageConfig(r=16), StageConfig(r=[8, 4], mix=[1, 2]), StageConfig(r=2, replay=0.5)]
    trained, held = set(), set()
    for seed in (0, 1):
        for index in range(3):
            chosen = choose(stages, index, pool_of(80), ON, seed)
            trained |= {i.group for i in chosen.trained}
            held |= {i.group for i in chosen.held_out}
            assert {i.r for i in chosen.held_out} == set(stages[index].rs)
    assert not trained & held and 5 <= len(held) <= 30 and len(trained | held) == 80
    few = choose(stages, 1, pool_of(80), AdaptiveConfig(every=2, holdout=0.2, max_records=7), 0)
    assert len(few.held_out) == 7 and not {i.group for i in few.trained} & held
    with pytest.raises(InputError, match="of 2 records of stage1_r16 0 are held out by 0.0001.* nothing to look at"):
        choose(stages, 0, pool_of(2), AdaptiveConfig(every=1, holdout=1e-4), 0)
    with pytest.raises(InputError, match="nothing to train on"):
        choose(stages, 0, pool_of(2), AdaptiveConfig(every=1, holdout=0.9999), 0)


@given(st.integers(1, 400), st.lists(st.integers(1, 100), min_size=1, max_size=6))
def test_budgets_are_shared_out_and_what_is_left_goes_on(budget: int, wanted: list[int]) -> None:
    config = AdaptiveConfig(every=1, max_steps=max(budget, len(wanted)))
    spent = 0
    for i, steps in enumerate(wanted):
        limit = budget_of(config, len(wanted) - i, spent)
        assert limit >= 1
        spent += min(steps, limit)
    assert spent <= config.max_steps
    assert budget_of(AdaptiveConfig(max_steps=9), 3, 0) == 0  # off
    if all(steps == 100 for steps in wanted):
        assert config.max_steps - spent < len(wanted) or spent == 100 * len(wanted)


@given(st.integers(0, 40), st.sampled_from([0.1, 0.25, 0.3, 1.0, 1.5, 2.0]), st.integers(0, 30), st.integers(0, 9))
def test_sft_stands_between_at_its_ratio(n: int, ratio: float, batches: int, taken: int) -> None:
    steps = [[k] for k in range(n)]
    kept = [[b] for b in range(batches)][taken:]
    woven = Interleaved([], kept, ratio, 1e-3).weave(steps, 1000)
    assert [s for s in woven if s[0] < 1000] == steps
    assert [s for s in woven if s[0] >= 1000] == [[1000 + b[0]] for b in kept][: len(woven) - n]
    for k in range(1, n + 1):
        behind = woven[: woven.index([k - 1]) + 1]
        before = sum(s[0] >= 1000 for s in behind)
        assert before == min(len(kept), int((k - 1) * round(ratio * 100)) // 100)
    assert len(woven) - n == min(len(kept), n * round(ratio * 100) // 100)


def test_names_and_files() -> None:
    stages = [StageConfig(r=16), StageConfig(r=[8, 16]), StageConfig(r=4)]
    assert [stage_name(i, s.r) for i, s in enumerate(stages)] == ["stage1_r16", "stage2_r8_16", "stage3_r4"]
    assert needed_r(stages) == [16, 8, 4]
    common = RunConfig().train.objective
    own = StageConfig(objective=StageObjectiveConfig(options={"beta": 0.5}))
    assert objective_of(own, common).options == {"beta": 0.5, "sft_weight": 1.0}
    other = StageConfig(objective=StageObjectiveConfig("ipo"))
    assert (objective_of(other, common).name, objective_of(other, common).options) == ("ipo", {})
    assert objective_of(StageConfig(), common) == common


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([StageConfig(r=3)], r"train.stages\[0\].r must be one of pairs.r \[16, 8, 4, 2\], got 3"),
        ([StageConfig(r=[])], r"train.stages\[0\].r must be one r or several"),
        ([StageConfig(r=[4, 4])], "r must be each r once"),
        ([StageConfig(r=[4, 2], mix=[1])], r"mix must be one weight for each of r \[4, 2\]"),
        ([StageConfig(r=[4, 2], mix=[1, 0])], "mix must be above 0"),
        ([StageConfig(kinds=["dorp"])], r"kinds must be of pairs.kinds \['drop', 'shuffle', 'reverse'\], got 'dorp'"),
        ([StageConfig(kinds=["drop", "drop"])], "each kind once"),
        ([StageConfig(r=4, replay=0.2)], "replay must be 0 where no earlier stage has an r above 4"),
        ([StageConfig(r=2), StageConfig(r=4, replay=0.2)], r"stages\[1\].replay must be 0"),
        ([StageConfig(r=4), StageConfig(r=2, replay=1.0)], r"replay must be in \[0, 1\)"),
        ([StageConfig(max_steps=-1)], r"stages\[0\].max_steps must be 0 or more"),
    ],
)
def test_stages_that_cannot_be(stages: list[StageConfig], said: str) -> None:
    config = RunConfig()
    config.train.stages = stages
    with pytest.raises(InputError, match=said):
        config.validate()


def test_other_values_that_cannot_be() -> None:
    for changes, said in (
        ({"adaptive": AdaptiveConfig(every=-1)}, "adaptive.every must be 0 or more"),
        ({"adaptive": AdaptiveConfig(holdout=1)}, r"adaptive.holdout must be in \(0, 1\)"),
        ({"adaptive": AdaptiveConfig(threshold=0)}, "adaptive.threshold must be above 0"),
        ({"adaptive": AdaptiveConfig(max_steps=3)}, "adaptive.max_steps must be a step a stage"),
        ({"sft": SFTConfig(ratio=0)}, "sft.ratio must be above 0"),
        ({"sft": SFTConfig(when="interleaved"), "stages": []}, "sft.when must be after or before without stages"),
    ):
        config = RunConfig()
        for key, value in changes.items():
            setattr(config.train, key, value)
        with pytest.raises(InputError, match=said):
            config.validate()


@st.composite
def trees(draw_: Any) -> ResponseTree:
    n = draw_(st.integers(1, 60))
    integers = lambda top: st.lists(st.integers(0, top), min_size=n, max_size=n)  # noqa: E731
    prompt = Prompt(
        torch.tensor(draw_(integers(151_000))),
        torch.tensor([draw_(integers(20_000)) for _ in range(3)]),
        torch.tensor(draw_(st.lists(st.booleans(), min_size=n, max_size=n))),
        [Grid(2, 4, 6)] * draw_(st.integers(0, 2)),
    )
    branches = []
    for ids in draw_(st.lists(st.lists(st.integers(0, 151_000), min_size=1, max_size=9), min_size=1, max_size=4)):
        marks = draw_(st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=len(ids), max_size=len(ids))))
        branches.append(Branch.of(ids, marks))
    first = len(branches[0].input_ids)
    marks_of = st.lists(st.integers(0, 2), min_size=first, max_size=first)
    pair_spans = [draw_(marks_of) for _ in branches[1:]] if draw_(st.booleans()) else []
    unaligned = draw_(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), max_size=2))
    return ResponseTree(draw_(st.text(max_size=5)), prompt, branches, [], unaligned, pair_spans)


def plain(tree: ResponseTree) -> Any:
    p = tree.prompt
    tensors = [(x.dtype, x.shape, x.tolist()) for x in (p.input_ids, p.position_ids, p.visual)]
    return (tensors, p.grids, [vars(b) for b in tree.branches], tree.pair_spans, tree.unaligned, tree.id, tree.plans)


@given(trees(), trees())
@settings(deadline=None, max_examples=60)
def test_packed_trees_come_back(one: ResponseTree, other: ResponseTree) -> None:
    want, kinds = plain(one), ["drop"] * max(1, len(one.branches) - 1)
    packed, second = Item(one, kinds, 4), Item(other, kinds, 4)
    assert packed.tree is one  # while somebody holds it
    sizes = (packed.n_tokens, one.n_tokens)
    assert (packed.digest == second.digest) == (want == plain(other))
    del one
    assert plain(packed.tree) == want and sizes[0] == sizes[1] == packed.tree.n_tokens
    copied = pickle.loads(pickle.dumps(packed))
    assert plain(copied.tree) == want and copied.digest == packed.digest
    held = packed.tree
    assert Trees([packed, second])[0] is held and len(Trees([packed, second])[1:]) == 1


def test_long_prompts_take_little_memory(tiny: Any, plan_type: Any) -> None:
    from tempo_fast.trees.layout import build_tree

    plan = plan_type("v", 60, 28 * 12, 28 * 15)
    say = {"id": "i", "prompt_text": "Describe.", "answers": ["It moves."], "plans": [plan]}
    tree = build_tree(tiny.family, tiny.tokenizer, tiny.config, **say)
    p = tree.prompt
    tensors = sum(x.numel() * x.element_size() for x in (p.input_ids, p.position_ids, p.visual))
    assert tree.n_tokens > 5000 and len(pickle.dumps(Item(tree, ["sft"])._packed)) < tensors / 40


class Together(Ranks):
    """One of two ranks that are threads of this process."""

    gate = threading.Barrier(2)
    said: list[Any] = [None, None]

    def all_gather_object(self, value: Any) -> list[Any]:
        self.said[self.rank] = pickle.dumps(value)
        self.gate.wait(20)
        out = [pickle.loads(x) for x in self.said]
        self.gate.wait(20)
        return out


def test_ranks_share_the_reading(tiny: Any, plan_type: Any, reader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempo_fast.training.data._TOGETHER", 4)
    every = records(4, 7) + records(2, 7)
    alone = preference_items(tiny, Reader(reader, plan_type, ("v3", "v6")), every)
    found: dict[int, Any] = {}
    asked: dict[int, list[str]] = {0: [], 1: []}

    def work(rank: int) -> None:
        class Counting(Reader):
            def plan(self, video: str) -> Any:
                asked[rank].append(video)
                return super().plan(video)

        source = Counting(reader, plan_type, ("v3", "v6"))
        found[rank] = preference_items(tiny, source, every, ranks=Together(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for rank in (0, 1):
        assert [i.digest for i in found[rank].items] == [i.digest for i in alone.items]
        assert [plain(i.tree)[:-1] for i in found[rank].items] == [plain(i.tree)[:-1] for i in alone.items]
        assert found[rank].quarantined == alone.quarantined and len(alone.quarantined) == 2
    assert sorted(asked[0] + asked[1]) == [f"v{i}" for i in range(7)]  # each video by one of them, once


def test_replay_takes_a_difficulty_once() -> None:
    def of(*kinds: list[str]) -> list[Any]:
        return easier_before([*(StageConfig(r=16, kinds=k) for k in kinds), StageConfig(r=4)], len(kinds))

    assert of(["drop"], ["shuffle", "drop"]) == [(16, ("drop", "shuffle"))]
    assert of(["drop"], []) == of([], ["drop"]) == of([]) == [(16, ())]
    assert of() == []
