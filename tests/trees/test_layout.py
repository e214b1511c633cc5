"""Records to trees: prompts, answers, spans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tempo_fast.errors import InputError
from tempo_fast.trees.layout import align_spans, build_tree


def build(bundle: Any, answers: list[str], **more: Any) -> Any:
    return build_tree(
        bundle.family, bundle.tokenizer, bundle.config, id="rec7", prompt_text="What happened?", answers=answers, **more
    )


def test_a_tree_holds_the_prompt_once_and_ends_each_answer(tiny: Any, make_plan: Any) -> None:
    plan = make_plan("v", 5, 56, 28)
    tree = build(tiny, ["A red circle.", "It appears."], plans=[plan])
    end = tiny.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [b.input_ids[-1] for b in tree.branches] == [end, end]
    assert tiny.tokenizer.decode(tree.branches[1].input_ids[:-1]) == "It appears."
    assert all(b.spans == [0] * len(b.input_ids) for b in tree.branches)
    # 3 frame pairs of 4 x 2 patches in merged squares of 2 x 2
    assert int(tree.prompt.visual.sum()) == 3 * 2 * 1
    assert tree.n_tokens == len(tree.prompt.input_ids) + sum(len(b.input_ids) for b in tree.branches)
    text = tiny.tokenizer.decode(tree.prompt.input_ids)
    assert text.index("<|video_pad|>") < text.index("What happened?") and text.endswith("assistant\n")


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_answer_names_the_record(tiny: Any, empty: str) -> None:
    with pytest.raises(InputError, match="record rec7: answer 1 is empty"):
        build(tiny, ["fine", empty])
    with pytest.raises(InputError, match="record rec7"):
        build(tiny, [])


def test_spans_become_token_marks(tiny: Any) -> None:
    text = "A red circle moves left. Then a blue square grows."
    words = {"red circle": 1, "blue square": 2}
    spans = [[text.index(w), text.index(w) + len(w)] for w in words]
    tree = build(tiny, [text], spans=[spans])
    for word, mark in words.items():
        marked = [t for t, m in zip(tree.branches[0].input_ids, tree.branches[0].spans, strict=True) if m == mark]
        assert tiny.tokenizer.decode(marked).strip() == word
    assert tree.unaligned == [] and tree.branches[0].spans[-1] == 0


def test_spans_that_cover_no_token_are_reported(tiny: Any) -> None:
    text = "A red circle"
    tree = build(tiny, [text, text], spans=[[[0, 1], [1, 2]], [[3, 3]]])
    # the space belongs to the token of its word, and an empty range to none
    assert tree.unaligned == [(0, 2), (1, 1)]


def test_each_pair_has_marks_of_its_own_on_the_chosen_branch(tiny: Any) -> None:
    text = "A red circle moves left. Then a blue square grows."
    left, right = [2, 12], [32, 43]
    tree = build(tiny, [text, "x", "y", "z"], pair_spans=[[left], [left, right], []])
    assert tree.branches[0].spans == [0] * len(tree.branches[0].input_ids)
    for marks, ranges in zip(tree.pair_spans, ([left], [left, right], []), strict=True):
        assert marks == build(tiny, [text], spans=[ranges]).branches[0].spans
    assert set(tree.pair_spans[1]) == {0, 1, 2} and tree.unaligned == []
    assert build(tiny, [text, "x"]).pair_spans == []
    assert build(tiny, [text, "x"], pair_spans=[[[1, 2]]]).unaligned == [(0, 1)]  # a space alone
    with pytest.raises(InputError, match="record rec7: answer 0: span"):
        build(tiny, [text, "x"], pair_spans=[[[0, 99]]])
    with pytest.raises(InputError, match="record rec7: 2 lists of chosen spans, 1 rejected"):
        build(tiny, [text, "x"], pair_spans=[[], []])


@pytest.mark.parametrize("span", [[-1, 2], [3, 1], [0, 99], [1]])
def test_spans_outside_the_answer_are_refused(tiny: Any, span: list[int]) -> None:
    with pytest.raises(InputError, match="record rec7: answer 0: span"):
        build(tiny, ["A red circle"], spans=[[span]])
    with pytest.raises(InputError, match="2 lists for 1 answers"):
        build(tiny, ["A red circle"], spans=[[], []])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_marks_agree_with_characters(tiny: Any, data: Any) -> None:
    """Every marked token touches its range, every range with a visible character is marked somewhere; any text."""
    text = data.draw(st.text(alphabet="ab é日😀.,\n 𝄞z", min_size=1, max_size=24))
    cut = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6, unique=True)))
    spans = [list(x) for x in zip(cut[::2], cut[1::2], strict=False)]
    ids = tiny.family.answer_ids(tiny.tokenizer, text)
    marks = align_spans(tiny.tokenizer, text, ids, spans)
    assert len(marks) == len(ids) and set(marks) <= set(range(len(spans) + 1))
    offsets = tiny.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    for (start, end), mark in zip(offsets, marks, strict=False):
        if mark:
            s, e = spans[mark - 1]
            assert start < e and s < end
        else:
            visible = [i for i in range(start, end) if not text[i].isspace()]
            assert not any(s <= i < e for i in visible for s, e in spans)


def test_text_only_records_have_no_visual_slot(tiny: Any) -> None:
    tree = build(tiny, ["yes"])
    assert not tree.prompt.visual.any() and tree.plans == []
    assert torch.equal(tree.prompt.position_ids[0], torch.arange(len(tree.prompt.input_ids)))
