"""Which policy version samples a rollout and which update trains on it: a schedule without devices or clocks.

Version v is the policy after v updates. Update u trains on rollout u and makes version u + 1.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Turn(NamedTuple):
    """One update: rollout ``number`` was sampled by ``generated_by`` and trains ``trained_from``."""

    number: int
    generated_by: int
    trained_from: int

    @property
    def staleness(self) -> int:
        return self.trained_from - self.generated_by


@dataclass(frozen=True)
class Schedule:
    """Rollouts are ``lag`` versions old, the first ``lag`` as old as there are versions.

    0 is synchronous; 1 is asynchronous RLHF (2410.18252) and Cleanba (2310.00036), whose actor skips its second fetch
    of parameters only, so that sampling and training run side by side from then on.
    """

    lag: int

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ValueError(f"lag is {self.lag}; rollouts are 0 versions old or more")

    def turn(self, number: int) -> Turn:
        return Turn(number, max(number - self.lag, 0), number)

    def fetches(self, number: int) -> bool:
        """Whether the sampler takes new parameters before rollout ``number``."""
        return number == 0 or self.turn(number).generated_by != self.turn(number - 1).generated_by

    def kept_versions(self, number: int) -> range:
        """Versions that must still be readable when update ``number`` begins, its own included."""
        return range(self.turn(number).generated_by, number + 1)
