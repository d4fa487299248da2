"""Every public function refuses arrays whose shapes part ways, by name, where its signature says that they must not."""

import inspect
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import AbstractArray, Array, Float

import rljax.losses
from rljax.losses import (
    FeatureCovariance,
    add_comparisons,
    binary_cross_entropy,
    dpo,
    grpo_loss,
    mix_reference,
    pessimistic_rewards,
    reduce_logits_in_chunks,
    token_logprobs,
    whiten,
    zero_masked,
)
from rljax.losses.shapes import check_shapes

pytestmark = pytest.mark.fast

SIZES = {"b": 3, "t": 5, "s": 7, "v": 11, "k": 4, "n": 6, "d": 8, "a": 9, "h": 10}
FUNCTIONS = {name: f for name in rljax.losses.__all__ if inspect.isfunction(f := vars(rljax.losses)[name])}


def dims_of(annotation) -> list[str] | None:
    """The dimension names of an annotation that says one shape; ``*s`` stands for two axes, s0 and s1."""
    members = typing.get_args(annotation) or [annotation]
    found = {x.dim_str for x in members if isinstance(x, type) and issubclass(x, AbstractArray)}
    if len(found) != 1:
        return None
    names = [(dim.strip("*#"), "*" in dim or dim == "...") for dim in found.pop().split()]
    return [axis for name, variadic in names for axis in ([f"{name}0", f"{name}1"] if variadic else [name])]


def shaped(function) -> dict[str, list[str]]:
    """The dimensions of each array argument, of each field of a tuple of arrays, and of two of ``*arrays``."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if (fields := getattr(parameter.annotation, "_fields", None)) is not None:
            of_field = parameter.annotation.__annotations__
            found |= {f"{name}.{field}": dims for field in fields if (dims := dims_of(of_field[field])) is not None}
        elif (dims := dims_of(parameter.annotation)) is not None:
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            found |= {f"{name}[{place}]": dims for place in range(2)} if several else {name: dims}
    return found


def call(function, shapes: dict[str, tuple[int, ...]]):
    """Calls with ones of these shapes; other arguments without a default get 1, which a refusal comes before."""
    positional, named = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            positional += [jnp.ones(shape) for key, shape in shapes.items() if key.startswith(f"{name}[")]
            continue
        fields = {key.split(".")[1]: jnp.ones(x) for key, x in shapes.items() if key.startswith(f"{name}.")}
        if fields:
            value = parameter.annotation(**fields)
        elif name in shapes:
            value = jnp.ones(shapes[name])
        elif parameter.default is inspect.Parameter.empty:
            value = 1
        else:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            positional.append(value)
    return function(*positional, **named)


def size(axis: str) -> int:
    return SIZES[axis] if axis in SIZES else SIZES.get(axis[:-1], 2) + int(axis[-1])


CUTS = [
    (name, argument, place)
    for name, function in FUNCTIONS.items()
    for argument, dims in shaped(function).items()
    for place, axis in enumerate(dims)
    if any(axis in others for other, others in shaped(function).items() if other != argument)
]
RANKS = [
    (name, argument)
    for name, function in FUNCTIONS.items()
    for argument, dims in shaped(function).items()
    if dims and not any(axis[-1] in "01" for axis in dims)
]


def test_the_cases_are_generated_from_the_signatures():
    assert {("grpo_loss", "loss_mask", 1), ("pessimistic_rewards", "covariance.total", 0)} <= set(CUTS)
    assert {name for name, *_ in CUTS} | {name for name, _ in RANKS} >= FUNCTIONS.keys() - {
        *("constant_length", "empty_covariance", "empty_moments", "empty_percentile_scale", "group_ids", "value_bins"),
        *("adaptive_kl_coef", "fixed_kl_coef", "merge_moments", "running_std", "mix_reference"),  # numbers, or trees
        *("dft", "entropy", "log_collision", "log_normalizer", "mean_logprob", "symexp", "symlog", "z_loss", "unimix"),
        *("append_rest", "entropy_bonus", "icepop", "masked_importance", "scale_by_percentile", "truncated_importance"),
        "unimix_logprobs",  # one array of any shape
    }


@pytest.mark.parametrize(("name", "argument", "place"), CUTS)
def test_an_argument_cut_short_is_refused_by_name(name, argument, place):
    shapes = {key: tuple(size(axis) for axis in dims) for key, dims in shaped(FUNCTIONS[name]).items()}
    whole = shapes[argument]
    shapes[argument] = tuple(n - (axis == place) for axis, n in enumerate(whole))
    with pytest.raises(ValueError) as refused:
        call(FUNCTIONS[name], shapes)
    message = str(refused.value)
    assert message.startswith(f"{name}: ") and re.search(r"; (both|they|it) must be ", message), message
    assert re.search(rf"(^|: | and ){re.escape(argument)} (is )?{re.escape(str(list(shapes[argument])))}", message)


@pytest.mark.parametrize(("name", "argument"), RANKS)
def test_an_argument_with_an_axis_too_many_is_refused_by_name(name, argument):
    shapes = {key: tuple(size(axis) for axis in dims) for key, dims in shaped(FUNCTIONS[name]).items()}
    shapes[argument] = (2, *shapes[argument])
    with pytest.raises(ValueError) as refused:
        call(FUNCTIONS[name], shapes)
    assert f"{argument} {list(shapes[argument])}" in str(refused.value).replace(" is ", " ")
    assert str(refused.value).startswith(f"{name}: ")


def test_messages_by_hand():
    ones = jnp.ones
    for attempt, message in [
        (
            lambda: grpo_loss(ones((4, 7)), ones((4, 7)), ones((4, 7)), ones((4, 6), bool)),
            "grpo_loss: logprobs is [4, 7] and loss_mask [4, 6]; both must be [B, T]",
        ),
        (
            lambda: grpo_loss(ones((4, 7)), ones((4, 7)), ones(4), ones((4, 7), bool)),
            "grpo_loss: logprobs is [4, 7] and advantages [4]; both must be [B, T] "
            "(broadcast_to_tokens spreads one number a row)",
        ),
        (
            lambda: token_logprobs(ones((4, 7, 11)), ones((4, 6), int)),
            "token_logprobs: logits is [4, 7, 11] and tokens [4, 6]; they must be [..., V] and [...]",
        ),
        (
            lambda: whiten(ones((4, 7)), ones((7, 4), bool)),
            "whiten: x is [4, 7] and mask [7, 4]; both must be of one shape",
        ),
        (
            lambda: pessimistic_rewards(ones(4), ones((4, 3)), FeatureCovariance(ones((2, 2)), 1), bound=1, ridge=1),
            "pessimistic_rewards: features is [4, 3] and covariance.total [2, 2]; they must be [N, D] and [D, D]",
        ),
        (
            lambda: add_comparisons(FeatureCovariance(ones((3, 2)), 1), ones((4, 3)), ones(4, bool)),
            "add_comparisons: covariance.total is [3, 2]; it must be [D, D]",
        ),
        (
            lambda: binary_cross_entropy(ones((2, 3)), ones((2, 3), bool), ones(3, bool)),
            "binary_cross_entropy: logits is [2, 3] and mask [3]; both must be of one shape "
            "(broadcast_to_tokens spreads one number a row)",
        ),
        (
            lambda: mix_reference({"w": ones((2, 3))}, {"w": ones((1, 3))}, alpha=0.5),
            "mix_reference: reference['w'] is [2, 3] and policy['w'] [1, 3]; both must be of one shape",
        ),
        (
            lambda: reduce_logits_in_chunks(ones((4, 3)), ones((7, 3)), lambda x, y: x, (ones(5),), chunk_size=2),
            "reduce_logits_in_chunks: hidden is [4, 3] and rows[0] [5]; they must be [N, D] and [N, ...]",
        ),
    ]:
        with pytest.raises(ValueError) as refused:
            attempt()
        assert str(refused.value) == message


def test_it_is_refused_while_tracing_and_costs_a_compiled_call_nothing():
    arrays = [jnp.zeros((4, 7))] * 3
    with pytest.raises(ValueError, match=r"loss_mask \[4, 6\]"):
        jax.jit(grpo_loss).trace(*arrays, jax.ShapeDtypeStruct((4, 6), bool))
    arrays.append(jnp.ones((4, 7), bool))
    unchecked = inspect.unwrap(grpo_loss)
    assert unchecked is not grpo_loss
    assert str(jax.make_jaxpr(grpo_loss)(*arrays)) == str(jax.make_jaxpr(unchecked)(*arrays))


def test_numbers_mapped_axes_and_shards_pass():
    four = [jnp.arange(4.0) * scale for scale in (-1, -2, -3, -5)]
    expected = dpo(*four, beta=0.1)
    np.testing.assert_array_equal(jax.vmap(lambda *x: dpo(*x, beta=0.1))(*four), expected)
    np.testing.assert_array_equal(
        dpo(four[0], -2.0, -3.0, np.float32(-5), beta=0.1)[1:2], dpo(-1.0, -2, -3, -5, beta=0.1)
    )
    mesh, spec = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    sharded = jax.shard_map(lambda *x: dpo(*x, beta=0.1), mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(sharded(*four), expected, rtol=1e-6)
    wide = zero_masked(jnp.array([[True], [False]]), jnp.ones((2, 3)))  # one verdict for a whole row of logits
    np.testing.assert_array_equal(wide, [[1, 1, 1], [0, 0, 0]])


def test_signature_and_docstring_stay_and_a_missing_argument_is_pythons():
    @check_shapes
    def loss(x: Float[Array, "b t"], *, beta: float) -> Float[Array, ""]:
        """The sum."""
        return beta * jnp.sum(x)

    assert (loss.__name__, loss.__doc__) == ("loss", "The sum.")
    assert [*inspect.signature(loss).parameters] == ["x", "beta"]
    with pytest.raises(TypeError, match=r"loss\(\) missing 1 required keyword-only argument: 'beta'"):
        loss(jnp.ones((2, 3)))
