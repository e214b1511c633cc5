"""Differing sentences and words between two answers, and ranges that real tokenizers can follow."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.pairs.spans import differing_spans, differing_words, sentence_spans, token_safe, union, words_of
from tempo_fast.trees.layout import align_spans

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


@pytest.mark.parametrize(
    ("chosen", "rejected", "left", "right"),
    [
        # the authors' own examples (pritamqu/RRPO, docs/assets/data.png)
        ("The animal that is biting the man's nose in the video is a goose.",
         "The animal that is biting the man's nose in the video is a dog.", ["goose"], ["dog"]),
        ("The video features a group of people playing soccer on a sandy field.",
         "The video shows a group of people playing volleyball on a sandy beach.",
         ["features", "soccer", "field"], ["shows", "volleyball", "beach"]),
        ("(D) Pretending to close something without actually closing it",
         "(H) Pretending to open something without actually opening it",
         ["D", "close", "closing"], ["H", "open", "opening"]),
        ("A man walks. A dog barks. He sits.", "A man walks! He sits.", ["A dog barks"], []),
        ("It grows. A ring moves.", "A dot moves. It grows.", ["A ring moves"], ["A dot moves"]),
        ("It does grow.", "It does not grow.", [], ["not"]),
        ("Yes.", "yes!", [], []), ("It grows. Red.", "It. Grows red", [], []), ("B", "C. a dog", ["B"], ["C", "a dog"]),
        ("It costs 3.5 $.", "It costs 3.6 $.", ["3.5"], ["3.6"]), ("don't go", "do go", ["don't"], ["do"]),
        ("It smiles 👍🏽 now", "It smiles 👎🏽 now", ["👍🏽"], ["👎🏽"]),
        ("它是红色的。", "它是蓝色的。", ["红"], ["蓝"]),
        ("Red cats, then a dog.", "Blue birds, then a fish.", ["Red cats", "dog"], ["Blue birds", "fish"]),
        ("A cat and dogs", "A bird and mice", ["cat and dogs"], ["bird and mice"]),  # "and" alone parts nothing
    ],
)  # fmt: skip
def test_differing_words(chosen, rejected, left, right):
    a, b = differing_words(chosen, rejected)
    assert (cut(chosen, a), cut(rejected, b)) == (left, right)


VOCABULARY = "red Circle don't 3.5 é 👩\u200d🚀 👍🏽 红色 かな 🇩🇪 C++ na\u00efve e\u0301t x_1".split()
GLUE = [" ", " ", ". ", ", ", "\n", "", "-"]
texts = st.lists(st.tuples(st.sampled_from(VOCABULARY), st.sampled_from(GLUE)), max_size=12)
answers = texts.map(lambda parts: "".join(w + g for w, g in parts))


@given(answers, answers)
def test_words_that_are_not_marked_are_the_same_in_both(a, b):
    left, right = differing_words(a, b)
    rest = []
    for text, marked in ((a, left), (b, right)):
        words = words_of(text)
        whole = [[w for w in words if s <= w.start and w.end <= e] for s, e in marked]
        touched = [[w for w in words if s < w.end and w.start < e] for s, e in marked]
        assert whole == touched and all(whole)
        rest.append([w.text for w in words if not any(w in group for group in whole)])
    # a range over two words of a script without spaces takes those between them along
    if not any("红" in t or "か" in t for t in (a, b)):
        assert rest[0] == rest[1]
    assert bool(left or right) == ([w.text for w in words_of(a)] != [w.text for w in words_of(b)])
    assert differing_words(a, a) == ([], [])


@given(st.text(max_size=40), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5))
@settings(max_examples=200)
def test_token_safe_covers_and_cuts_nothing(text, ranges):
    ranges = [(min(s, e, len(text)), min(max(s, e), len(text))) for s, e in ranges]
    out = token_safe(text, ranges)
    assert out == token_safe(text, out) == sorted(out)
    assert all(a[1] <= b[0] for a, b in zip(out, out[1:], strict=False))
    covered = {i for s, e in out for i in range(s, e)}
    assert all(i in covered or text[i].isspace() for s, e in ranges for i in range(s, e))
    # nothing but whole words is added
    words = {i: (w.start, w.end) for w in words_of(text) for i in range(w.start, w.end)}
    for i in covered:
        assert i not in words or set(range(*words[i])) <= covered


@pytest.mark.parametrize(
    ("text", "span", "marked"),
    [
        ("A circle moves", [3, 5], "circle"), ("A circle moves", [1, 9], "circle"), ("a goose's", [3, 5], "goose's"),
        ("is 3.55 m", [3, 4], "3.55"), ("at 12:30 h", [6, 7], "12:30"), ("red-blue", [0, 2], "red"),
        ("(B)", [1, 2], "B"),
        ("👩\u200d🚀 flies", [0, 1], "👩\u200d🚀"), ("e\u0301t\u00e9", [0, 1], "e\u0301t\u00e9"),
        ("a 🇩🇪 b", [3, 4], "🇩🇪"), ("红色的", [1, 2], "色"),
        ("a", [0, 0], None), ("a   b", [1, 3], None), ("end.", [3, 4], "."),
    ],
)  # fmt: skip
def test_ranges_are_widened_to_words(text, span, marked):
    assert cut(text, token_safe(text, [span])) == ([] if marked is None else [marked])


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def tokenizer(request):
    """Byte-level BPE, split as GPT-2 and as Qwen2 do; some words are one token, others are cut inside a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # Qwen/Qwen2-VL, tokenizer.json: pre_tokenizer
    qwen2 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(qwen2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.pre_tokenizer = split if request.param == "qwen2" else pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["A red Circle, don't 红色的 (B) circle-red. x_1 👩 3.5 é 3.5"] * 20 + WORDS * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@given(data=st.data())
@settings(max_examples=100)
def test_every_span_has_tokens_and_they_cover_it(tokenizer, data):
    chosen, rejected = data.draw(answers), data.draw(answers)
    drawn = st.lists(st.tuples(st.integers(0, len(chosen)), st.integers(0, len(chosen))), max_size=4)
    given_ranges = [sorted(r) for r in data.draw(drawn)]
    for text, spans in (*zip((chosen, rejected), differing_words(chosen, rejected), strict=True),
                        (chosen, token_safe(chosen, given_ranges))):  # fmt: skip
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        marks = align_spans(tokenizer, text, ids, spans)
        assert set(marks) - {0} == set(range(1, len(spans) + 1))
        for n, (start, end) in enumerate(spans, 1):
            mine = [offsets[t] for t, k in enumerate(marks) if k == n]
            covered = {i for s, e in mine for i in range(s, e)}
            # white space in a token of its own is left out
            assert {i for i in range(start, end) if not text[i].isspace()} <= covered
            beyond = {text[i] for i in covered - set(range(start, end))}
            # a token may reach over a mark or a space tied to it, or over a character of an unspaced script; and
            # where a range ends in a mark, over the word that is tied to that
            ends_in_word = text[end - 1].isalnum() and text[start].isalnum()
            assert not ends_in_word or not any(c.isalnum() and c not in "红色かな" for c in beyond)
        # a token is in a span exactly if it touches one, leading white space aside
        for (s, e), k in zip(offsets, marks, strict=True):
            core = [i for i in range(s, e) if text[s:i].strip() or not text[i].isspace()]
            assert (k > 0) == any(a <= i < b for i in core for a, b in spans)


def test_characters_of_one_token_are_one_span(tokenizer):
    """Where no space parts words, a token may hold two characters that are marked with one between them."""
    text = "它是红色的。"
    spans = token_safe(text, [[2, 3], [4, 5], [0, 0]])
    assert spans == [[2, 5]]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert set(align_spans(tokenizer, text, ids, spans)) == {0, 1}
    assert token_safe("红，色", [[0, 1], [2, 3]]) == [[0, 1], [2, 3]]


def test_a_plain_tokenizer_says_that_it_cannot(tokenizer):
    from tempo_fast.errors import InputError

    with pytest.raises(InputError, match="fast tokenizer"):
        align_spans(SimpleNamespace(is_fast=False), "a", [0], [[0, 1]])
