"""Supervised fine-tuning on tables of log-probs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algos.base import total
from rljax.algos.sft import Config, make
from rljax.types import Outputs
from tests.algos.tables import terms_of

ALGORITHM = make(Config(), group_size=1, max_new_tokens=1)
LOGPROBS = np.array([[np.nan, -1.0, -2.0, -3.0], [np.nan, -4.0, np.inf, -np.inf]], np.float32)
MASK = np.array([[False, True, True, True], [False, True, False, False]])


def loss(logprobs: jax.Array, mask: np.ndarray) -> jax.Array:
    _, batch, denominators = ALGORITHM.prepare((), {"loss_mask": jnp.asarray(mask)}, None)
    return total(ALGORITHM.loss(Outputs(logprobs), batch), denominators)


def test_tokens_weigh_alike_whatever_their_row() -> None:
    """(1 + 2 + 3 + 4) / 4 and not the mean of the rows' means, 2 and 4."""
    np.testing.assert_allclose(loss(jnp.asarray(LOGPROBS), MASK), 2.5, rtol=1e-6)


def test_the_gradient_is_minus_one_over_the_count_where_trained_and_0_elsewhere() -> None:
    gradient = jax.grad(loss)(jnp.asarray(LOGPROBS), MASK)
    np.testing.assert_allclose(gradient, np.where(MASK, -1 / 4, 0), rtol=1e-6)


def test_halves_over_the_whole_step_s_count_add_up() -> None:
    denominators = ALGORITHM.prepare((), {"loss_mask": jnp.asarray(MASK)}, None)[2]
    halves = [ALGORITHM.loss(Outputs(LOGPROBS[i : i + 1]), {"loss_mask": MASK[i : i + 1]}) for i in range(2)]
    np.testing.assert_allclose(sum(total(half, denominators) for half in halves), 2.5, rtol=1e-6)


def test_it_needs_nothing_and_samples_nothing() -> None:
    assert ALGORITHM.needs == frozenset()
    assert ALGORITHM.targets is None
    assert ALGORITHM.init() == ()


def of(logprobs: list[float], means: list[float], normalizers: list[float], **options: Any) -> dict[str, Any]:
    """Terms of one row whose first column is masked."""
    columns = ([jnp.nan, *values] for values in (logprobs, means, normalizers))
    table = [jnp.asarray(values)[None] for values in columns]
    algorithm = make(Config(**options), group_size=1, max_new_tokens=1)
    mask = np.array([[False] + [True] * len(logprobs)])
    outputs = Outputs(table[0], mean_logprobs=table[1], log_normalizers=table[2])
    return terms_of(algorithm, outputs if algorithm.needs else Outputs(table[0]), {"loss_mask": mask})


def test_label_smoothing_and_z_loss_by_hand() -> None:
    """.9 (1 + 3) / 2 + .1 (2 + 4) / 2 + 1e-2 (2² + 3²) / 2."""
    terms = of([-1.0, -3.0], [-2.0, -4.0], [2.0, -3.0], label_smoothing=0.1, z_loss_coef=0.01)
    np.testing.assert_allclose(terms["total"], 0.9 * 2 + 0.1 * 3 + 0.01 * 6.5, rtol=1e-6)
    np.testing.assert_allclose([terms["nll"], terms["uniform_nll"], terms["z_loss"]], [2, 3, 6.5])


def test_dft_by_hand() -> None:
    """(e^-1 * 1 + e^-3 * 3) / 2, beside the plain number, which is a metric."""
    terms = of([-1.0, -3.0], [0.0, 0.0], [0.0, 0.0], loss="dft")
    np.testing.assert_allclose(terms["total"], (math.exp(-1) + 3 * math.exp(-3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["nll"], 2)


def test_the_sum_has_no_denominator() -> None:
    """Tülu 3's: 1 + 3, however many tokens there are."""
    np.testing.assert_allclose(of([-1.0, -3.0], [0.0, 0.0], [0.0, 0.0], reduction="token_sum")["total"], 4)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="dft reads no label_smoothing"):
        make(Config(loss="dft", label_smoothing=0.1), group_size=1, max_new_tokens=1)
    with pytest.raises(ValueError, match="label_smoothing is 1"):
        make(Config(label_smoothing=1.0), group_size=1, max_new_tokens=1)
