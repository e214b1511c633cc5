"""Right, wrong, or not told: tables of the spellings that models use, and what must hold for all of them."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tempo_fast.pairs import answers
from tempo_fast.pairs.answers import answer_span, is_correct, judge_prompt, kind_of, options_of, prompt_of, read_verdict
from tempo_fast.pairs.choices import NAMELESS, choice, yes_no
from tempo_fast.schema import QARecord

ANIMALS = ["a dog", "a hot dog", "a goose", "two cats"]


def qa(question="What is it?", answer="B", options=(), type=""):
    return QARecord("q", "v.mp4", question, answer, list(options), type)


@pytest.mark.parametrize(
    ("text", "index", "phrase"),
    [
        ("B", 1, "B"), ("b", 1, "b"), ("(B)", 1, "B"), ("[b]", 1, "b"), ("B.", 1, "B"), ("**B**", 1, "B"),
        ("B) a hot dog", 1, "B) a hot dog"), ("(C) A goose.", 2, "C) A goose"), ("A", 0, "A"), ("a.", 0, "a"),
        ("A. a dog", 0, "A. a dog"), ("D: two cats", 3, "D: two cats"), ("D - 2 cats", 3, "D - 2 cats"),
        ("B\nIt lies on a plate.", 1, "B"), ("Answer: B", 1, "B"), ("answer is c", 2, "c"), ("Option D", 3, "D"),
        ("The answer is B.", 1, "B"), ("The correct answer is: (B) a hot dog.", 1, "B) a hot dog"),
        ("The best option is D because they meow.", 3, "D"), ("I would go with option C.", 2, "C"),
        ("Option A shows fur, option B a plate. The answer is B.", 1, "B"), ("B is correct.", 1, "B"),
        ("(D) is the right answer", 3, "D"), ("So it must be (C).", 2, "C"), ("I choose A because it barks.", 0, "A"),
        ("<think>A? B?</think><answer>C</answer>", 2, "C"), (r"Thus \boxed{D}", 3, "D"),
        ("a goose", 2, "goose"), ("It is a hot dog.", 1, "hot dog"), ("The dog barks.", 0, "dog"),
        ("There are 2 cats.", 3, "2 cats"), ("A dog", 0, "dog"), ("The answer is a goose", 2, "goose"),
    ],
)  # fmt: skip
def test_one_option_is_named(text, index, phrase):
    found = choice(ANIMALS, text)
    assert found is not None and found.value == index
    assert text[slice(*found.span)] == phrase


@pytest.mark.parametrize(
    "text",
    [
        "", "A or B", "(A) or (B)", "A, B", "A and C.", "Neither (A) nor (B)", "not B", "The answer is not (B).",
        "It isn't option B", "The answer is A or B.", "A. a dog\nB. a hot dog\nC. a goose\nD. two cats", "(A) (B)",
        "A cat sits there.", "I do not know.", "It is not a goose.", "a dog and a goose", "B. a goose", "E", "(F)",
        "Option A shows fur, option B a plate.", "The answer is A. The answer is B.", "a bird",
    ],
)  # fmt: skip
def test_what_names_none_or_several_is_left_open(text):
    assert choice(ANIMALS, text) is None


def test_options_of_yes_and_no():
    options = ["Yes, he does.", "No, he does not."]
    for text, index in (("Yes", 0), ("No, it does not.", 1), ("B", 1), ("(A) Yes", 0), ("The answer is no.", 1)):
        found = choice(options, text)
        assert found is not None and found.value == index, text
    assert choice(options, "Yes and no.") is None and choice(options, "He may.") is None


WORDS = st.lists(st.sampled_from("red blue circle ring moves left grows".split()), min_size=1, max_size=4)
FORMS = ["{}", "({})", "[{}]", "{}.", "{})", "**{}**", '"{}"', "Answer: {}", "The answer is {}.", "The answer is ({}).",
         "option {}", "I select {}.", "({}) is correct.", "<answer>{}</answer>"]  # fmt: skip


@given(st.lists(WORDS.map(" ".join), min_size=2, max_size=8, unique=True), st.data())
def test_any_letter_in_any_form(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    letter = string.ascii_uppercase[index]
    form = data.draw(st.sampled_from(FORMS))
    for text in (form.format(letter), form.format(letter) + "\n"):
        found = choice(options, text)
        assert found is not None and found.value == index and text[slice(*found.span)] == letter
    both = f"{letter}. {options[index].upper()}!"
    found = choice(options, both)
    assert found is not None and found.value == index and both[slice(*found.span)] == both[:-1]
    other = options[index - 1]
    assert choice(options, f"({letter}) {other}") is None  # the letter of one, the text of another


@given(st.lists(WORDS.map(" ".join), min_size=2, max_size=8, unique=True), st.data())
def test_the_text_of_an_option_is_that_option_even_inside_longer_ones(options, data):
    index = data.draw(st.integers(0, len(options) - 1))
    for text in (options[index], f"It is the {options[index]}.", f'"{options[index].title()}"'):
        found = choice(options, text)
        assert found is not None and found.value == index
        assert text[slice(*found.span)].lower() == options[index]


PETS = ["a dog runs", "a cat sleeps", "a bird"]


@pytest.mark.parametrize(
    "text",
    [
        "Option (A) is wrong, so B", "(A) is incorrect. B", "(A) can be ruled out, leaving B",
        "Option A is not correct", "(C) looks plausible but it is the cat", "A: wrong. B: right.",
        "C. Looks plausible, but it is the cat",
        "(A) isn't it", "I don't think the answer is A.", "I doubt that (A) is correct.", "The answer is A. Wait, B.",
        "The answer is A? No, B.", "A. a dog runs is wrong", "The bird can be ruled out", "A. Then again, it is B",
        "(A) a dog runs is what I thought, but it is a cat that sleeps", "The answer is C, though maybe the cat.",
        "The answer is A. A cat sleeps.", "Option C cannot be it.", "'A' should be eliminated", "A bird is unlikely.",
    ],
)  # fmt: skip
def test_a_right_answer_in_many_words_is_not_wrong(text):
    """B is right, and what these name first is not what they settle on."""
    assert is_correct(qa(answer="B", options=PETS), text) is not False
    assert is_correct(qa(answer="a cat sleeps", options=PETS), text) is not False


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("The answer is B. (A) is wrong.", 1), ("The answer is B, not A.", 1),
        ("The answer is B because A is wrong.", 1),
        ("B. a cat sleeps\n\nA cat is asleep on the sofa.", 1), ("(A) can be ruled out. The answer is (C).", 2),
        ("The correct answer is **B**, since it is not awake.", 1), ("B. A cat sleeps while a dog is near.", 1),
    ],
)  # fmt: skip
def test_what_is_ruled_out_beside_a_statement_does_not_count(text, index):
    assert choice(PETS, text).value == index


# {x} is spoken of first, {y} last; neither form says which is right in words that settle it
TWO = ["Option ({x}) is wrong, so {y}", "({x}) is incorrect. {y}", "({x}) can be ruled out, leaving {y}",
       "{x}. No, {y}.",
       "Option {x} is not correct, option {y} is", "({x}) looks good but it is {yt}", "{x}. Wait, {y}", "{x} or {y}",
       "The answer is {x}. Actually, {y}.", "Not {x} but {y}", "({x}) is unlikely. {yt}", "({x}) ({y})", "{xt} or {yt}",
       "The answer is {x}, but ({y}) fits too.", "({x}) {yt}", "It is not {xt}. It is {yt}.",
       "{xt} seems wrong; ({y})",
       "{x} rather than {y}", "({x}) isn't right, ({y})", "{xt} is unlikely, {yt}", "{x}: wrong\n{y}: right",
      ]  # fmt: skip


@given(st.permutations(["a dog runs", "a cat sleeps", "a bird", "two men", "blue rings"]), st.data())
@settings(max_examples=300)
def test_an_answer_that_names_two_options_is_wrong_only_if_both_are(options, data):
    n = data.draw(st.integers(3, 5))
    x, y, right = data.draw(st.permutations(range(n)))[:2] + [data.draw(st.integers(0, n - 1))]
    names = {"x": string.ascii_uppercase[x], "y": string.ascii_uppercase[y], "xt": options[x], "yt": options[y]}
    text = data.draw(st.sampled_from(["", "Let me see. ", "So, "])) + data.draw(st.sampled_from(TWO)).format(**names)
    for answer in (string.ascii_uppercase[right], options[right]):
        told = is_correct(qa(answer=answer, options=options[:n]), text)
        assert told is not False or right not in (x, y), text


@given(st.sampled_from("is was can|be could|be must|be seems looks".split()),
       st.sampled_from(["not it", "wrong", "incorrect", "ruled out", "unlikely", "eliminated"]), st.integers(0, 2),
       st.sampled_from(["({})", "Option {}", "**{}**", "'{}'"]),
       st.sampled_from(["", ".", ", so another one is right"]))  # fmt: skip
def test_an_option_that_is_ruled_out_is_not_the_answer(verb, out, index, form, end):
    text = f"{form.format('ABC'[index])} {verb.replace('|', ' ')} {out}{end}"
    assert choice(PETS, text) is None


@given(st.sampled_from("one|can|deny doubt wonder question matter|what less|than|two other".split()),
       st.sampled_from(["", "There is ", "The answer: "]),
       st.sampled_from(["there is a dog", "that he runs"]))  # fmt: skip
def test_no_before_another_word_is_not_an_answer(phrase, lead, rest):
    text = f"{lead}No {phrase.replace('|', ' ')} {rest}."
    assert is_correct(qa("Is it so?", "Yes."), text) is None


@given(st.lists(st.text(max_size=12), max_size=5), st.text(max_size=60))
@settings(max_examples=300)
def test_any_text_is_read_without_trouble(options, text):
    found = choice(options, text)
    assert found is None or (0 <= found.value < len(options) and 0 <= found.span[0] < found.span[1] <= len(text))
    record = qa("Which?", text or "x", options)
    assert is_correct(record, text) in (True, False, None)
    span = answer_span(record, text)
    assert span is None or 0 <= span[0] < span[1] <= len(text)
    assert isinstance(prompt_of(record), str)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes", 1), ("no.", 0), ("No, it does not.", 0), ("Yes, not once.", 1), ("The answer is yes.", 1), ("TRUE", 1),
        ("I think so, yes.", 1), ("False", 0), ("Answer: No", 0), ("<answer>no</answer>", 0),
        ("Yes and no.", None), ("yes or no", None), ("There is no dog.", None), ("I see no dog.", None),
        ("maybe", None),
        ("I would not say yes", None), ("", None), ("No one can deny there is a dog", None), ("No it does not", 0),
        ("There is no doubt that he runs.", None), ("No doubt.", None), ("It is true that he stays.", None),
        ("Yes would be wrong.", None), ("No, I mean, of course, yes.", None), ("**No**, he stays", 0),
        ("Yes, there is no dog.", 1), ("False alarm", None), ("No - he stays", 0), ("No\n\nHe stays.", 0),
    ],
)  # fmt: skip
def test_yes_and_no(text, value):
    found = yes_no(text)
    assert (None if found is None else found.value) == value


@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("3", "three", True), ("3", "There are 3 of them.", True), ("three", "4", False), ("3", "3 or 4", None),
        ("3", "The one on the left", None), ("1", "one", True), ("1,000", "1000", True), ("3.50", "3.5", True),
        ("3 seconds", "3", True), ("3 seconds", "5 seconds", False), ("3 minutes", "180 seconds", None),
        ("A goose.", "the goose", True), ("goose", "It is a goose!", True), ("goose", "a dog", None),
        ("goose", "a goose or a dog", None), ("goose", "not a goose", None), ("couch", "a sofa", None),
        ("red", "The car is blue.", False), ("the red car", "A blue car", False), ("the red car", "A red car.", True),
        ("gray", "grey", True), ("lies down", "he goes up", None), ("red", "red and blue", None),
        ("to the left", "Right.", False), ("man's hat", "mans hat", True), ("red", "", None),
        ("Paris", "The answer is Paris.", True), ("before", "It happens after.", False),
    ],
)  # fmt: skip
def test_short_answers(reference, answer, right):
    assert is_correct(qa(answer=reference, type="short"), answer) is right


@pytest.mark.parametrize(
    ("record", "answer", "right"),
    [
        (qa(answer="C", options=ANIMALS), "(C) a goose", True), (qa(answer="a goose", options=ANIMALS), "C", True),
        (qa(answer="(C) a goose", options=ANIMALS), "It is a dog.", False),
        (qa(answer="C", options=ANIMALS), "a goose and a dog", None),
        (qa(answer="a bird", options=ANIMALS), "C", None),  # names no option
        (qa("Which?\n(A) red\n(B) blue", "(B) blue"), "red", False), (qa("Which?\nA. red\nB. blue", "B"), "b", True),
        (qa(answer="C", type="mcq"), "(C) something", True), (qa(answer="C", type="mcq"), "D.", False),
        (qa(answer="Yes."), "no", False), (qa(answer="No"), "No, it leaves before.", True),
        (qa(answer="Yes, the red car leaves first, then the blue one."), "Yes, the blue one.", None),
        (qa(answer="Yes, the red car leaves first, then the blue one."), "No.", False),
        (qa(answer="A man walks a dog along the beach."), "a man walks a dog along the beach", True),
        (qa(answer="A man walks a dog along the beach."), "A woman sings.", None),
    ],
)  # fmt: skip
def test_questions(record, answer, right):
    assert is_correct(record, answer) is right


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (qa(options=ANIMALS), "mcq"), (qa("Which?\nA. red\nB. blue", "B"), "mcq"),
        (qa(answer="Yes, he does."), "yes_no"),
        (qa(answer="No one"), "short"), (qa(answer="Seven."), "short"), (qa(answer="A man walks a dog today."), "open"),
        (qa(answer="Seven", type="Open-Ended"), "open"), (qa(answer="B", type="multiple choice"), "mcq"),
        (qa(answer="left", type="direction"), "short"), (qa(answer="Yes.", options=["Yes.", "No."]), "mcq"),
    ],
)  # fmt: skip
def test_kinds(record, kind):
    assert kind_of(record) == kind


def test_prompts_ask_for_what_the_reference_is():
    letter = prompt_of(qa("<video>\nWhat is it?", "C", ANIMALS))
    assert letter == (
        "What is it?\nA. a dog\nB. a hot dog\nC. a goose\nD. two cats\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert prompt_of(qa(answer="C. a goose", options=ANIMALS)).endswith(answers.LETTER_TEXT_ENDING)
    assert prompt_of(qa(answer="a goose", options=ANIMALS)).endswith(answers.TEXT_ENDING)
    lettered = [f"({x}) {o}" for x, o in zip("ABCD", ANIMALS, strict=True)]
    assert prompt_of(qa("<image>What is it?", "C", lettered)) == letter
    assert options_of(qa(options=["A. dog", "C. cat"])) == ["A. dog", "C. cat"]  # letters that are not theirs
    inline = qa("Which?\n(A) red\n(B) blue\nOnly give the best option.", "B")
    assert prompt_of(inline) == inline.question and options_of(inline) == ["red", "blue"]
    assert prompt_of(qa("Is it?", "Yes.")) == "Is it?\nAnswer yes or no."
    assert prompt_of(qa("Is it? Yes or no?", "Yes.")) == "Is it? Yes or no?"
    assert prompt_of(qa("Is it?", "Yes, it was a long way.")) == "Is it?"
    assert prompt_of(qa("How many?", "3")) == "How many?\nAnswer the question using a single word or phrase."
    assert prompt_of(qa("What happens?", "A man walks a dog today.")) == "What happens?"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("RIGHT", True), ("wrong.", False), ("**Unsure**", None), ("A cat.\nVerdict: WRONG", False), (" Right\n", True)],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) is verdict


@pytest.mark.parametrize("reply", ["", "RIGHT or WRONG", "The answer is right", "not wrong", "RIGHT\nbecause", "yes"])
def test_a_reply_that_is_no_verdict(reply):
    with pytest.raises(ValueError, match="not RIGHT, WRONG or UNSURE"):
        read_verdict(reply)


def test_judge_prompt_holds_everything_once():
    text = judge_prompt(qa("What {is} it?", "a {goose}"), "{answer} <b>")
    assert text.count("What {is} it?") == text.count("a {goose}") == text.count("{answer} <b>") == 1


def test_letters_alone():
    assert choice(NAMELESS, "(K) something").value == 10 and choice(NAMELESS, "I see a dog") is None
