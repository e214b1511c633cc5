"""Differing sentences between two answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.pairs.spans import differing_spans, sentence_spans, union

WORDS = ["A red circle moves left.", "It grows.", "Is it 3.5 m away?", 'He said "stop."', "A blue ring appears!"]
sentences = st.lists(st.sampled_from(WORDS), min_size=0, max_size=8)


def cut(text, spans):
    return [text[s:e] for s, e in spans]


def test_sentences():
    text = "  One. Two is 3.5 long!  Three?\nfour without a stop\n\nFive."
    assert cut(text, sentence_spans(text)) == ["One.", "Two is 3.5 long!", "Three?", "four without a stop", "Five."]
    assert sentence_spans(" \n ") == []


@given(sentences, st.sampled_from([" ", "  ", "\n"]))
def test_sentences_are_found_whatever_joins_them(parts, glue):
    text = glue.join(parts)
    assert cut(text, sentence_spans(text)) == parts


def test_reversed_order_marks_what_moved():
    a = "A red circle moves left. It grows. A blue ring appears!"
    b = "A blue ring appears! It grows. A red circle moves left."
    left, right = differing_spans(a, b)
    # one sentence stays as the common run, the others moved, in both texts
    assert len(left) == len(right) == 2
    assert sorted(cut(a, left)) == sorted(cut(b, right))


def test_dropped_sentences_are_marked_in_the_chosen_text_only():
    a, b = "One. Two. Three. Four.", "One. Three."
    left, right = differing_spans(a, b)
    assert cut(a, left) == ["Two.", "Four."]
    assert right == []


def test_changed_sentence_is_marked_in_both():
    a, b = "One. A red circle moves left. Four.", "One. A red circle moves right. Four."
    left, right = differing_spans(a, b)
    assert cut(a, left) == ["A red circle moves left."] and cut(b, right) == ["A red circle moves right."]


@given(sentences, sentences)
def test_what_is_not_marked_is_the_same_in_both(x, y):
    a, b = " ".join(x), " ".join(y)
    left, right = differing_spans(a, b)
    rest = [[s for s in sentence_spans(t) if s not in marked] for t, marked in ((a, left), (b, right))]
    assert cut(a, rest[0]) == cut(b, rest[1])
    assert (a != b) == bool(left or right)


def test_union_is_sorted_and_distinct():
    assert union([[[5, 9], [0, 3]], [[0, 3], [12, 14]]]) == [[0, 3], [5, 9], [12, 14]]
