"""From samples to rows: what is kept, what is one and the same, who is paired with whom."""

from collections import Counter
from typing import Any

import pytest

from rljax.data.preferences import read_comparison
from rljax.data.rows import DataError
from rljax.data.select import (
    best_against,
    equations,
    labelled,
    prompts_of,
    rows_hash,
    select,
    split_by_gap,
)

pytestmark = pytest.mark.fast


def sample(group: str, completion: str, reward: float, **changes: Any) -> dict[str, Any]:
    row = {"prompt": f"{group}=", "answer": "7"}
    base = {"row": row, "completion": completion, "ids": [1], "reward": reward, "correct": reward > 0, "finished": True}
    return {**base, "group": group, **changes}


ROUND = [
    sample("3+4", "3+4=7;#7", 1.0),
    sample("3+4", " 3+4=7;#7", 1.0),
    sample("3+4", "so 3 + 4 = 7 it is", 1.0),
    sample("3+4", "#7", 1.0),
    sample("3+4", "#8", 0.0),
    sample("2+5", "#7", 1.0, finished=False),
    sample("2+5", "#6", 0.0),
]


def rule(name: str, **settings: Any) -> dict[str, Any]:
    return {"rule": name, **settings}


def test_right_and_finished_samples_are_text() -> None:
    assert select(ROUND, **rule("correct")) == [
        {"prompt": "3+4=", "solution": text} for text in ("3+4=7;#7", " 3+4=7;#7", "so 3 + 4 = 7 it is", "#7")
    ]


def test_the_same_text_and_the_same_equations_are_one_sample() -> None:
    texts = [row["solution"] for row in select(ROUND, **rule("correct", distinct="text"))]
    assert texts == ["3+4=7;#7", "so 3 + 4 = 7 it is", "#7"]
    texts = [row["solution"] for row in select(ROUND, **rule("correct", distinct="equations"))]
    assert texts == ["3+4=7;#7", "#7"]
    assert equations("48/2 = 24 and 24 + 48=72.") == "48/2=24;24+48=72"
    other_prompt = sample("4+3", "3+4=7;#7", 1.0)
    assert len(select([*ROUND, other_prompt], **rule("correct", distinct="equations"))) == 3


def test_a_union_of_rounds_is_the_union_of_sets() -> None:
    again = select([*ROUND, *ROUND], **rule("correct", distinct="text"))
    assert again == select(ROUND, **rule("correct", distinct="text"))


def test_at_most_so_many_of_a_prompt() -> None:
    rows = select(ROUND, **rule("correct", per_prompt=2))
    assert len(rows) == 2
    assert rows == select(ROUND[::-1][::-1], **rule("correct", per_prompt=2))
    chosen = {
        tuple(r["solution"] for r in select(ROUND, **rule("correct", per_prompt=2), seed=seed)) for seed in range(40)
    }
    assert len(chosen) == 6  # all pairs of four


def test_the_best_is_paired_with_any_worse_one_and_never_with_an_equal() -> None:
    group = [sample("g", text, reward) for text, reward in (("a", 0.5), ("b", 0.9), ("c", 0.9), ("d", 0.1), ("b", 0.2))]
    found = Counter(best_against(group, "random", seed)[0]["rejected"] for seed in range(300))
    assert set(found) == {"a", "d"}  # c is as good, the second b has the same text
    assert min(found.values()) > 110  # 150 each; below 110 is 4.6 standard deviations
    (pair,) = best_against(group, "worst")
    assert (pair["chosen"], pair["rejected"], pair["chosen_score"], pair["rejected_score"]) == ("b", "d", 0.9, 0.1)
    assert not best_against([sample("g", text, 1.0) for text in "abc"], "worst")
    assert read_comparison(pair, 0)[1:] == (["b", "d"], [0.9, 0.1])


def test_a_groups_pair_does_not_depend_on_the_groups_beside_it() -> None:
    first = [sample("g", text, reward) for text, reward in zip("abcde", (4, 1, 2, 3, 0), strict=True)]
    second = [sample("h", text, reward) for text, reward in zip("abcde", (0, 1, 2, 3, 4), strict=True)]
    for seed in range(5):
        assert best_against([*second, *first], "random", seed)[1:] == best_against(first, "random", seed)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 0.5, 2.0])
def test_the_gap_parts_the_pairs(threshold: float) -> None:
    """MPO's split: every pair is on one side; a gap of exactly the threshold is difficult."""
    pairs = [
        {"prompt": str(i), "chosen_score": gap, "rejected_score": 0.0} for i, gap in enumerate((0.0, 0.3, 0.5, 1.0))
    ]
    easy, difficult = (split_by_gap(pairs, threshold, part) for part in ("easy", "difficult"))
    assert sorted(easy + difficult, key=lambda row: row["prompt"]) == pairs
    assert all(row["chosen_score"] > threshold for row in easy)
    assert all(row["chosen_score"] <= threshold for row in difficult)


def test_pairs_without_scores_have_no_gap() -> None:
    with pytest.raises(DataError, match="row 0 has no chosen_score"):
        split_by_gap([{"prompt": "a", "chosen": "b", "rejected": "c"}], 0.1, "easy")


def test_difficult_pairs_become_prompts() -> None:
    group = [sample("g", "a", 0.2), sample("g", "b", 0.1)]
    rows = select(group, **rule("pairs", gap="difficult", gap_threshold=0.5))
    assert [row["answer"] for row in prompts_of(rows + rows)] == ["7"]  # a verifier still finds its column


def test_returns_are_labels_before_the_prompt() -> None:
    rows = select(ROUND, **rule("returns", labels=("-", "+")))
    assert [row["prompt"] for row in rows] == ["+3+4="] * 4 + ["-3+4=", "-2+5="]
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "q"},
    ]
    assert labelled({"messages": chat}, "good: ")["prompt"] == [*chat[:2], {"role": "user", "content": "good: q"}]


def test_rankings_and_verdicts() -> None:
    (ranking, _) = select([*ROUND, sample("2+5", "#7", 1.0)], **rule("ranking", distinct="text"))
    assert ranking["scores"] == [1.0, 1.0, 1.0, 0.0] and len(ranking["completions"]) == 4
    alike = [sample("1+1", "#2", 1.0), sample("1+1", "2", 1.0)]  # prefer nothing
    assert len(select([*ROUND, *alike], **rule("ranking"))) == 1
    rows = select(ROUND, **rule("verdicts"))
    assert [row["label"] for row in rows] == [True] * 4 + [False] * 2
    best = select(ROUND, **rule("best"))
    assert best == [{"prompt": "3+4=", "solution": "3+4=7;#7"}, {"prompt": "2+5=", "solution": "#6"}]


def test_nothing_left_and_nobody_judging_are_said() -> None:
    with pytest.raises(DataError, match=r"rule 'correct' leaves no row of 1 samples"):
        select([sample("g", "a", 0.0)], **rule("correct"))
    with pytest.raises(DataError, match="no reward judges right and wrong"):
        select([sample("g", "a", 0.0, correct=None)], **rule("verdicts"))


def test_the_hash_knows_order_and_content() -> None:
    rows = [{"a": 1, "b": 2}, {"a": 2}]
    assert rows_hash(rows) == rows_hash([{"b": 2, "a": 1}, {"a": 2}])
    assert len({rows_hash(rows), rows_hash(rows[::-1]), rows_hash(rows[:1])}) == 3
