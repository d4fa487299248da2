"""Whole updates whose head goes through the vocabulary block by block, as on CPUs, against one block."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.losses.chunked_logprobs import count_blocks
from rljax.models.params import init_params
from tests.models.tiny import layout, tiny_model
from tests.truths import grpo_algorithm, make_gradient, random_batch, relative_error, tiny_forward

# A table of 128 rows, 100 of them real: four blocks of 32, of which the last begins inside the vocabulary.
V, BLOCK = 100, 32
MODEL = tiny_model("llama", vocab_size=V, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
P, C = 4, 6
LENGTHS = [(4, 1), (1, 6), (2, 2), (4, 6), (3, 1), (4, 1), (1, 5), (2, 0)]
GRPO = grpo_algorithm(kl_coef=0.1, entropy_coef=0.01, max_new_tokens=C)


@pytest.mark.parametrize(
    ("mesh", "plan", "forward"),
    [
        ("1,1,1", {}, {}),
        ("1,4,1", {"micro_batches": 2, "bin_length": 0}, {"remat": "block", "truncates": True, "temperature": 0.7}),
    ],
)
def test_an_update_in_blocks_of_the_vocabulary_is_one_in_a_single_block(
    mesh: str, plan: dict[str, Any], forward: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, entropy and gradient in float64; alone, and over data shards, packed and with remat."""
    blocks = []

    def counting(vocab: int, longest: int) -> int:
        blocks.append(count_blocks(vocab, longest))
        return blocks[-1]

    monkeypatch.setattr(sys.modules[count_blocks.__module__], "count_blocks", counting)  # a function has its name
    found = []
    with jax.enable_x64(True):
        place = layout(mesh)
        params = init_params(MODEL, place, seed=0, dtype=jnp.float64)
        batch = random_batch(np.random.default_rng(0), V, LENGTHS, P, C)
        batch["support"] = np.random.default_rng(1).normal(-0.5, 0.5, batch["support"].shape)
        for block in (BLOCK, 2048):
            monkeypatch.setattr("rljax.forward.CPU_VOCAB_BLOCK", block)
            gradient = make_gradient(GRPO, tiny_forward(MODEL, place, dtype=jnp.float64, **forward), P, **plan)
            found.append(gradient(params, batch))
            assert set(blocks) == {128 // block or 1}
            blocks.clear()
    (mine, metrics), (expected, others) = found
    assert relative_error(mine, expected) <= 1e-11
    assert abs(others["loss"]) > 1e-3 and others["entropy"] > 1
    for name, value in others.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
