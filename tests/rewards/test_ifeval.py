"""The 25 IFEval instructions against the published checker's stored verdicts, and example by example."""

import copy
import functools
import json

import pytest

from rljax.rewards.base import Sample, as_reward
from rljax.rewards.ifeval import (
    accuracy,
    check_instructions,
    check_instructions_loose,
    ifeval,
    loose_variants,
)
from rljax.rewards.ifeval_constraints import IFEVAL
from rljax.rewards.ifeval_constraints_text import language, sentences, tokens, words

# The one stored verdict that contradicts itself: strict True, loose False, though loose tries the response as it stands
# too. The published checker replaces a "letter" that is not one, here "#", by a random letter on every call.
SELF_CONTRADICTING = ("make a tweet for playboy's twitter account", "keywords:letter_frequency")


def stored(data_dir, name):
    return [
        json.loads(line) for line in (data_dir / "datasets" / "ifeval" / name).read_text("utf-8").split("\n") if line
    ]


@pytest.fixture(scope="module")
def golden(data_dir):
    """(prompt, response, ids, kwargs, strict, loose) of the 540 stored GPT-4 responses."""
    kwargs = {row["prompt"]: row["kwargs"] for row in stored(data_dir, "input_data.jsonl")}
    strict, loose = stored(data_dir, "golden_gpt4_eval_strict.jsonl"), stored(data_dir, "golden_gpt4_eval_loose.jsonl")
    responses = {row["prompt"]: row["response"] for row in stored(data_dir, "golden_gpt4_responses.jsonl")}
    rows = []
    for s, l in zip(strict, loose, strict=True):
        assert s["prompt"] == l["prompt"] and s["response"] == l["response"] == responses[s["prompt"]]
        verdicts = s["follow_instruction_list"], l["follow_instruction_list"]
        rows.append((s["prompt"], s["response"], s["instruction_id_list"], kwargs[s["prompt"]], *verdicts))
    return rows


def test_strict_verdicts_agree_with_the_published_checker(golden):
    ours = [check_instructions(*row[:4]) for row in golden]
    theirs = [row[4] for row in golden]
    assert len(golden) == 540 and sum(map(len, theirs)) == 832
    assert ours == theirs
    assert accuracy(ours) == accuracy(theirs) == (417 / 540, sum(map(sum, theirs)) / 832)


def test_loose_verdicts_agree_with_the_published_checker(golden):
    """All 832 but the one that contradicts the strict file; so 539 of the 540 prompts."""
    different = []
    for prompt, response, ids, kwargs, strict, theirs in golden:
        ours = check_instructions_loose(prompt, response, ids, kwargs)
        for instruction, s, a, b in zip(ids, strict, ours, theirs, strict=True):
            if a != b:
                different.append((prompt[: len(SELF_CONTRADICTING[0])], instruction))
                assert (s, a, b) == (True, True, False)
    assert different == [SELF_CONTRADICTING]


def test_what_is_followed_strictly_is_followed_loosely(golden):
    for prompt, response, ids, kwargs, *_ in golden:
        strict = check_instructions(prompt, response, ids, kwargs)
        loose = check_instructions_loose(prompt, response, ids, kwargs)
        assert all(b for a, b in zip(strict, loose, strict=True) if a)


def test_arguments_are_left_as_they_were_and_verdicts_do_not_depend_on_order(golden):
    for prompt, response, ids, kwargs, *_ in golden[:100]:
        before = copy.deepcopy(kwargs)
        first = check_instructions(prompt, response, ids, kwargs)
        check_instructions_loose(prompt, response, ids, kwargs)
        assert check_instructions(prompt, response, ids[::-1], kwargs[::-1])[::-1] == first
        assert kwargs == before


def test_the_registry_holds_the_ids_of_the_data(data_dir):
    rows = stored(data_dir, "input_data.jsonl")
    assert {instruction for row in rows for instruction in row["instruction_id_list"]} == set(IFEVAL)
    assert len(IFEVAL) == 25


# (id, arguments, responses that follow it, responses that do not)
EXAMPLES = [
    ("keywords:existence", {"keywords": ["Rain", "bow"]}, ["a rainbow"], ["rain", "bow"]),
    ("keywords:frequency", {"keyword": "a.b", "frequency": 2, "relation": "at least"}, ["a.b A.Bc"], ["a.b axb"]),
    ("keywords:frequency", {"keyword": "war", "frequency": 1, "relation": "less than"}, ["peace"], ["warm"]),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, ["rocks"], ["Rock!", "a rock"]),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, ["# #"], ["#a"]),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "less than"}, ["ab"], ["aA"]),
    ("language:response_language", {"language": "hi"}, ["नमस्ते, आप कैसे हैं?", "42"], ["How are you, my dear old friend?"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["A b. C."], ["Mr. C."]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["a-b"], ["don't go"]),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a *** b", "*** a *** b ***"],
        ["a", "a***\n***b"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        ['a\n\n"So," b', "a\n\nso.b"],
        ["so\n\na", "a\n\nso\n\nb", "so", "a\n\nsoon"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] [b]"], ["[[a]]", "[a\n] [b]"]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["a\np. p.s. b", "P.P.S b"], ["P.S. b"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a P. S. b"], ["P.S b", "ps."]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n  - b", "*a\n\n* b"],
        ["** a\n* b", "a * b\n- c"],
    ),
    ("detectable_format:constrained_response", {}, ["Well. My answer is no."], ["My answer is no!", "no"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a* **b**"], ["*a*b*", "* *c*"]),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        ["PART 1 PART2"],
        ["Part 1 PART 2"],
    ),
    ("detectable_format:json_format", {}, ['```json\n{"a": [1]}\n```', "7"], ["{'a': 1}", "{} {}", "[" * 100_000]),
    ("detectable_format:title", {}, ["<<a>>", "b\n<<<a> b>>"], ["<a>", "<< >>", "<<a\n>>", ">>a<<"]),
    (
        "combination:two_responses",
        {},
        ["a******b", "******a******b"],
        ["a", "a******a", "a******b******c", "a************b"],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, ["say HI. hi"], ["Sure: Say hi.", "Say hi"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ['"a. the END."', "The end. "], ["The end", "The end. a"]),
    ("startend:quotation", {}, [' "a" ', '""'], ['"', '"a', "“a”"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 3, "capital_relation": "at least"},
        ["I AM U.S.", "DON'T GO"],
        ["I AM u.s.", "A,1 B"],
    ),
    ("change_case:english_capital", {}, ["THE CAT SITS ON THE OLD GREEN MAT."], ["THE CAT SITS on the MAT", "7"]),
    (
        "change_case:english_lowercase",
        {},
        ["the cat sits on the old green mat."],
        ["The cat sits.", "le chat est sur la table"],
    ),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b"]),
]


@pytest.mark.parametrize(("instruction", "arguments", "good", "bad"), EXAMPLES)
def test_instruction(instruction, arguments, good, bad):
    for response in good:
        assert check_instructions("", response, [instruction], [arguments]) == [True], response
    for response in [*bad, "", " \n"]:
        assert check_instructions("", response, [instruction], [arguments]) == [False], response


def test_every_instruction_has_an_example():
    assert {example[0] for example in EXAMPLES} == set(IFEVAL)


def test_sentences_and_words():
    assert sentences('Dr. Smith left at 5 p.m. He said "no." Why? So...') == [
        "Dr. Smith left at 5 p.m.",
        'He said "no."',
        "Why?",
        "So...",
    ]
    assert sentences("J. Smith... well, no. 3 of the U.S. teams. 2. apples") == [
        "J. Smith... well, no.",
        "3 of the U.S. teams.",
        "2. apples",
    ]
    assert sentences("no end\n\nno end") == ["no end\n\nno end"]
    assert sentences("") == sentences(" ...!? \n") == []
    assert words("don't stop_now 1,000") == ["don", "t", "stop_now", "1", "000"]
    assert tokens("I can't. It's 1,000, (A/B)!") == [
        "I",
        "ca",
        "n't",
        ".",
        "It",
        "'s",
        "1,000",
        ",",
        "(",
        "A/B",
        ")",
        "!",
    ]


def test_language_does_not_depend_on_global_state():
    text = "the cat le chat die Katze il gatto"
    first = language(text)
    from langdetect import DetectorFactory

    assert DetectorFactory.seed is None
    assert {language(text) for _ in range(5)} == {first}


def test_loose_variants_by_hand():
    # three lines: without the first, the last, both; then the same four without stars, of which none repeats
    assert loose_variants("a\n*b*\nc") == ["a\n*b*\nc", "*b*\nc", "a\n*b*", "*b*", "a\nb\nc", "b\nc", "a\nb", "b"]
    quoted, end = ["startend:quotation"], [{}]
    assert check_instructions("", 'Sure:\n"a"\nDone.', quoted, end) == [False]
    assert check_instructions_loose("", 'Sure:\n"a"\nDone.', quoted, end) == [True]
    assert check_instructions_loose("", "", quoted, end) == [False]


ROW = {
    "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
    "kwargs": [{"keywords": None}, {"keywords": ["cat"]}],  # None: absent
}


def score(completion, reward=ifeval, row=ROW):
    return as_reward(reward)([Sample("say cat", completion, row=row)])[0]


def test_reward_values():
    assert score("<think>a, b</think>a cat")[:2] == (1.0, True)
    half = score("a dog")
    assert half[:2] == (0.5, False)
    assert half.parts == {"punctuation:no_comma": 1.0, "keywords:existence": 0.0}
    assert score("")[:2] == score("<think>cat")[:2] == (0.0, False)
    for value, expected in (("mean", 0.5), ("sum", 1.0), ("all", 0.0)):
        assert score("a, cat", functools.partial(ifeval, value=value)).value == expected
    assert score("Well, yes:\na cat", functools.partial(ifeval, loose=True))[:2] == (1.0, True)


def test_a_part_stands_for_all_instructions_of_its_id():
    row = {"instruction_id_list": ["keywords:existence"] * 2, "kwargs": [{"keywords": ["dog"]}, {"keywords": ["cat"]}]}
    assert score("a cat", row=row).parts == {"keywords:existence": 0.0}


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="no 'kwargs'"):
        score("a", row={"instruction_id_list": ["punctuation:no_comma"]})
    with pytest.raises(ValueError, match="did you mean 'punctuation:no_comma'"):
        score("a", row={"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]})
    with pytest.raises(ValueError, match="'keywords:existence' do not fit it: missing a required argument: 'keywords'"):
        check_instructions("", "a", ["keywords:existence"], [{}])
    with pytest.raises(ValueError, match="2 instructions and 1 kwargs"):
        score("a", row=ROW | {"kwargs": [{}]})
    with pytest.raises(ValueError, match="'at least' or 'less than'"):
        check_instructions("", "a", ["length_constraints:number_words"], [{"num_words": 3, "relation": "more than"}])
    with pytest.raises(ValueError, match="'mean', 'sum', 'all'"):
        ifeval(Sample("", "a", row=ROW), value="median")


def test_counts_stored_as_floats_are_counts():
    arguments = {"num_words": 2.0, "relation": "less than", "num_sentences": None}
    assert check_instructions("", "one", ["length_constraints:number_words"], [arguments]) == [True]
