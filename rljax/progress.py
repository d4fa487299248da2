"""Where a run stands: what a checkpoint says beside the state."""

from dataclasses import dataclass, field
from typing import Any

from rljax.checkpoint import CheckpointError
from rljax.data.batches import DataPosition


@dataclass
class Progress:
    """Where a run stands: all of it is in the checkpoint, beside the state."""

    step: int = 0  # loop steps over all stages
    stage: int = 0
    stage_step: int = 0
    data: DataPosition = field(default_factory=DataPosition)
    bad_steps: int = 0  # skipped in a row
    prompts: int = 0
    episodes: int = 0
    tokens: int = 0
    best_dev: float | None = None  # the highest score on dev after a step
    limited: dict[str, float] = field(default_factory=dict)  # what limits looked at in the last step
    stopped: bool = False  # that step passed one: what there is was evaluated, saved and exported
    selected: dict[str, str] = field(default_factory=dict)  # hash of the rows that a stage on samples began with

    def to_json(self) -> dict[str, Any]:
        # Copies: a checkpoint is written in the background.
        copies = {"data": list(self.data), "limited": dict(self.limited), "selected": dict(self.selected)}
        return {**vars(self), **copies}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        if set(values) != set(vars(cls())):
            raise CheckpointError("another version of rljax wrote the checkpoints; go on with that, or in a new folder")
        return cls(**{**values, "data": DataPosition(*values["data"])})
