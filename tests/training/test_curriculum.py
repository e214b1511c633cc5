"""The order of stages, both kinds of reference, what is reused and what is refused."""

from pathlib import Path

import pytest
from curricula import After, Reader, curriculum, first_row

from tempo_fast.errors import InputError, Interrupted
from tempo_fast.models.load import weights_digest


def test_base_reference(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    c = curriculum(tmp_path, tiny_path, reader, plan_type)
    fills = c.fill_reference()
    # each chosen answer is computed once in the whole run
    assert [f["chosen_misses"] for f in fills] == [3, 0] and [f["chosen_hits"] for f in fills] == [0, 3]
    assert [f["misses"] for f in fills] == [9, 6]
    outcome = c.run()
    one, two = outcome.stages
    assert [s["name"] for s in outcome.stages] == ["stage1_r4", "stage2_r2"]
    assert one["base"] == two["base"] == tiny_path
    assert one["reference"]["misses"] == 9 and one["reference"]["read_misses"] == two["reference"]["read_misses"] == 0
    assert abs(first_row(tmp_path, "stage1_r4")["rewards/margins"]) < 1e-5
    # the same adapter goes on: its rewards are not zero when the second stage starts
    assert abs(first_row(tmp_path, "stage2_r2")["rewards/chosen"]) > 1e-4
    assert outcome.sft and outcome.control and outcome.sft["base"] != outcome.control["base"] == tiny_path
    assert outcome.merged.endswith("merged") and weights_digest(outcome.merged) != weights_digest(tiny_path)


def test_previous_stage_reference(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    c = curriculum(tmp_path, tiny_path, reader, plan_type, sft=False, reference__mode="previous_stage")
    assert len(c.fill_reference()) == 1
    outcome = c.run()
    one, two = outcome.stages
    assert outcome.merged == str(tmp_path / "train" / "merged")  # the trained model is there, with SFT or without
    assert two["base"].endswith("stage1_r4/merged") and one["base"] == tiny_path
    assert two["reference"]["chosen_misses"] == 3  # refilled at the boundary
    for stage in ("stage1_r4", "stage2_r2"):
        row = first_row(tmp_path, stage)
        assert abs(row["rewards/chosen"]) < 1e-5 and abs(row["kl/chosen"]) < 1e-5


@pytest.mark.parametrize("looks", [2, 5, 8])
@pytest.mark.parametrize("mode", ["base", "previous_stage"])
def test_interrupted_anywhere_gives_the_same(
    tmp_path: Path, tiny_path: str, reader, plan_type, looks: int, mode: str
) -> None:
    whole = curriculum(tmp_path / "a", tiny_path, reader, plan_type, reference__mode=mode).run()
    with pytest.raises(Interrupted):
        curriculum(tmp_path / "b", tiny_path, reader, plan_type, reference__mode=mode, stopper=After(looks)).run()
    again = curriculum(tmp_path / "b", tiny_path, reader, plan_type, reference__mode=mode).run()
    assert weights_digest(whole.merged) == weights_digest(again.merged)


def test_finished_stages_are_skipped(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    first = curriculum(tmp_path, tiny_path, reader, plan_type).run()
    reader.calls.clear()
    assert curriculum(tmp_path, tiny_path, reader, plan_type).run() == first
    assert reader.calls == []


def test_reference_free_objective_fills_nothing(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    from tempo_fast.config import ObjectiveConfig

    c = curriculum(tmp_path, tiny_path, reader, plan_type, sft=False, train__objective=ObjectiveConfig("leanpo", {}))
    assert c.fill_reference() == []
    assert c.run().stages[0]["reference"]["misses"] == 0
    assert not (tmp_path / "reference").exists()


def test_one_bad_video_is_quarantined(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    outcome = curriculum(tmp_path, tiny_path, reader, plan_type, missing=("v1",)).run()
    assert outcome.quarantined == [{"video": "v1", "reason": "v1: cannot be read"}]
    assert [s["records"] for s in outcome.stages] == [2, 2]
    assert first_row(tmp_path, "stage1_r4")["data/skipped"] == 1


def test_no_usable_video_is_an_error(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    with pytest.raises(InputError, match="pairs: no usable record .first: v0: cannot be read"):
        curriculum(tmp_path, tiny_path, reader, plan_type, missing=("v0", "v1", "v2")).run()


def test_a_video_that_does_not_decode_is_quarantined_once(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    calls = []

    class Broken(Reader):
        def pixels(self, plan):
            calls.append(plan.name)
            if plan.name == "v2":
                raise InputError("v2: damaged at frame 3")
            return super().pixels(plan)

    def start():
        c = curriculum(tmp_path, tiny_path, reader, plan_type)
        c.ctx.reader = c.ctx.checked.reader = Broken(reader, plan_type)
        return c.run()

    first = start()
    assert first.quarantined == [{"video": "v2", "reason": "v2: damaged at frame 3"}]
    assert [s["records"] for s in (*first.stages, first.sft)] == [2, 2, 2]
    assert calls.count("v2") == 1
    # the journal remembers, and the identity of the stages is the same
    assert start() == first
    assert calls.count("v2") == 1


def test_a_signal_stops_the_filling(tmp_path: Path, tiny_path: str, reader, plan_type) -> None:
    changes = {"train__max_tokens": 90}
    whole = curriculum(tmp_path / "a", tiny_path, reader, plan_type, **changes).fill_reference()
    # 3 looks of the decode check, 1 before the stage, then one per pack
    stopped = curriculum(tmp_path / "b", tiny_path, reader, plan_type, stopper=After(6), **changes)
    with pytest.raises(Interrupted):
        stopped.fill_reference()
    some = len(list((tmp_path / "b" / "reference").rglob("*.safetensors")))
    assert 0 < some < len(list((tmp_path / "a" / "reference").rglob("*.safetensors")))
    again = curriculum(tmp_path / "b", tiny_path, reader, plan_type, **changes).fill_reference()
    assert again == whole
