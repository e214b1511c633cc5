"""Tags around key phrases: written, found again, and what is not found said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tempo_fast.pairs.formats import mask, unmask

TEXT = st.text(st.sampled_from("ab .\n\u2028é🎬<>/MASK"), max_size=30)


def test_masks():
    answer = "A dog runs. A dog runs. It barks."
    assert mask(answer, [[12, 23]]) == "A dog runs. <MASK>A dog runs.</MASK> It barks."
    # the second of two equal phrases, with the white space of the released files inside the tags
    assert unmask(answer, "A dog runs. <MASK> A dog runs. </MASK> It barks.") == ([[12, 23]], [])
    assert unmask(answer, "<MASK>A cat</MASK> runs. <MASK>It barks</MASK>.") == ([[24, 32]], ["A cat"])
    assert unmask("", "<MASK></MASK>") == ([], [""])


@pytest.mark.parametrize(
    ("text", "masked", "spans", "lost"),
    [
        # the words before a phrase also stand elsewhere
        ("the cat the cat sat", "the cat <MASK>sat</MASK>", [[16, 19]], []),
        # a judge that rewrote the rest: what is still there is found, in order
        ("He ran, then sat.", "He <MASK>ran</MASK>, and then <MASK>sat</MASK>.", [[3, 6]], ["sat"]),
        ("He sat.", "He <MASK>sat</MASK> and <MASK>sat</MASK>.", [[3, 6]], ["sat"]),
        # tags that are not closed, not opened, one inside the other
        ("A dog runs.", "A <MASK>dog runs.", [], ["<MASK>dog runs."]),
        ("A dog runs.", "A dog</MASK> runs.", [], ["</MASK> runs."]),
        ("A dog runs.", "<MASK>A <MASK>dog</MASK> runs.</MASK>", [], ["A <MASK>dog", "</MASK>"]),
        ("A dog runs.", "A <MASK> </MASK> dog runs.", [], [""]),
        # white space alone differs
        ("A dog\nruns.  Far.", "A <MASK>dog runs.</MASK> Far.", [[2, 11]], []),
        ("A dog runs", "<MASK>A</MASK><MASK>dog</MASK>runs", [[0, 1], [2, 5]], []),
        ("No tag.", "No tag.", [], []),
        ("No tag.", "Other words.", [], []),
    ],
)
def test_what_is_found(text, masked, spans, lost):
    assert unmask(text, masked) == (spans, lost)


@given(st.lists(st.sampled_from(["a b.", "c.", "d e f.", "a."]), min_size=1, max_size=7), st.data())
def test_sentences_come_back(parts, data):
    answer = " ".join(parts)
    bounds, at = [], 0
    for p in parts:
        bounds.append([at, at + len(p)])
        at += len(p) + 1
    spans = [b for b in bounds if data.draw(st.booleans())]
    assert unmask(answer, mask(answer, spans)) == (spans, [])
    padded = mask(answer, spans).replace("<MASK>", " <MASK> ").replace("</MASK>", " </MASK> ")
    assert unmask(answer, padded) == (spans, [])


@given(TEXT.filter(lambda t: "MASK>" not in t), st.data())
def test_any_ranges_come_back(text, data):
    """Ranges with a character that is not white space; also beside each other, and with blanks at their ends."""
    ends = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = [[s, e] for s, e in zip(ends, ends[1:], strict=False) if text[s:e].strip() and data.draw(st.booleans())]
    assert unmask(text, mask(text, spans)) == (spans, [])


@given(TEXT, TEXT)
def test_every_tag_is_accounted_for(text, masked):
    """Whatever a judge wrote: ranges lie in the text, in order, and each opening tag gave a range or a loss."""
    spans, lost = unmask(text, masked)
    assert all(0 <= s < e <= len(text) for s, e in spans)
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    if "<MASK>" in masked or "</MASK>" in masked:
        assert spans or lost
