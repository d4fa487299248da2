"""Generated tasks: right answers, disjoint splits, an order that is the seed's."""

import re
from collections import Counter

import pytest

from rljax.data import arithmetic, constraints, countdown, stories
from rljax.data.tokenizer import character_tokenizer
from rljax.rewards.base import Sample
from rljax.rewards.ifeval import ifeval

pytestmark = pytest.mark.fast

COUNTS = {"train": 2000, "dev": 200, "test": 512}


@pytest.mark.parametrize("difficulty", [2, 3, 4])
def test_arithmetic_is_right_step_by_step(difficulty):
    for row in arithmetic.make_rows(split="train", count=500, difficulty=difficulty):
        assert int(row["answer"]) == eval(row["prompt"].rstrip("="))
        *steps, last = row["solution"].split(";")
        assert last == "#" + row["answer"]
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right) >= 0
        assert steps[0].startswith(re.match(r"\d+", row["prompt"])[0])
        assert len(steps) == len(re.findall(r"[+-]", row["prompt"]))


def test_worked_solution_by_hand():
    # 17 + 25 = 42, 42 - 8 = 34
    assert arithmetic.worked_solution([17, 25, -8]) == "17+25=42;42-8=34;#34"


@pytest.mark.parametrize("task", [arithmetic, constraints, countdown])
def test_splits_are_disjoint_whatever_the_seeds(task):
    prompts = {
        split: {row["prompt"] for seed in (0, 1, 2) for row in task.make_rows(split=split, count=count, seed=seed)}
        for split, count in COUNTS.items()
    }
    assert all(len(prompts[split]) >= count for split, count in COUNTS.items())
    assert not prompts["train"] & prompts["dev"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["dev"] & prompts["test"]


def test_arithmetic_splits_are_disjoint_up_to_the_order_of_terms():
    def keys(split, count):
        rows = arithmetic.make_rows(split=split, count=count)
        return {tuple(sorted(re.findall(r"[+-]?\d+", "+" + row["prompt"]))) for row in rows}

    assert not keys("train", 3000) & keys("test", 512)


def test_arithmetic_order_is_the_seeds():
    first = arithmetic.make_rows(split="train", count=50, seed=3)
    assert first == arithmetic.make_rows(split="train", count=50, seed=3)
    assert first == arithmetic.make_rows(split="train", count=80, seed=3)[:50]
    assert first != arithmetic.make_rows(split="train", count=50, seed=4)


@pytest.mark.parametrize("task", [arithmetic, constraints, countdown])
def test_alphabet_spells_every_row(task):
    tokenizer = character_tokenizer(task.ALPHABET)
    for row in task.make_rows(split="train", count=300):
        text = row["prompt"] + row["solution"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_too_many_problems_and_wrong_names_are_said():
    with pytest.raises(ValueError, match=r"found only \d+ different problems of 5000 in split 'test'"):
        arithmetic.make_rows(split="test", count=5000, bounds=(2, 2, 9))
    for bounds in (3, (2, 4), (4, 2, 9), (0, 2, 9), (2, 4, 0), ("2", 4, 9)):
        with pytest.raises(ValueError, match="give the fewest operands, the most and the largest"):
            arithmetic.make_rows(split="train", bounds=bounds)
    with pytest.raises(ValueError, match="no difficulty 9; it has 1, 2, 3, 4"):
        arithmetic.make_rows(split="train", difficulty=9)
    with pytest.raises(ValueError, match="no split 'val'; it has train, dev, test"):
        arithmetic.make_rows(split="val")


def test_solutions_keep_their_constraint_or_pay_it_no_heed():
    def kept(**options):
        rows = constraints.make_rows(split="train", count=600, **options)
        found = Counter()
        for row in rows:
            score = ifeval(Sample(prompt=row["prompt"], completion=row["solution"], row=row))
            found[row["instruction_id_list"][0]] += score.correct
            assert row["solution"].startswith(row["prompt"].split(",")[0])
        return found, Counter(row["instruction_id_list"][0] for row in rows)

    right, asked = kept()
    assert right == asked and set(asked) == {"count:word_count_range", "count:unique_word_count", "count:numbers"}
    right, asked = kept(ignored_share=1.0)
    assert 0.2 < right.total() / asked.total() < 0.4
    assert constraints.make_rows(split="dev", count=20, seed=1) != constraints.make_rows(split="dev", count=20)
    with pytest.raises(ValueError, match="no split 'val'; they have train, dev, test"):
        constraints.make_rows(split="val")


def test_countdown_solutions_use_each_number_once_and_reach_the_target():
    for row in countdown.make_rows(split="train", count=500, operands=4):
        expression = row["solution"].split("#")[1]
        assert eval(expression) == row["target"] == int(row["answer"])
        assert sorted(map(int, re.findall(r"\d+", expression))) == sorted(row["numbers"])
        for step in row["solution"].split("#")[0].split(";")[:-1]:
            left, right = step.split("=")
            assert eval(left) == int(right) >= 0


def test_stories_are_cut_by_their_marker_or_by_single_line_breaks():
    assert stories.split_stories("\nA b.\nC.\n<|endoftext|>\nD.\n<|endoftext|>\nunfin") == ["A b.\nC.", "D."]
    assert stories.split_stories("A.\n\nB.\nC.\n\nD.\nunfin") == ["A.\n\nB.", "C.\n\nD."]


@pytest.mark.parametrize("files", [["a"], ["b"], ["a", "b"]])
def test_story_prompts_of_the_real_files(data_dir, files):
    paths = [data_dir / f"datasets/text/tinystories_{name}.txt" for name in files]
    path = ",".join(map(str, paths))
    everything = "\n".join(file.read_text() for file in paths)
    rows = {split: stories.make_rows(split=split, path=path) for split in COUNTS}
    prompts = {split: {row["prompt"] for row in rows[split]} for split in COUNTS}
    assert len(rows["train"]) > 600 and len(rows["dev"]) > 60 and len(rows["test"]) > 60
    assert not prompts["train"] & (prompts["dev"] | prompts["test"]) and not prompts["dev"] & prompts["test"]
    for row in rows["test"]:
        assert row["prompt"] + row["continuation"] in everything
        assert len(row["words"]) == 2
        for word in row["words"]:
            assert re.search(rf"\b{word}\b", row["continuation"]) and not re.search(rf"\b{word}\b", row["prompt"])
        assert row["prompt"] != row["prompt"].rstrip() and row["continuation"] == row["continuation"].lstrip()
    assert stories.make_rows(split="dev", path=path, count=5, seed=1) != rows["dev"][:5]
    assert stories.make_rows(split="dev", path=path, count=5) == rows["dev"][:5]


def test_story_words_and_openings_as_asked(data_dir):
    path = str(data_dir / "datasets/text/tinystories_a.txt")
    bare = stories.make_rows(split="dev", path=path, keep_space=False)
    assert all(row["prompt"] == row["prompt"].rstrip() for row in bare)
    for row in stories.make_rows(split="dev", path=path, words_from="opening", opening_sentences=2, words=1):
        (word,) = row["words"]
        assert re.search(rf"\b{word}\b", row["prompt"]) and re.search(rf"\b{word}\b", row["continuation"])
        assert len(stories.sentence_ends(row["prompt"])) == 2
    with pytest.raises(ValueError, match="words_from the continuation, the opening or the hero, not 'title'"):
        stories.make_rows(split="dev", path=path, words_from="title")


def test_names_are_capitalised_inside_sentences_and_never_small():
    """Rose is a flower once for one time as a name; The and He stand at beginnings of sentences only."""
    stories_ = [
        "The cat saw Max. He ran to Rose. Then Mr. Spot, said Max's mum.",
        "A rose and a cat. So, Max and Spot sat.",
    ]
    names_in = stories.names_finder(stories_)
    assert names_in("Max and Spot met Rose. The max Maxine; Max's hat") == ["Max", "Spot", "Max"]
    assert stories.names_finder([])("Max") == []


def test_the_hero_is_the_name_that_the_real_story_says_most(tmp_path):
    file = tmp_path / "stories.txt"
    one = "Once, Tim met Sue. They ran. So Sue sang. And Sue sat with Tim."
    file.write_text("<|endoftext|>".join([one, "There was a dog. It ran. It sat.", "rest"]))
    rows = [
        row
        for split in COUNTS
        for row in stories.make_rows(
            split=split,
            path=str(file),
            words=1,
            words_from="hero",
            opening_sentences=2,
            min_occurrences=2,
            min_sentences=4,
        )
    ]
    assert len(rows) == 1 and rows[0]["prompt"] == "Once, Tim met Sue. They ran. "
    assert rows[0]["words"] == ["Sue"] and rows[0]["sentences"] == 4


def test_heroes_of_the_real_files(data_dir):
    path = ",".join(str(data_dir / f"datasets/text/tinystories_{name}.txt") for name in "ab")
    rows = stories.make_rows(
        split="train", path=path, words=1, words_from="hero", opening_sentences=2, min_occurrences=20
    )
    heroes = Counter(row["words"][0] for row in rows)
    assert len(rows) > 1000 and {"Lily", "Tim", "Tom"} <= set(heroes)
    assert not {"Once", "One", "The", "They", "Mom", "Dad"} & set(heroes)
    assert all(row["words"][0] in row["prompt"] and row["words"][0] in row["continuation"] for row in rows)


def test_story_file_missing(tmp_path):
    with pytest.raises(ValueError, match=r"story file .*nope.txt does not exist"):
        stories.make_rows(split="train", path=str(tmp_path / "nope.txt"))
