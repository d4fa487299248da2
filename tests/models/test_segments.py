"""Attention over shared prompts: all slots with all entries in one product, or each entry with its own group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models.attention import Cache
from rljax.models.quantized import quantize
from rljax.models.segments import Places, _prompt_part

SLOTS, HEADS, QUERIES, WIDTH, ENTRIES, GROUP, COLUMNS = 5, 2, 3, 8, 3, 2, 6


@pytest.mark.parametrize("int8", [False, True])
def test_both_forms_of_attention_over_shared_prompts_agree(int8: bool) -> None:
    """Slot 2 is idle and still names the place that slot 0 has; entry 2 has one sample; prompts have padding."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(SLOTS, HEADS, QUERIES, WIDTH)), jnp.float32)
    shape = (HEADS, ENTRIES, COLUMNS, WIDTH)
    stored = Cache(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)))
    stored = Cache(*(quantize(x, (-1,)) for x in stored)) if int8 else stored
    valid = jnp.arange(COLUMNS) >= jnp.array([[0], [3], [5]])
    entry = jnp.array([1, 0, 1, 2, 0])
    own = entry * GROUP + jnp.array([0, 1, 0, 1, 0])
    places = Places(jnp.array([[4, 1], [0, 0], [0, 3]]), own)
    in_all = (entry[:, None] == jnp.arange(ENTRIES))[:, :, None] & valid
    one = _prompt_part(q, stored, in_all, None, 0.4)
    apart = _prompt_part(q, stored, valid[entry], places, 0.4)
    running = jnp.array([0, 1, 3, 4])
    for ours, theirs in zip(*(jax.tree.map(lambda x: x[running], part) for part in (apart, one)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
