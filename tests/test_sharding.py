"""Meshes, rules, and arrays between host and mesh."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rljax.sharding import (
    DECODE_RULES,
    TRAIN_RULES,
    Layout,
    MeshError,
    agree,
    make_mesh,
    owned_rows,
    parse_mesh,
    refactor_mesh,
    to_global,
)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1,-1,4", (1, 2, 4)),
        ("-1,1,1", (8, 1, 1)),
        (" 2, 2, 2 ", (2, 2, 2)),
        ("fsdp:-1,tensor:4", (1, 2, 4)),
        ("tensor:8", (1, 1, 8)),
    ],
)
def test_parse_mesh(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_mesh(text, 8) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not like '1,-1,4'"),
        ("8", "is not like '1,-1,4'"),
        ("1,8", "is not like '1,-1,4'"),
        ("1,x,4", "is not like '1,-1,4'"),
        ("1,fsdp:2,4", "is not like '1,-1,4'"),
        ("fsdp:2,fsdp:4", "'fsdp' is not one of replica, fsdp, tensor, each named once"),
        ("tensr:8", "'tensr' is not one of replica, fsdp, tensor"),
        ("-1,-1,1", "at most one of them is -1"),
        ("0,8,1", "sizes are positive"),
        ("1,-2,4", "sizes are positive"),
        ("2,2,1", "takes 4 devices and there are 8"),
        ("1,-1,3", "takes a multiple of 3 devices and there are 8"),
    ],
)
def test_parse_mesh_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(MeshError, match=message) as raised:
        parse_mesh(text, 8)
    assert repr(text) in str(raised.value)


@dataclass(frozen=True)
class StandIn:
    """What a mesh asks of a TPU chip."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def two_slices() -> list[StandIn]:
    """Two slices of 2 x 2 chips, listed in turns."""
    chips = itertools.product((0, 1), (0, 1), (0, 1))  # y, x, slice
    return [StandIn(4 * n + 2 * y + x, n, n, (x, y, 0)) for y, x, n in chips]


@pytest.mark.parametrize("text", ["2,2,2", "2,-1,1", "2,1,4", "4,2,1", "-1,1,2"])
def test_the_replica_axis_crosses_the_network_and_no_other(text: str) -> None:
    mesh = make_mesh(text, two_slices())  # type: ignore[arg-type]
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert {device.id for device in mesh.devices.flat} == set(range(8))
    for replica in slices:  # fsdp and tensor stay inside a slice
        assert len(set(replica.flat)) == 1
    assert np.array_equal(slices[:, 0, 0], np.repeat([0, 1], mesh.devices.shape[0] // 2))


def test_replicas_are_whole_slices() -> None:
    with pytest.raises(MeshError, match="mesh '1,-1,1': its replica size 1 must be a multiple of the 2 slices"):
        make_mesh("1,-1,1", two_slices())  # type: ignore[arg-type]


def test_refactor_mesh_keeps_the_order_of_the_devices() -> None:
    training = make_mesh("1,8,1")
    decoding = refactor_mesh(training, "4,1,2")
    assert decoding.shape == {"replica": 4, "fsdp": 1, "tensor": 2}
    assert list(decoding.devices.flat) == list(training.devices.flat) == jax.devices()
    with pytest.raises(MeshError, match="takes 16 devices"):
        refactor_mesh(training, "4,2,2")


def test_spec_follows_the_rules_and_replicates_what_does_not_divide() -> None:
    train = Layout(make_mesh("1,2,4"), TRAIN_RULES)
    assert train.spec(("vocab", "embed")) == P("tensor", "fsdp")
    assert train.spec(("batch", None, "heads"), (4, 3, 6)) == P(("replica", "fsdp"), None, None)
    assert train.spec(("batch", None, "heads"), (3, 3, 8)) == P(None, None, "tensor")
    assert Layout(train.mesh, DECODE_RULES).spec(("vocab", "embed")) == P("tensor", None)
    assert (train.tensor, train.data_shards) == (4, 2)


def test_constrain_drops_the_axes_that_are_manual() -> None:
    place = Layout(make_mesh("1,4,2"), TRAIN_RULES)
    x = jnp.arange(8 * 6.0).reshape(8, 6)

    def double(x: jax.Array) -> jax.Array:
        return place.constrain(2 * x, "batch", "heads")

    inside = jax.shard_map(
        double, mesh=place.mesh, in_specs=P(("replica", "fsdp")), out_specs=P(("replica", "fsdp")),
        axis_names={"replica", "fsdp"},
    )  # fmt: skip
    for f in (double, inside):
        np.testing.assert_array_equal(jax.jit(f)(x), 2 * x)
    assert jax.jit(double)(x).sharding.is_equivalent_to(place.sharding(("batch", "heads")), 2)


def test_to_global_places_every_shard() -> None:
    place = Layout(make_mesh("1,2,4"), TRAIN_RULES)
    host = np.arange(48).reshape(4, 12)
    array = to_global(host, place.sharding(("batch", "heads")))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(array, host)


class _Device:
    def __init__(self, process_index: int) -> None:
        self.process_index = process_index


class _Sharding:
    """Two processes of two devices: rows 0-3 on both, tensor across them; rows 4-7 on the second alone."""

    def devices_indices_map(self, shape: tuple[int, ...]) -> dict:
        first, second = (slice(0, 4),), (slice(4, 8),)
        return {_Device(1): first, _Device(0): first, _Device(1): second}


def test_each_row_has_one_owner_the_lowest_holder() -> None:
    owned = [owned_rows(_Sharding(), 8, process) for process in (0, 1)]  # type: ignore[arg-type]
    np.testing.assert_array_equal(owned, [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4])
    assert owned_rows(Layout(make_mesh("1,2,4"), TRAIN_RULES).rows, 6, 0).all()


def test_agree_without_peers_is_the_reduction_of_one_value() -> None:
    np.testing.assert_array_equal(agree(np.array([3, 4]), lambda stacked: stacked.max(axis=0)), [3, 4])
