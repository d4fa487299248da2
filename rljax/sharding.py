"""Meshes: axes, the rules from logical to mesh axes, and host <-> global arrays. Nothing else knows the mesh."""

import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first: replica crosses slices and the data-centre network, tensor the fastest links.
MESH_AXES = ("replica", "fsdp", "tensor")
BATCH_AXES = ("replica", "fsdp")

# A vocabulary-sharded head needs equal shards, and the sampler's blocks of 128 must not straddle them.
VOCAB_BLOCK = 128

MeshAxes = str | tuple[str, ...] | None
Rules = tuple[tuple[str, MeshAxes], ...]

_SHARED_RULES: Rules = (
    ("batch", BATCH_AXES),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("ffn", "tensor"),
)
TRAIN_RULES: Rules = (*_SHARED_RULES, ("embed", "fsdp"))
# While decoding every data shard holds whole weights but for the tensor axis: no collective crosses data shards.
DECODE_RULES: Rules = _SHARED_RULES


HOST_MEMORY = "pinned_host"


class MeshError(ValueError):
    """A mesh string that the devices or the model do not allow."""


@dataclass(frozen=True)
class Layout:
    """A mesh with the rules that place logical axes on it: a static argument of every compiled program."""

    mesh: Mesh
    rules: Rules

    @property
    def tensor(self) -> int:
        return self.mesh.shape["tensor"]

    @property
    def on_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def on_nvidia(self) -> bool:
        return "NVIDIA" in self.mesh.devices.flat[0].device_kind

    @property
    def on_tpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "tpu"

    @property
    def data_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def spec(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """The spec of an array with these logical axes. With ``shape``, what does not divide is replicated."""
        table = dict(self.rules)
        entries = [table.get(axis) if axis else None for axis in axes]
        if shape is not None:
            entries = [e if size % self._degree(e) == 0 else None for e, size in zip(entries, shape, strict=True)]
        return PartitionSpec(*entries)

    def sharding(self, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Rows over the data axes, everything else whole."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Pin an activation's layout; axes that are manual in the current region (``shard_map``) are dropped."""
        context = jax.sharding.get_abstract_mesh()
        manual = frozenset(context.manual_axes)
        spec = self.spec(axes, x.shape if not manual else None)
        if manual:
            spec = PartitionSpec(*(_without(entry, manual) for entry in spec))
        return jax.lax.with_sharding_constraint(x, NamedSharding(context if manual else self.mesh, spec))

    def in_memory(self, x: jax.Array, axes: Sequence[str | None], order: Sequence[int]) -> jax.Array:
        """On TPUs ``x`` lies in memory with its axes in ``order``, the last one fastest; elsewhere XLA chooses.

        For use where data axes are manual. The tensor axis is made so here: XLA gathers what it is to lay out.
        """
        if not self.on_tpu:
            return x
        lay = partial(with_layout_constraint, layouts=MemoryLayout(major_to_minor=tuple(order)))
        spec, mesh = self.spec(axes, x.shape), jax.sharding.get_abstract_mesh()
        shard = jax.shard_map(lay, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)
        return shard(x)

    def _degree(self, entry: MeshAxes) -> int:
        names = (entry,) if isinstance(entry, str) else entry or ()
        return math.prod(self.mesh.shape[name] for name in names)


def in_host_memory(shardings: Any) -> Any:
    """The same places in the memory of the hosts."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind(HOST_MEMORY), shardings)


def fetched(tree: Any) -> Any:
    """Inside a compiled program: what lies in the hosts' memory, on the devices."""
    return jax.device_put(tree, jax.memory.Space.Device)


def _without(entry: MeshAxes, manual: frozenset[str]) -> MeshAxes:
    names = (entry,) if isinstance(entry, str) else entry or ()
    return tuple(name for name in names if name not in manual) or None


def parse_mesh(text: str, device_count: int) -> tuple[int, ...]:
    """``"1,-1,4"`` or ``"fsdp:-1,tensor:4"`` to sizes of (replica, fsdp, tensor); one -1 takes what is left.

    Raises MeshError where the string is malformed or does not multiply to the number of devices.
    """
    sizes = _written_sizes(text)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise MeshError(f"mesh {text!r}: sizes are positive, and at most one of them is -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if device_count % known or (-1 not in sizes and known != device_count):
        raise MeshError(
            f"mesh {text!r} takes {'a multiple of ' * (-1 in sizes)}{known} devices and there are {device_count}; "
            "where there is no accelerator, config.cpu_devices simulates as many as are asked for"
        )
    return tuple(device_count // known if size == -1 else size for size in sizes)


def _written_sizes(text: str) -> list[int]:
    fields = [re.fullmatch(r"(?:(\w+):)?(-?\d+)", field.strip()) for field in text.split(",")]
    names = [field[1] for field in fields if field]
    sizes = [int(field[2]) for field in fields if field]
    if len(sizes) == len(fields) == len(MESH_AXES) and set(names) == {None}:
        return sizes
    if len(sizes) < len(fields) or None in names:
        raise MeshError(f"mesh {text!r} is not like '1,-1,4' ({','.join(MESH_AXES)}) or 'fsdp:-1,tensor:4'")
    wrong = [name for i, name in enumerate(names) if name not in MESH_AXES or name in names[:i]]
    if wrong:
        raise MeshError(f"mesh {text!r}: {wrong[0]!r} is not one of {', '.join(MESH_AXES)}, each named once")
    return [dict(zip(names, sizes, strict=True)).get(axis, 1) for axis in MESH_AXES]


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of Auto axes over all devices; with several TPU slices the replica axis crosses the network."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(text, len(devices))
    slices = len({device.slice_index for device in devices}) if devices[0].platform == "tpu" else 1
    if slices > 1:
        if sizes[0] % slices:
            raise MeshError(f"mesh {text!r}: its replica size {sizes[0]} must be a multiple of the {slices} slices")
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:])), devices=devices
        )
    elif devices[0].platform == "tpu":
        grid = mesh_utils.create_device_mesh(sizes, devices=devices)
    else:
        grid = np.asarray(devices).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def refactor_mesh(mesh: Mesh, text: str) -> Mesh:
    """Another factorisation of the same devices in the same order, as a rollout mesh must be.

    Raises MeshError also where neither factorisation refines the other: XLA would end the process (jaxlib 0.10: "Manual
    sub-axis isn't supported").
    """
    sizes = parse_mesh(text, mesh.size)
    ours, theirs = ({1, *itertools.accumulate(each, operator.mul)} for each in (sizes, mesh.axis_sizes))
    if not (ours <= theirs or theirs <= ours):
        training = ",".join(map(str, mesh.axis_sizes))
        raise MeshError(
            f"decode mesh {text!r} and mesh {training!r} cut the devices at places that do not nest, which XLA cannot "
            "partition; choose one that splits or joins the axes of the other"
        )
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def to_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A global array from a host array that every process holds whole; each process copies only its own shards."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def owned_rows(sharding: NamedSharding, rows: int, process_index: int) -> np.ndarray:
    """The rows whose lowest holder is this process: it alone decodes and rewards them. Bool, shape [rows]."""
    owner = np.full(rows, np.iinfo(np.int32).max)
    holders: Mapping[jax.Device, Any] = sharding.devices_indices_map((rows,))
    for device, index in holders.items():
        owner[index[0]] = np.minimum(owner[index[0]], device.process_index)
    return owner == process_index


def agree(value: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The same value on every process: ``reduce`` over their stacked values. Costs nothing without peers."""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return reduce(value[None])
    from jax.experimental import multihost_utils

    # As bytes: JAX would round float64 to float32.
    stacked = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return reduce(np.asarray(stacked).view(value.dtype).reshape(-1, *value.shape))


def agree_text(text: str) -> list[str]:
    """Every process's text, in their order, on every process."""
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = agree(np.asarray(data.size), lambda stacked: stacked)
    width = 1 << int(sizes.max()).bit_length()  # few widths: each is a program
    stacked = agree(np.pad(data, (0, width - data.size)), lambda stacked: stacked)
    return [row[:size].tobytes().decode() for row, size in zip(stacked, sizes, strict=True)]


def gather(tree: Any) -> Any:
    """NumPy copies of global arrays, whole on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, jax.device_get(tree))
    from jax.experimental import multihost_utils

    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
