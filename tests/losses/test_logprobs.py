"""Log-probs from logits by hand, and the chunked head against the dense one: values, gradients, buffers, meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rljax.losses import (
    chunked_logprobs,
    entropy,
    head_logits,
    log_normalizer,
    reduce_logits_in_chunks,
    sequence_logprobs,
    token_logprobs,
    truncated_logprobs,
)
from rljax.losses.chunked_logprobs import narrowed

N, D, V, PADDED = 23, 8, 37, 40


def dense(hidden, head, targets, *, vocab_size=V, temperature=1.0, support=None):
    """Log-probs and entropy as one would write them without a thought for memory."""
    scaled = (hidden @ head[:vocab_size].T) / temperature
    kept = scaled
    if support is not None:
        is_target = jnp.arange(vocab_size) == targets[:, None]
        kept = jnp.where((scaled >= support[:, None]) | is_target, scaled, -jnp.inf)
    logp = jax.nn.log_softmax(scaled, axis=-1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(kept, axis=-1), targets[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def inputs(dtype, seed=0, n=N, v=PADDED):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(n, D)), dtype)
    head = jnp.asarray(rng.normal(size=(v, D)), dtype)
    targets = jnp.asarray(rng.integers(0, min(V, v), n))
    weights = jnp.asarray(rng.normal(size=(2, n)), dtype)
    support = jnp.asarray(np.where(rng.random(n) < 0.3, -np.inf, rng.normal(size=n)), dtype)
    return hidden, head, targets, weights, support


def test_token_logprobs_and_entropy_by_hand():
    # Odds 1 : 2 : 5 give probabilities 1/8, 2/8, 5/8.
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(log_normalizer(logits), [np.log(8)], rtol=1e-6)
    np.testing.assert_allclose(token_logprobs(logits, jnp.array([2])), [np.log(5 / 8)], rtol=1e-6)
    expected = -(np.log(1 / 8) + 2 * np.log(2 / 8) + 5 * np.log(5 / 8)) / 8
    np.testing.assert_allclose(entropy(logits), [expected], rtol=1e-6)
    # Temperature 1/2 squares the odds: 1 : 4 : 25, of 30.
    np.testing.assert_allclose(token_logprobs(logits, jnp.array([1]), 0.5), [np.log(4 / 30)], rtol=1e-6)
    # Kept from log 2 on: 2 of 7. A token below its own threshold still counts itself: 1 of 1 + 2 + 5.
    support = jnp.log(jnp.array([2.0]))
    np.testing.assert_allclose(truncated_logprobs(logits, jnp.array([1]), support), [np.log(2 / 7)], rtol=1e-6)
    np.testing.assert_allclose(truncated_logprobs(logits, jnp.array([0]), support), [np.log(1 / 8)], rtol=1e-6)
    everything = jnp.array([-jnp.inf])
    np.testing.assert_allclose(truncated_logprobs(logits, jnp.array([0]), everything), [np.log(1 / 8)], rtol=1e-6)


def test_sequence_logprobs_sums_what_the_mask_keeps():
    logprobs = jnp.array([[jnp.nan, -1.0, -2.0], [jnp.nan, jnp.nan, jnp.nan]])
    mask = jnp.array([[False, True, True], [False, False, False]])
    np.testing.assert_array_equal(sequence_logprobs(logprobs, mask), [-3.0, 0.0])


def test_absent_logits_leave_entropy_and_its_gradient_finite():
    logits = jnp.array([0.3, -1.0, 0.7])
    padded = jnp.append(logits, -jnp.inf)
    np.testing.assert_allclose(entropy(padded), entropy(logits), rtol=1e-6)
    gradient = jax.grad(entropy)(padded)
    np.testing.assert_allclose(gradient[:3], jax.grad(entropy)(logits), rtol=1e-5)
    assert gradient[3] == 0.0


def results_of(function, hidden, head, weights):
    """Log-probs and entropy, then the gradients of one weighted sum of both."""

    def loss(hidden, head):
        logprobs, nats = function(hidden, head)
        return jnp.sum(weights[0] * logprobs + weights[1] * nats), (logprobs, nats)

    gradients, values = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)
    return *values, *gradients


@pytest.mark.parametrize("block", [None, 4, 10])
@pytest.mark.parametrize("chunk_size", [1, 5, 8, 23, 64])
@pytest.mark.parametrize("truncated", [False, True])
def test_chunked_equals_dense_in_float64(chunk_size, truncated, block):
    with jax.enable_x64(True):
        hidden, head, targets, weights, support = inputs(jnp.float64)
        support = support if truncated else None
        head = head.at[V:].set(1e3)  # padding must not count
        options = {"targets": targets, "temperature": 0.7, "vocab_size": V, "support": support}
        chunked = partial(chunked_logprobs, chunk_size=chunk_size, with_entropy=True, vocab_block=block, **options)
        actual = results_of(chunked, hidden, head, weights)
        for a, b in zip(actual, results_of(partial(dense, **options), hidden, head, weights), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)
        np.testing.assert_array_equal(actual[3][V:], 0.0)


@pytest.mark.parametrize("block", [None, 10])
@pytest.mark.parametrize("count", [0, 1, 8, 9, 23])
def test_counted_tokens_are_the_dense_ones_and_the_rest_is_nothing(count, block):
    """Values and gradients of a loss of the first ``count`` tokens, in chunks of 8: the others are not looked at."""
    with jax.enable_x64(True):
        hidden, head, targets, weights, support = inputs(jnp.float64)
        spoilt = hidden.at[count:].set(jnp.nan) if count % 8 == 0 else hidden  # a chunk is computed whole

        def loss(hidden, head, count):
            options = {"chunk_size": 8, "vocab_size": V, "vocab_block": block}
            stats = chunked_logprobs(hidden, head, targets, support=support, with_entropy=True, count=count, **options)
            return jnp.sum(weights[0] * stats.logprobs + weights[1] * stats.entropy), stats

        def expected(hidden, head):
            logprobs, nats = dense(hidden, head, targets, support=support)
            return jnp.sum((weights[0] * logprobs + weights[1] * nats)[:count])

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, stats), gradients = program(spoilt, head, jnp.int32(count))
        np.testing.assert_allclose(value, expected(hidden, head), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients, jax.grad(expected, argnums=(0, 1))(hidden, head), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)
        assert not np.asarray(stats.logprobs)[count:].any() and not np.asarray(stats.entropy)[count:].any()


def test_a_block_of_padding_alone_has_no_part():
    with jax.enable_x64(True):
        hidden, head, targets, weights, _ = inputs(jnp.float64)
        options = {"targets": targets % 25, "vocab_size": 25}
        blocks = partial(chunked_logprobs, chunk_size=5, with_entropy=True, vocab_block=10, **options)
        expected = results_of(partial(dense, **options), hidden, head, weights)
        for a, b in zip(results_of(blocks, hidden, head, weights), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_blocks_divide_the_vocabulary_or_are_not_made():
    """Read off the program: 40 entries in blocks of at most 10, 12 and 8; a prime has no blocks."""
    hidden, head, targets, _, _ = inputs(jnp.float32)

    def logits(head, block):
        function = partial(chunked_logprobs, chunk_size=23, vocab_block=block)
        return re.findall(
            r"dot_general.*-> tensor<23x(\d+)xf32>", jax.jit(function).lower(hidden, head, targets).as_text()
        )

    assert [logits(head, block) for block in (None, 10, 12, 8)] == [["40"], ["10"], ["10"], ["8"]]
    assert logits(head[:37], 10) == ["37"]


@pytest.mark.parametrize("block", [None, 10])
def test_entropy_that_is_only_looked_at_has_no_derivative(block):
    """The log-probs' gradient is the same bits, and takes no more exponentials, with the entropy beside it."""
    hidden, head, targets, _, _ = inputs(jnp.float32)

    def loss(with_entropy, hidden, head):
        options = {"chunk_size": 8, "vocab_block": block, "with_entropy": with_entropy}
        stats = chunked_logprobs(hidden, head, targets, **options)
        return stats.logprobs.sum(), stats.entropy

    def backward_exponentials(loss):
        forward, both = (
            str(jax.make_jaxpr(f)(hidden, head)).count(" exp ") for f in (loss, jax.grad(loss, (0, 1), has_aux=True))
        )
        assert forward > 0
        return both - forward

    losses = [partial(loss, with_entropy) for with_entropy in (False, True)]
    (alone, _), (beside, nats) = (jax.jit(jax.grad(f, (0, 1), has_aux=True))(hidden, head) for f in losses)
    assert nats is not None
    for a, b in zip(alone, beside, strict=True):
        np.testing.assert_array_equal(a, b)
    assert backward_exponentials(losses[0]) == backward_exponentials(losses[1]) == 1

    def regularised(hidden, head):
        value, nats = losses[1](hidden, head)
        return value + nats.sum(), nats

    assert backward_exponentials(regularised) == 1  # and shares it where there is a derivative


def test_blocks_in_bfloat16_round_as_the_conversion_does():
    """Gradients by whole-number rounding against those of one block, which XLA's conversion rounds; NaN stays NaN."""
    hidden, head, targets, weights, _ = inputs(jnp.float32)
    hidden = hidden.astype(jnp.bfloat16)

    def gradients(hidden, block):
        def loss(hidden, head):
            stats = chunked_logprobs(hidden, head, targets, chunk_size=8, with_entropy=True, vocab_block=block)
            return jnp.sum(weights[0] * stats.logprobs + weights[1] * stats.entropy)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(hidden, head)

    for ours, theirs in zip(gradients(hidden, 10), gradients(hidden, None), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), rtol=2**-6, atol=2**-8)
    assert jnp.isnan(gradients(hidden.at[0, 0].set(jnp.nan), 10)[1]).any()
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
    special = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40], jnp.float32)
    x = jnp.concatenate([x, special])
    np.testing.assert_array_equal(narrowed(x, jnp.bfloat16).view(jnp.uint16), x.astype(jnp.bfloat16).view(jnp.uint16))
    all_ones = jnp.asarray([0x7FFFFFFF, 0xFFFFFFFF], jnp.uint32).view(jnp.float32)
    assert jnp.isnan(narrowed(all_ones, jnp.bfloat16)).all()


def test_chunked_equals_dense_in_float32():
    hidden, head, targets, weights, _ = inputs(jnp.float32)
    chunked = partial(chunked_logprobs, targets=targets, chunk_size=6, vocab_size=V, with_entropy=True)
    expected = results_of(partial(dense, targets=targets), hidden, head, weights)
    for a, b in zip(results_of(chunked, hidden, head, weights), expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert chunked_logprobs(hidden, head, targets, chunk_size=64).entropy is None


def test_dtypes_of_results_and_gradients():
    hidden, head, targets, _, _ = inputs(jnp.float32)
    hidden = hidden.astype(jnp.bfloat16)
    function = partial(chunked_logprobs, targets=targets, chunk_size=6)
    assert function(hidden, head).logprobs.dtype == jnp.float32
    gradients = jax.jit(jax.grad(lambda *a: function(*a).logprobs.sum(), argnums=(0, 1)))
    d_hidden, d_head = gradients(hidden, head)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    # Rounding the operands to bfloat16 (8 bits) is all that separates it from float32 on the rounded operands.
    rounded = [x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head)]
    for a, b in zip((d_hidden, d_head), gradients(*rounded), strict=True):
        assert jnp.linalg.norm(a - b) < 2**-8 * jnp.linalg.norm(b)


def pick_and_entropy(logits, targets):
    return token_logprobs(logits, targets), entropy(logits)


def test_reducer_equals_dense_with_gradients():
    with jax.enable_x64(True):
        hidden, head, targets, weights, _ = inputs(jnp.float64)

        def reduced(hidden, head):
            return reduce_logits_in_chunks(hidden, head, pick_and_entropy, (targets,), chunk_size=5, vocab_size=V)

        expected = results_of(partial(dense, targets=targets), hidden, head, weights)
        for a, b in zip(results_of(reduced, hidden, head, weights), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_second_head_inside_a_reducer():
    with jax.enable_x64(True):
        hidden, head, _, _, _ = inputs(jnp.float64)
        other_hidden, other_head, _, _, _ = inputs(jnp.float64, seed=1)

        def cross_entropy(logits, other_logits):
            return -jnp.sum(jax.nn.softmax(other_logits) * jax.nn.log_softmax(logits), axis=-1)

        def reduced(other_head):
            def reducer(logits, other):
                return cross_entropy(logits, head_logits(other, other_head))

            return reduce_logits_in_chunks(hidden, head, reducer, (other_hidden,), chunk_size=7).sum()

        def direct(other_head):
            return cross_entropy(hidden @ head.T, other_hidden @ other_head.T).sum()

        for a, b in zip(*(jax.jit(jax.value_and_grad(f))(other_head) for f in (reduced, direct)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("count", [0, 8, 11, 23])
def test_a_reducer_of_counted_tokens_looks_at_no_others(count):
    """Values and gradients of both heads and both hidden states, in chunks of 8; whole numbers come back too."""
    with jax.enable_x64(True):
        hidden, head, targets, weights, _ = inputs(jnp.float64)
        other_hidden, other_head, _, _, _ = inputs(jnp.float64, seed=1)
        there = jnp.arange(N) < count

        def cross_entropy(logits, other, other_head, targets):
            other_logits = head_logits(other, other_head, vocab_size=V)[..., :V]
            nats = -jnp.sum(jax.nn.softmax(other_logits) * jax.nn.log_softmax(logits[..., :V]), axis=-1)
            return nats, token_logprobs(logits, targets), jnp.argmax(logits, axis=-1)

        def counted(arrays, count):
            hidden, head, other_hidden, other_head = arrays

            def reducer(logits, other, targets):
                return cross_entropy(logits, other, other_head, targets)

            rows = (other_hidden, targets)
            nats, logprobs, best = reduce_logits_in_chunks(
                hidden, head, reducer, rows, chunk_size=8, vocab_size=V, count=count
            )
            return jnp.sum(weights * jnp.stack([nats, logprobs])), (nats, logprobs, best)

        def direct(arrays):
            hidden, head, other_hidden, other_head = arrays
            logits = head_logits(hidden, head, vocab_size=V)
            found = [jnp.where(there, x, 0) for x in cross_entropy(logits, other_hidden, other_head, targets)]
            return jnp.sum(weights * jnp.stack(found[:2])), tuple(found)

        arrays = (hidden, head, other_hidden, other_head)
        expected, gradients = jax.value_and_grad(direct, has_aux=True)(arrays)
        if count % 8 == 0:  # a chunk is computed whole
            arrays = (hidden.at[count:].set(jnp.nan), head, other_hidden.at[count:].set(jnp.nan), other_head)
        mine = jax.jit(jax.value_and_grad(counted, has_aux=True))(arrays, jnp.int32(count))
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves((expected, gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def losses_of_both_doors(targets):
    def by_hand(hidden, head):
        stats = chunked_logprobs(hidden, head, targets, chunk_size=101, temperature=0.9, with_entropy=True)
        return stats.logprobs.sum() + stats.entropy.sum()

    def by_reducer(hidden, head):
        return sum(x.sum() for x in reduce_logits_in_chunks(hidden, head, pick_and_entropy, (targets,), chunk_size=101))

    return by_hand, by_reducer


def test_no_product_of_mixed_dtypes():
    hidden, head, targets, _, _ = inputs(jnp.float32)
    for function in losses_of_both_doors(targets):
        text = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(hidden.astype(jnp.bfloat16), head).as_text()
        products = re.findall(r"stablehlo\.dot_general.*: \(tensor<(.*?)>, tensor<(.*?)>\) -> tensor<(.*?)>", text)
        assert len(products) >= 4  # logits twice, d_hidden, d_head
        for dtypes in ([x.split("x")[-1] for x in product] for product in products):
            assert dtypes == ["bf16", "bf16", "f32"]


def test_no_buffer_of_all_logits():
    n, v = 101 * 7, 4099  # 101 rows a chunk; v is the largest prime of the sizes
    hidden, head, targets, _, _ = inputs(jnp.float32, n=n, v=v)
    for function in losses_of_both_doors(targets):
        text = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(hidden, head).compile().as_text()
        shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
        assert (101, v) in shapes  # the check sees the chunks
        assert not [s for s in shapes if v in s and np.prod(s) >= n * v]


@pytest.mark.parametrize("door", [0, 1])
def test_mesh_agrees_with_one_device(door):
    with jax.enable_x64(True):
        hidden, head, targets, _, _ = inputs(jnp.float64, n=64)
        mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731

        def loss(targets, hidden, head):
            options = {"chunk_size": 16, "vocab_size": V}
            if door == 0:
                logprobs, nats = chunked_logprobs(hidden, head, targets, with_entropy=True, **options)
            else:
                logprobs, nats = reduce_logits_in_chunks(hidden, head, pick_and_entropy, (targets,), **options)
            return jnp.sum(logprobs) - 0.3 * jnp.sum(nats)

        step = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)))
        alone = step(targets, hidden, head)
        arguments = (place(targets, "data"), place(hidden, "data"), place(head, "tensor"))
        for a, b in zip(*map(jax.tree.leaves, (alone, step(*arguments))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        # Neither all rows nor all of the vocabulary are gathered on one device.
        text = step.lower(*arguments).compile().as_text()
        gathered = re.findall(r"\w\[([\d,]+)\]\S* all-gather", text)
        assert not [s for s in gathered if np.prod([int(x) for x in s.split(",")]) >= 16 * PADDED]


def test_inside_shard_map_the_head_gradient_is_reduced_once():
    hidden, head, targets, _, _ = inputs(jnp.float32, n=64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")

    def loss(hidden, head):
        def local(hidden, targets, head):
            return chunked_logprobs(hidden, head, targets, chunk_size=2, with_entropy=True)

        stats = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)(
            hidden, targets, head
        )
        return jnp.sum(stats.logprobs - stats.entropy)

    def plain(hidden, head):
        stats = chunked_logprobs(hidden, head, targets, chunk_size=64, with_entropy=True)
        return jnp.sum(stats.logprobs - stats.entropy)

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for a, b in zip(step(hidden, head), jax.jit(jax.grad(plain, argnums=(0, 1)))(hidden, head), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(re.findall(r" all-reduce(?:-start)?\(", step.lower(hidden, head).compile().as_text())) == 1


def test_wrong_arguments_are_named():
    hidden, head, targets, _, _ = inputs(jnp.float32)
    for arguments, message in [
        ({"hidden": hidden[:, 1:]}, r"they must be \[N, D\] and \[V, D\]"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"vocab_size": PADDED + 1}, "vocab_size 41"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"vocab_block": 0}, "vocab_block is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunked_logprobs(**({"hidden": hidden, "head": head, "targets": targets, "chunk_size": 4} | arguments))
