"""When to query a language model: LaGR-SEQ's second learner (2308.13542) with a budget. Host Python, no arrays."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class QueryGate:
    """What asking was worth so far, by situation. Never more than ``budget`` queries are granted."""

    budget: int  # queries in all
    cost: float  # of a query, on the scale of qualities
    trials: int = 1  # queries that every situation gets before its mean decides
    asked: int = 0
    totals: Mapping[Hashable, tuple[int, float]] = field(default_factory=dict)  # by situation: queries, their quality

    def asks(self, situation: Hashable) -> bool:
        """Whether to query here: it has not been tried enough, or its answers were worth more than they cost."""
        count, quality = self.totals.get(situation, (0, 0.0))
        return self.asked < self.budget and (count < self.trials or quality / count > self.cost)

    def after(self, situation: Hashable, quality: float) -> "QueryGate":
        """The gate after a query whose answer had this quality, such as the gain in return. Raises ValueError past the
        budget."""
        if self.asked >= self.budget:
            raise ValueError(f"all {self.budget} queries are spent; ask `asks` first")
        count, total = self.totals.get(situation, (0, 0.0))
        totals = {**self.totals, situation: (count + 1, total + quality)}
        return replace(self, asked=self.asked + 1, totals=totals)
