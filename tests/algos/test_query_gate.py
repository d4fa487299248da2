"""The query gate: what it grants, what it learns, and that a budget is a budget."""

import random

import pytest

from rljax.algos.query_gate import QueryGate


def test_it_asks_again_where_the_answers_were_worth_it() -> None:
    """Cost .3: a mean of (.5 + .2) / 2 is above it, after another 0 the mean .7 / 3 is not."""
    gate = QueryGate(budget=10, cost=0.3)
    assert gate.asks("corner")
    gate = gate.after("corner", 0.5).after("corner", 0.2)
    assert gate.asks("corner")
    gate = gate.after("corner", 0.0)
    assert not gate.asks("corner") and gate.asks("elsewhere")
    assert gate.asked == 3


def test_every_situation_gets_its_trials_first() -> None:
    gate = QueryGate(budget=10, cost=0.3, trials=2).after("x", -1.0)
    assert gate.asks("x") and not gate.after("x", -1.0).asks("x")


@pytest.mark.parametrize("budget", [0, 1, 17])
def test_the_queries_never_pass_the_budget(budget: int) -> None:
    draw, gate = random.Random(0), QueryGate(budget=budget, cost=0.0)
    for _ in range(200):
        situation = draw.randrange(5)
        if gate.asks(situation):
            gate = gate.after(situation, draw.uniform(-0.5, 1))
    assert gate.asked <= budget
    assert not gate.asks("new") or gate.asked < budget
    if gate.asked == budget:
        with pytest.raises(ValueError, match=f"all {budget} queries are spent"):
            gate.after("new", 1.0)
