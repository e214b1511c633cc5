"""How good an answer is against the reference, in points from 0 to 100; and how a metric is named.

A metric is called with an answer and its question and gives points, or None where it cannot tell. Words are those of
pairs.judge: lower case, punctuation left out.
"""

from __future__ import annotations

import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from tempo_fast.errors import InputError
from tempo_fast.pairs import judge
from tempo_fast.pairs.answers import is_correct, kind_of, reference_choice
from tempo_fast.pairs.spans import sentence_spans
from tempo_fast.schema import QARecord

Metric = Callable[[str, QARecord], float | None]
Range = tuple[float, float]

METRICS = ("correct", "tiou", "rouge_l", "meteor", "cider_d", "soda_c")


def metric_of(name: str, key: str, references: Sequence[str] = ()) -> Metric:
    """The metric of this name.

    Args:
        name: one of METRICS, or ``module:function`` of an importable module.
        key: the configuration's key that named it, for messages.
        references: what ``cider_d`` counts words in: the reference answers of all questions, whatever bucket a question
            is in.

    Raises:
        InputError: an unknown name, a package or module that is missing. So does the metric where what it gives is
            neither None nor a number from 0 to 100, or where it fails.
    """
    known: dict[str, Metric] = {"correct": correct, "tiou": tiou, "rouge_l": rouge_l}
    if name in known:
        return known[name]
    if name in ("meteor", "soda_c"):
        meteor = _meteor(name, key)
        return (lambda answer, qa: meteor(qa.answer, answer)) if name == "meteor" else _soda_c(meteor)
    if name == "cider_d":
        return _cider_d(tuple(references), key)
    if ":" not in name:
        raise InputError(f"config: {key} must be one of {', '.join(METRICS)}, or module:function, got {name!r}")
    return _plugin(name, key)


@lru_cache(maxsize=2)
def _cider_d(references: tuple[str, ...], key: str) -> CiderD:
    """Counting the words of all references takes long, and every bucket asks for it."""
    return CiderD(references, key)


def _plugin(name: str, key: str) -> Metric:
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as e:
        raise InputError(f"config: {key} {name!r} cannot be imported ({e})") from e
    if not callable(found):
        raise InputError(f"config: {key} {name!r} is not a function")

    def metric(answer: str, question: QARecord) -> float | None:
        where = f"config: {key} {name!r}: question {question.id!r}"
        try:
            points = found(answer, question)
        except Exception as e:
            raise InputError(f"{where}: {type(e).__name__}: {e}") from e
        if points is None:
            return None
        try:
            points = float(points)
        except (TypeError, ValueError) as e:
            raise InputError(f"{where} got {points!r}, which is no number") from e
        if not 0 <= points <= 100:
            raise InputError(f"{where} got {points!r}, which is not from 0 to 100")
        return points

    return metric


def correct(answer: str, question: QARecord) -> float | None:
    """100 for a right answer, 0 for a wrong or empty one or a choice that is not made, None where the rules of
    pairs.answers leave it open."""
    right = is_correct(question, answer) if answer.strip() else False
    if right is None and kind_of(question) == "mcq" and reference_choice(question) is not None:
        right = False
    return None if right is None else 100.0 * right


def rouge_l(answer: str, question: QARecord) -> float:
    """F1 of the longest common subsequence of words (pairs.judge.rouge_l)."""
    return 100.0 * judge.rouge_l(question.answer, answer)


# -- time ranges ----------------------------------------------------------------------------------------------------


def tiou(answer: str, question: QARecord) -> float | None:
    """Temporal intersection over union of the time ranges told; None when the reference tells none.

    Of one range each: max(0, min(ends) - max(starts)) / (max(ends) - min(starts)), as coded in appletea233/Temporal-R1,
    ``verl/utils/reward_score/tvg.py``; an answer without a range gets 0, as there. Of several: the time that lies in
    ranges of both over the time that lies in a range of either, which for one range each is the same where they meet.
    """
    truth = time_ranges(question.answer)
    if not truth:
        return None
    return 100.0 * _overlap(truth, time_ranges(answer))


def _overlap(truth: Sequence[Range], told: Sequence[Range]) -> float:
    """Intersection over union of two sets of ranges, in [0, 1]; ``truth`` is not empty."""
    truth, told = _union(truth), _union(told)
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in told for c, d in truth)
    return both / (sum(b - a for a, b in told) + sum(d - c for c, d in truth) - both)


_CLOCK = r"(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?"
_TIME = rf"(?:{_CLOCK}|\d+(?:\.\d+)?)(?:\s*(?:seconds?|secs?|s|minutes?|mins?)\b)?"
_AT = r"(?:at\s+)?(?:about\s+|around\s+)?(?:the\s+)?(?:second\s+)?"
_TEXT = re.compile(
    rf"(?<![\w.:])(?:(?P<a>{_TIME})\s*(?:-|–|—|~|to|until|till)\s*{_AT}(?P<b>{_TIME})"
    rf"|between\s+{_AT}(?P<c>{_TIME})\s+and\s+{_AT}(?P<d>{_TIME})"
    rf"|[\[(]\s*(?P<e>{_TIME})\s*,\s*(?P<f>{_TIME})\s*[\])]"
    rf"|(?:starts?|begins?)\s+{_AT}(?P<g>{_TIME})\b[^.;\n]{{0,40}}?\b(?:ends?|stops?)\s+{_AT}(?P<h>{_TIME})"
    r")(?![\w:]|\.\d)",
    re.IGNORECASE,
)
_LEAD = re.compile(r"\b(?:from|during|at|in)\s*(?:the\s+)?$", re.IGNORECASE)
_STARTS, _ENDS = ("start_time", "start", "begin", "from"), ("end_time", "end", "stop", "to")


def time_ranges(text: str) -> list[Range]:
    """(start, end) in seconds of each time range in ``text``, in order; those that do not end after they start are left
    out.

    "from 3.2 to 7 seconds", "3.2s - 7s", "between 3 and 7", "[3, 7]", "0:12 - 0:20", "1 minute to 80 s", "starts at 3
    and ends at 7", and objects of JSON with start_time and end_time (start, begin, from; end, stop, to), whose values
    may be text. Where there is an <answer>, only what stands in the last one counts. Numbers without a unit are taken
    for seconds; shares of the duration too, which does no harm where answer and reference both give them.
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    text = tagged[-1] if tagged else text
    found = list(_json_ranges(text))
    if not found:
        for match in _TEXT.finditer(text):
            start, end = (x for x in match.groups() if x is not None)
            # "2 to 3 minutes": the unit of the end is that of a start without one
            unit = re.search(r"m\w*$", end, re.IGNORECASE)
            bare = re.fullmatch(r"[\d.]+", start)
            found.append((_seconds(start + unit.group() if unit and bare else start), _seconds(end)))
    return [(a, b) for a, b in found if b > a]


def _json_ranges(text: str) -> Iterator[Range]:
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            row = json.loads(match.group())
        except ValueError:
            continue
        start = next((row[k] for k in _STARTS if k in row), None)
        end = next((row[k] for k in _ENDS if k in row), None)
        try:
            yield _seconds(str(start)), _seconds(str(end))
        except ValueError:
            continue


def _seconds(time: str) -> float:
    """Seconds of "3.2", "7 s", "2 minutes", "1:02:03.5". Raises ValueError for anything else."""
    match = re.fullmatch(rf"\s*({_CLOCK}|\d+(?:\.\d+)?)\s*([a-z]*)\.?\s*", time, re.IGNORECASE)
    if match is None:
        raise ValueError(f"no time: {time!r}")
    value = 0.0
    for part in match.group(1).split(":"):
        value = 60 * value + float(part)
    return 60 * value if match.group(2).lower().startswith("m") else value


def _union(ranges: Sequence[Range]) -> list[Range]:
    out: list[Range] = []
    for a, b in sorted(ranges):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], b))
        else:
            out.append((a, b))
    return out


# -- words in common ------------------------------------------------------------------------------------------------


def _meteor(name: str, key: str) -> Callable[[str, str], float]:
    """Points of (reference, answer): nltk's METEOR (Banerjee and Lavie, 2005) with equal words and equal stems.
    WordNet's synonyms, which nltk would load from the network, have no part in it."""
    try:
        from nltk.stem.porter import PorterStemmer
        from nltk.translate.meteor_score import single_meteor_score
    except ImportError as e:
        raise InputError(f"config: {key}: {name} needs nltk; pip install 'tempo-fast[metrics]'") from e
    stemmer = PorterStemmer()

    def meteor(reference: str, answer: str) -> float:
        truth, told = judge.words(reference), judge.words(answer)
        if not told or not truth:
            return 0.0
        return 100.0 * single_meteor_score(truth, told, stemmer=stemmer, wordnet=_NoSynonyms())

    return meteor


class _NoSynonyms:
    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def timed_events(text: str) -> list[tuple[Range, str]]:
    """The sentences of ``text`` that tell a time range, each with its first one and without its words, by start."""
    out = []
    for start, end in sentence_spans(text):
        sentence = text[start:end]
        match = _TEXT.search(sentence)
        ranges = time_ranges(match.group()) if match else []
        if match and ranges:
            out.append((ranges[0], _LEAD.sub("", sentence[: match.start()]) + sentence[match.end() :]))
    return sorted(out, key=lambda event: event[0][0])


def _soda_c(meteor: Callable[[str, str], float]) -> Metric:
    """SODA_c (Fujita et al., 2020; fujiso/SODA), which VidChain scores its samples by: events of both texts are matched
    one to one in order so that the sum of tIoU * METEOR is largest; F1 of that sum over the events told and the true
    ones. None when the reference tells no timed event."""

    def soda_c(answer: str, question: QARecord) -> float | None:
        truth, told = timed_events(question.answer), timed_events(answer)
        if not truth or not told:
            return 0.0 if truth else None
        best = [0.0] * (len(told) + 1)
        for span, caption in truth:
            above = best
            best = [0.0]
            for j, (other, said) in enumerate(told):
                both = _overlap([span], [other]) * meteor(caption, said)
                best.append(max(above[j + 1], best[j], above[j] + both))
        return 2 * best[-1] / (len(told) + len(truth))  # F1 of best / told and best / true

    return soda_c


Bag = dict[tuple[str, ...], float]


class CiderD:
    """CIDEr-D (Vedantam et al., 2015) as in tylin/coco-caption, ``pycocoevalcap/cider``: 1 to 4 words in a row,
    clipped, a Gaussian of the difference in length with sigma 6. 100 is an equal text of four words or more; ten of
    these points are 1 as it is usually given.

    How rare a word is, is counted in ``references``, one document each, so that a score depends on them alone.

    Raises:
        InputError: there are not two different references.
    """

    def __init__(self, references: Sequence[str], key: str = "metric") -> None:
        if len(set(references)) < 2:
            raise InputError(f"config: {key}: cider_d needs the reference answers of two questions or more")
        self._seen = Counter(gram for text in references for gram in set(_grams(judge.words(text))))
        self._documents = math.log(len(references))

    def __call__(self, answer: str, question: QARecord) -> float:
        """Points of an answer; see METRICS."""
        told, truth = judge.words(answer), judge.words(question.answer)
        near = math.exp(-((len(told) - len(truth)) ** 2) / (2 * 6.0**2))
        cosines = []
        for (mine, size), (theirs, other) in zip(self._vectors(told), self._vectors(truth), strict=True):
            dot = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in mine.items() if gram in theirs)
            cosines.append(dot / (size * other) if size and other else 0.0)
        return min(100.0, max(0.0, 100.0 * near * sum(cosines) / 4))

    def _vectors(self, words: Sequence[str]) -> Iterator[tuple[Bag, float]]:
        """The weights of the 1, 2, 3, 4 words in a row, each with its length as a vector."""
        counts = Counter(_grams(words))
        for n in range(1, 5):
            bag = {
                gram: count * (self._documents - math.log(max(1, self._seen[gram])))
                for gram, count in counts.items()
                if len(gram) == n
            }
            yield bag, math.sqrt(sum(value**2 for value in bag.values()))


def _grams(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for n in range(1, 5):
        yield from (tuple(words[i : i + n]) for i in range(len(words) - n + 1))
