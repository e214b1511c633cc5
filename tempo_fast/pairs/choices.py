"""What a free answer settles on: an option, yes or no.

Every rule may say that it cannot tell. Spellings of letters are those that models use: "B", "(B)", "B.", "b) a dog",
"**B**", "The answer is B", "Option B", "(B) is correct", answer tags and boxes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from tempo_fast.pairs.spans import Span, Word, words_of

NAMELESS = [""] * 26  # options of which only the letters are known

_ARTICLES = frozenset(("a", "an", "the"))
_NOT = frozenset(
    "not no never neither nor none without except isnt arent wasnt werent doesnt dont didnt wont wouldnt couldnt "
    "cannot cant hardly wrong incorrect unlikely impossible ruled eliminated excluded doubt doubtful deny rather "
    "instead".split()
)
_YES, _NO = frozenset(("yes", "yeah", "yep", "true")), frozenset(("no", "nope", "false"))
# "No one", "no doubt", "true that": a word of polarity is an answer where the phrase ends or a new sentence begins
_STANDS = re.compile(r"[\"'”’*)\]]*\s*(?:[,.;:!?–—(\n]|-\s|\Z)")
_NEW_SENTENCE = re.compile(r"\s+(?:it|he|she|they|there|i|we|you|this|these|those|the)\b", re.IGNORECASE)
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_SPELLINGS = {
    **{word: str(i) for i, word in enumerate(_NUMBERS)},
    "once": "1", "twice": "2", "thirty": "30", "forty": "40", "fifty": "50",
    "gray": "grey", "violet": "purple", "upward": "up", "upwards": "up", "downward": "down", "downwards": "down",
    "leftward": "left", "leftwards": "left", "rightward": "right", "rightwards": "right", "forwards": "forward",
    "backwards": "backward", "1st": "first", "2nd": "second", "3rd": "third", "4th": "fourth", "5th": "fifth",
    "anticlockwise": "counterclockwise",
}  # fmt: skip
# "the one on the left", "no one", "one of them" count nothing
_NOT_A_NUMBER_AFTER = frozenset("the this that another no any every each which some".split())
_NOT_A_NUMBER_BEFORE = frozenset("of another who that which".split())

_WRAPPED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{(.*?)\}", re.DOTALL | re.IGNORECASE)
_LEAD = re.compile(
    r"\W*(?:(?:so|well|thus|therefore|hence)\W+)?"
    r"(?:(?:the\s+)?(?:(?:final|correct|right|best|short)\s+)?answer(?:\s+is)?\s*[:=]?"
    r"|it(?:\s+is|['’]s|\s+was)|there\s+(?:is|are|were|was)|they\s+(?:are|were))(?![\w'’])\W*",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:not|never|neither|nor|except|instead\s+of|rather\s+than)|n['’]t)\s+(?:be\s+)?(?:option\s+)?\W*\Z",
    re.IGNORECASE,
)
_WRONG = (
    r"(?:incorrect|wrong|false|ruled|eliminated|excluded|dismissed|discarded|rejected|unlikely|implausible|impossible)"
)
_EXCLUDED = re.compile(
    # "(A) is wrong", "A can be ruled out", "A isn't"; "A: wrong."
    r"[^\w\s,.;!?]*\s+(?:(?:is|are|was|were|be|been|can|could|may|might|must|should|would|will|does|did|do|has|have|had"
    r"|seems?|looks?|appears?|to|also|clearly|definitely|probably|likely|most|very|simply|therefore|thus|then)\s+)+"
    rf"(?:not|never|no|out|{_WRONG})\b"
    r"|[^\w\s,.;!?]*\s+(?:\w+n['’]t|cannot)\b"
    rf"|\W*\b(?:not\s+correct|not\s+right|no|{_WRONG}(?:\s+out)?)\s*(?:[.,;!\n]|\Z)",
    re.IGNORECASE,
)
_CONTRAST = re.compile(
    r"\b(?:but|however|although|though|yet|whereas|still|nevertheless|maybe|perhaps|possibly|or|rather|instead)\b",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|correction|scratch\s+that|second\s+thoughts?|never\s*mind|sorry|mistaken|i\s+mean|no\s*[,.;:!])",
    re.IGNORECASE,
)


class Found(NamedTuple):
    """What an answer settles on: ``value`` (an option's index, or 1 for yes and 0 for no) and where it says so."""

    value: int
    span: Span


def choice(options: Sequence[str], answer: str) -> Found | None:
    """The option that ``answer`` settles on, by letter or by text; None when it names none, several, or one by its
    letter and another by its text.

    Statements ("The answer is B", "(C) is correct") outdo a letter at the start, which outdoes letters in brackets
    elsewhere, which outdo the text of an option. Between texts, one that is part of another that stands there does not
    count. What is ruled out ("not B", "(B) is wrong"), taken back ("Wait, ...") or followed by words for another option
    leaves it open.
    """
    low, high = unwrapped(answer)
    text = answer[low:high]
    named = _named(options, text)
    letter = _letter_in(text, len(options), named)
    if letter is None:
        return None
    if letter:
        value, start, end, loose = letter
        if named and not any(k == value for k, *_ in named):
            return None
        end = _with_text(text, value, end, named)
        return None if _turns(options, value, text, end, named, loose) else Found(value, [low + start, low + end])
    polarities = [found.value for o in options if (found := yes_no(o)) is not None]
    if len(options) == 2 and sorted(polarities) == [0, 1]:
        said = yes_no(text)
        return Found(polarities.index(said.value), [low + x for x in said.span]) if said is not None else None
    if len({k for k, *_ in named}) != 1:
        return None
    value, start, end = named[0]
    if negated([w for w in words_of(text) if not any(s <= w.start < e for _, s, e in named)]):
        return None
    if any(k != value for k, *_ in _mentions(text, len(options))) or _turns(options, value, text, end, named, False):
        return None
    return Found(value, [low + start, low + end])


def yes_no(answer: str) -> Found | None:
    """Yes (1) or no (0): at the start, as "the answer is yes", or the only yes of an answer without negation. "No" and
    "true" count where they stand alone: not in "No one can deny it", "It is true that"."""
    low, high = unwrapped(answer)
    words = words_of(answer, low + after_lead(answer[low:high]), high)
    said = [(int(w.text in _YES), w) for w in words if w.text in _YES | _NO]
    stands = [(value, w) for value, w in said if w.text in ("yes", "yeah", "yep") or _stands(answer, w, high)]
    if not stands or len({value for value, w in said if w in words[:3]}) > 1 or len({value for value, _ in stands}) > 1:
        return None
    value, word = stands[0]
    if _EXCLUDED.match(answer, word.end, high):
        return None
    if word == words[0] or (value == 1 and not negated(words)):
        return Found(value, [word.start, word.end])
    return None


def _stands(answer: str, word: Word, high: int) -> bool:
    if _STANDS.match(answer, word.end, high):
        return True
    return word.text in ("no", "nope") and _NEW_SENTENCE.match(answer, word.end, high) is not None


def plain_words(text: str) -> list[Word]:
    """Words as answers are compared: no articles, no apostrophes, digits for numbers, one spelling for some words."""
    words = words_of(text)
    out = []
    for i, word in enumerate(words):
        key = re.sub(r"['’]|(?<=\d),(?=\d{3})", "", word.text)
        before, after = (words[k].text if 0 <= k < len(words) else "" for k in (i - 1, i + 1))
        if key != "one" or (before not in _NOT_A_NUMBER_AFTER and after not in _NOT_A_NUMBER_BEFORE):
            key = _SPELLINGS.get(key, key)
        if key not in _ARTICLES:
            out.append(Word(key, word.start, word.end))
    return out


def plain(text: str) -> tuple[str, ...]:
    """``plain_words`` without their places."""
    return tuple(w.text for w in plain_words(text))


def unwrapped(answer: str) -> tuple[int, int]:
    """The range of what stands in the last <answer> tags or box; without any, of the whole answer."""
    found = list(_WRAPPED.finditer(answer))
    return found[-1].span(1 if found[-1].group(1) is not None else 2) if found else (0, len(answer))


def after_lead(answer: str) -> int:
    """Where an answer goes on after words like "The answer is" or "It is"."""
    match = _LEAD.match(answer)
    return match.end() if match is not None and match.end() < len(answer) else 0


def negated(words: Sequence[Word]) -> bool:
    """Whether a word of negation is among them."""
    return any(re.sub("['’]", "", w.text) in _NOT for w in words)


def letter_of(index: int) -> str:
    """A for 0."""
    return chr(ord("A") + index)


def index_of(letter: str) -> int:
    """0 for A or a."""
    return ord(letter.upper()) - ord("A")


@lru_cache
def _patterns(n: int) -> dict[str, re.Pattern[str]]:
    """Ways to name the letter of one of n options: in brackets or quotes (group b) or as a word (group u)."""
    one = f"[A-{letter_of(n - 1)}]"
    letter = rf"(?:[(\[{{*\"']+(?P<b>{one})[)\]}}*\"']+|(?P<u>{one})(?![\w'’]))"
    noun = r"(?:(?:correct|right|best)\s+)?(?:answer|option|choice)"
    is_ = r"\s+(?:is|was|would\s+be|should\s+be|must\s+be)"
    sure = r"(?:(?:most\s+likely|likely|probably|clearly|definitely|indeed)\s+)?"
    named = r"(?:the\s+)?(?:(?:option|choice|letter)\s+)?"
    right = r"\s+(?:is|would\s+be|must\s+be|seems)\s+(?:the\s+)?(?:most\s+likely\s+)?(?:correct|right|best|answer|true)"
    patterns = {
        "whole": rf"\A\W*(?:{noun}\W*)?(?P<u>{one})\W*\Z",
        "start": rf"\A\W*(?:{noun}\W*)?(?P<u>{one})(?:[)\].:*]+(?=\s|[\"'“(]|\Z)|\s+[-–—]\s|[ \t]*\n)",
        "says": rf"\b{noun}(?:{is_}\s*:?|\s*[:=])\s*{sure}{named}{letter}",
        "takes": rf"\b(?:choose|chose|select|pick|go\s+with|going\s+with)\s+{named}{letter}",
        "right": rf"(?<![\w'’]){letter}{right}",
        "bracket": rf"[(\[](?P<b>{one})[)\]]",
        "any": rf"[(\[{{*\"']+(?P<b>{one})[)\]}}*\"']+|(?<![\w'’])(?P<u>{one})(?![\w'’])",
        "option": rf"\b(?:option|choice|letter)\s+{letter}",
        "line": rf"^[ \t]*[(\[]?(?P<u>{one})[)\].:]+[ \t]+\S",
        "more": rf"[)\].:*\"']*\s*,?\s*(?:or|and|/|&|,)\s*(?:option\s+)?[(\[*\"']*{one}(?![\w'’])",
    }
    return {key: re.compile(pattern, re.IGNORECASE | re.MULTILINE) for key, pattern in patterns.items()}


def _letter_in(
    text: str, n: int, named: Sequence[tuple[int, int, int]]
) -> tuple[int, int, int, bool] | tuple[()] | None:
    """(option, start, end, loose) of the letter that the text settles on, ``loose`` where it neither states it nor
    begins with it; () without any, None when it is unclear."""
    if n < 1:
        return ()
    patterns = _patterns(min(n, 26))

    def hits(*keys: str) -> list[tuple[int, int, int]]:
        out = []
        for key in keys:
            for match in patterns[key].finditer(text):
                group = "b" if match.groupdict().get("b") else "u"
                start, end = match.span(group)
                sure = group == "b" or key in ("whole", "start", "line") or (key == "option" and text[start].isupper())
                if sure or _is_letter(text, start, end):
                    out.append((index_of(match.group(group)), start, end))
        return out

    def is_out(k: int, start: int, end: int) -> bool:
        after = _with_text(text, k, end, named)
        return bool(_NEGATION.search(text[:start]) or _EXCLUDED.match(text, after))

    stated = hits("says", "takes", "right")
    first = hits("whole", "start")
    everything = stated + first + hits("bracket", "option")
    mentions = _mentions(text, n)
    if any(patterns["more"].match(text, end) for _, _, end in everything):
        return None
    if stated:
        value, start, end = stated[0]
        if len({k for k, *_ in stated}) > 1 or any(is_out(*m) for m in (*stated, *mentions) if m[0] == value):
            return None
        if any(negated(words_of(text, _sentence(text, s), s)) for _, s, _ in stated):
            return None  # "I doubt that the answer is B"
        other = any(k != value and s >= end and not is_out(k, s, e) for k, s, e in mentions)
        return None if other else (value, start, end, False)
    if any(is_out(*m) for m in (*everything, *mentions)):
        return None
    if not everything:
        return ()
    listed = {k for k, *_ in (*hits("line"), *mentions)}
    return (*everything[0], not first) if len({k for k, *_ in everything} | listed) == 1 else None


def _mentions(text: str, n: int) -> list[tuple[int, int, int]]:
    """(option, start, end) of every letter of one of n options, in brackets or quotes or a capital that is a word."""
    if n < 1:
        return []
    out = []
    for match in _patterns(min(n, 26))["any"].finditer(text):
        group = "b" if match.group("b") else "u"
        start, end = match.span(group)
        if group == "b" or (text[start].isupper() and _is_letter(text, start, end)):
            out.append((index_of(match.group(group)), start, end))
    return out


def _with_text(text: str, value: int, end: int, named: Sequence[tuple[int, int, int]]) -> int:
    """Where a letter that ends at ``end`` ends with its option's text, if that follows."""
    for k, s, e in named:
        if k == value and s >= end and not plain_words(text[end:s]):
            end = e
    return end


def _sentence(text: str, at: int) -> int:
    """Where the sentence of a place begins."""
    return max((m.end() for m in re.finditer(r"[.!?;\n]", text[:at])), default=0)


def _turns(
    options: Sequence[str], value: int, text: str, end: int, named: Sequence[tuple[int, int, int]], loose: bool
) -> bool:
    """Whether what follows an option takes it back or goes over to another one, by its text or words of its own."""
    rest = text[end:]
    if _TAKEN_BACK.search(rest) or any(k != value and s >= end for k, s, _ in named):
        return True
    if not loose and not _CONTRAST.search(rest):
        return False
    others = {w for k, option in enumerate(options) if k != value for w in plain(option)}
    return bool((others - set(plain(options[value]))) & set(plain(rest)))


def _is_letter(text: str, start: int, end: int) -> bool:
    """Whether a letter that stands as a word is one of an option: a capital, or the last of its phrase. "A" and "I"
    before another word are words themselves."""
    after = re.compile(r"\s+(\w+)").match(text, end)
    if after is None:
        return True
    if text[start] in "AI":
        return after.group(1).lower() in ("because", "since", "as", "for", "is", "would", "must", "seems")
    return text[start].isupper()


def _named(options: Sequence[str], text: str) -> list[tuple[int, int, int]]:
    """(option, start, end) of each place where an option's text stands, those inside a longer option's left out."""
    words = plain_words(text)
    keys = tuple(w.text for w in words)
    places = []
    for k, option in enumerate(plain(o) for o in options):
        size = len(option)
        places += [(i, i + size, k) for i in range(len(keys) - size + 1) if size and keys[i : i + size] == option]
    whole = [p for p in places if not any(a <= p[0] and p[1] <= b and b - a > p[1] - p[0] for a, b, _ in places)]
    return [(k, words[i].start, words[j - 1].end) for i, j, k in whole]
