"""What a step used of the machine: model FLOPs by hand."""

from typing import Any

import pytest

from rljax.config import algo_defaults, make_config
from rljax.models.params import parameter_count
from rljax.usage import usage_metrics
from tests.tiny import tiny_config
from tests.truths import tiny_session

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("critics", "passes"), [(0, 1.0), (0, 4.0), (1, 0.5)])
def test_mfu_by_hand(critics: int, passes: float) -> None:
    """1,000 tokens in an update of 2 s on a chip of 1e-6 TFLOP/s: 6 FLOPs a weight, a token and a pass."""
    session: Any = tiny_session(**{"log.peak_tflops": 1e-6})
    measured = {"speed/tokens_per_s": 250.0, "time/step_s": 4.0, "time/update_s": 2.0, "time/score_s": 1.0}
    found = usage_metrics(session, measured, trained=[session.model] * (1 + critics), passes=passes)
    weights = parameter_count(session.model)
    assert session.model.config.tied_embeddings  # the table is the head's: every weight is multiplied
    assert found["speed/mfu"] == pytest.approx(6 * weights * (1 + critics) * passes * 1000 / 2 / 1e6)
    assert (found["speed/score_tokens_per_s"], found["speed/update_tokens_per_s"]) == (1000, 500)


def test_passes_count_epochs_and_the_rows_that_are_trained_on() -> None:
    """GRPO trains on every row of a rollout, online DPO on the best and the worst of 4, here in 3 epochs."""
    config = tiny_config(recipe=("main",), **{"rollout.group_size": 4, "batch.epochs": 3})
    assert make_config(config).passes == 3
    with config.unlocked():
        config.algo = algo_defaults("online_dpo")
    config.algo.beta = 0.1
    assert make_config(config).passes == 1.5
