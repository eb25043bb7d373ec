# SPDX-License-Identifier: Apache-2.0
"""Attention on meshes: which device computes which batch entries and heads. Nothing else knows.

A mesh axis is Auto (XLA places the arrays), Explicit (the type of an array says where it is) or
Manual (the code is per device already). Each wants its own mechanism: `custom_partitioning`,
`jax.shard_map`, nothing. Attention is independent over batch and key/value heads, so sharding those
needs no communication; sequences and head dims are never split here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# ---- Manual axes ---------------------------------------------------------------------------------


def vary(*operands: Array | None) -> list:
    """Makes all operands vary over the same manual axes.

    The backward pass mixes them all, so every gradient varies like their union. `pcast` says so to
    `jax.shard_map`; its transpose is the sum over devices that a shared key or value needs.
    """
    varying = [
        frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in operands
    ]
    union = frozenset().union(*varying)
    return [
        x if x is None or own == union else jax.lax.pcast(x, tuple(union - own), to="varying")
        for x, own in zip(operands, varying, strict=True)
    ]


# ---- Explicit axes -------------------------------------------------------------------------------


def per_shard(
    fn: Callable[..., tuple[Array, Array]], q: Array, k: Array, v: Array, *extras: Array | None
) -> tuple[Array, Array]:
    """`fn(q, k, v, *extras) -> (out, lse)`, each device on its own batch entries and heads.

    `extras`: bias and mask, broadcastable to [batch, heads, seq_q, seq_k], then lengths [batch].
    """
    mesh = _mesh(q, k, v)
    if not has_explicit_axes(q, k, v):
        return fn(*vary(q, k, v, *extras))

    batch_axes, head_axes = _common_axes(query=q, key=k, value=v)
    batch, _, heads, _ = q.shape
    heads_k = k.shape[2]
    shards = _size(mesh, head_axes)
    keys_split = heads_k % shards == 0
    if not keys_split and not _within_groups(heads, heads_k, shards):
        raise ValueError(
            f"query: {heads} heads over {heads_k} key/value heads cannot be sharded {shards} ways "
            f"(mesh axis {head_axes!r}): a device would hold parts of several groups of "
            f"{heads // heads_k} query heads; shard the heads {heads_k} ways or fewer"
        )

    def body(q, k, v, *extras):
        if not keys_split:
            q, k, v = vary(q, k, v)
            own = _own_head(head_axes, heads_k, shards)
            k, v = (jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2) for x in (k, v))
        return fn(*vary(q, k, v, *extras))

    def extra_spec(x):
        if x is None or x.ndim == 1:
            return PartitionSpec(batch_axes)
        return PartitionSpec(
            batch_axes if x.shape[0] == batch else None, head_axes if x.shape[1] == heads else None
        )

    rows = PartitionSpec(batch_axes, None, head_axes)
    keys = PartitionSpec(batch_axes, None, head_axes if keys_split else None)
    specs = (rows, keys, keys, *map(extra_spec, extras))
    operands = [
        x if x is None else jax.reshard(x, NamedSharding(mesh, spec))
        for x, spec in zip((q, k, v, *extras), specs, strict=True)
    ]
    out_specs = (rows, PartitionSpec(batch_axes, head_axes))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs)(*operands)


def per_batch(fn: Callable, *operands: Array):
    """`fn(*operands)`, each device on its own batch entries.

    For an Explicit axis that `vmap` maps over: `per_shard` cannot see it, here it shards the batch.
    """
    mesh = _mesh(*operands)
    if not has_explicit_axes(*operands):
        return fn(*operands)
    entries = (_entries(jax.typeof(x).sharding.spec, x.ndim)[0] for x in operands)
    spec = PartitionSpec(next((axes for axes in entries if axes is not None), None))
    batches = [jax.reshard(x, NamedSharding(mesh, spec)) for x in operands]
    return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)(*batches)


def _common_axes(**operands: Array) -> tuple:
    """The mesh axes that shard the batch, and those that shard the heads."""
    common = {0: None, 2: None}
    for name, x in operands.items():
        axes = _entries(jax.typeof(x).sharding.spec, x.ndim)
        for dim, what in ((1, "sequence"), (3, "head_dim")):
            if axes[dim] is not None:
                raise ValueError(
                    f"{name}: its {what} (axis {dim}) is sharded over mesh axis {axes[dim]!r}, but "
                    f"each device needs all of it; gather it first with jax.reshard"
                )
        for dim, what in ((0, "batch"), (2, "heads")):
            if None not in (axes[dim], common[dim]) and axes[dim] != common[dim]:
                raise ValueError(
                    f"{name}: its {what} (axis {dim}) is sharded over mesh axis {axes[dim]!r}, but "
                    f"another operand's over {common[dim]!r}; make them equal with jax.reshard"
                )
            common[dim] = common[dim] or axes[dim]
    return common[0], common[2]


# ---- Auto axes -----------------------------------------------------------------------------------


def partitioned(fn: Callable, operands: str, results: str) -> Callable:
    """`fn(spec, *operands) -> results`, which XLA may shard over batch and heads.

    Each letter of `operands` and `results` is an array: `q` [batch, seq_q, heads, head_dim],
    `k` [batch, seq_k, heads_k, head_dim] or `l` [batch, heads, seq_q]; operands begin with q, k.
    JAX can neither batch nor differentiate what this returns.
    """

    def partition(spec, mesh, operand_types, result_types):
        q, k = operand_types[:2]
        if not isinstance(q.sharding, NamedSharding):
            return mesh, functools.partial(fn, spec), *_unnamed(operand_types, result_types)
        # All shardings follow q's, sequences and head dims whole. XLA reshards to what is returned
        # here and to nothing else: with the rule alone, a sharded sequence gave wrong results.
        batch_axes, _, head_axes, _ = _entries(q.sharding.spec, 4)
        if q.shape[0] % _size(mesh, batch_axes):
            batch_axes = None
        heads, heads_k = q.shape[2], k.shape[2]
        shards = _size(mesh, head_axes)
        keys_split = heads_k % shards == 0
        if not keys_split and not _within_groups(heads, heads_k, shards):
            head_axes, keys_split = None, True
        layouts = {
            "q": PartitionSpec(batch_axes, None, head_axes, None),
            "k": PartitionSpec(batch_axes, None, head_axes if keys_split else None, None),
            "l": PartitionSpec(batch_axes, head_axes, None),
        }

        def local(*arrays):
            if keys_split:
                return fn(spec, *arrays)
            own = _own_head(head_axes, heads_k, shards)

            def take(x):
                return jax.lax.dynamic_slice_in_dim(x, own, 1, axis=2)

            def put(dx):  # devices that share a key/value head add up its gradients
                zeros = jnp.zeros((*dx.shape[:2], heads_k, dx.shape[3]), dx.dtype)
                dx = jax.lax.dynamic_update_slice_in_dim(zeros, dx, own, axis=2)
                return jax.lax.psum(dx, head_axes)

            return on_keys(put, results, fn(spec, *on_keys(take, operands, arrays)))

        def shardings(roles):
            return tuple(NamedSharding(mesh, layouts[role]) for role in roles)

        return mesh, local, shardings(results), shardings(operands)

    def on_keys(change, roles, arrays):
        return [change(x) if r == "k" else x for r, x in zip(roles, arrays, strict=True)]

    # Query heads (n) and key heads (m) are separate factors. Were m a factor of n, XLA could split
    # m by a part of a mesh axis, and `partition` has no name for a part.
    factors = {"q": "b t n h", "k": "b s m h", "l": "b n t"}
    # `custom_partitioning` refuses a function with array constants; `jit` keeps them to itself.
    sharded = custom_partitioning(jax.jit(fn, static_argnums=0), static_argnums=(0,))
    sharded.def_partition(
        partition,
        sharding_rule=" -> ".join(
            ", ".join(factors[role] for role in side) for side in (operands, results)
        ),
        need_replication_factors=("t", "h", "s"),
    )

    def call(spec, *arrays):
        mesh = _mesh(*arrays)
        has_auto = mesh.empty or AxisType.Auto in mesh.axis_types
        return (sharded if has_auto else fn)(spec, *arrays)

    return call


def _unnamed(operand_types, result_types):
    """The shardings of results and operands where mesh axes have no names.

    So it is inside a `jax.shard_map` that leaves some axes Auto. Batch and heads stay sharded if
    all arrays agree on how; otherwise each device computes everything.
    """
    q, k = operand_types[:2]
    batch, _, heads, _ = q.sharding.shard_shape(q.shape)
    local_shapes = {
        q.shape: (batch, q.shape[1], heads, q.shape[3]),
        k.shape: (batch, k.shape[1], heads * k.shape[2] // q.shape[2], k.shape[3]),
        (q.shape[0], q.shape[2], q.shape[1]): (batch, heads, q.shape[1]),
    }
    agree = all(
        x.sharding.shard_shape(x.shape) == local_shapes[x.shape]
        and (len(x.shape) == 3 or x.sharding.is_equivalent_to(q.sharding, 4))
        for x in (*operand_types, *result_types)
    )
    devices = sorted(q.sharding.device_set, key=lambda device: device.id)
    replicated = NamedSharding(Mesh(devices, "all"), PartitionSpec())
    return tuple(
        tuple(x.sharding if agree else replicated for x in types)
        for types in (result_types, operand_types)
    )


# ---- More shards than key/value heads ------------------------------------------------------------


def _within_groups(heads, heads_k, shards) -> bool:
    """Whether the query heads of each shard share one key/value head."""
    return heads % shards == 0 and (heads // heads_k) % (heads // shards) == 0


def _own_head(head_axes, heads_k, shards) -> Array:
    """The key/value head that the query heads of this device share."""
    return jax.lax.axis_index(head_axes) * heads_k // shards


# ---- Shardings -----------------------------------------------------------------------------------


def is_local(x: Array) -> bool:
    """Whether no mesh axis can shard `x`: what there is of it is on this device."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh.empty or set(mesh.axis_types) == {AxisType.Manual}


def has_explicit_axes(*operands: Array) -> bool:
    return AxisType.Explicit in _mesh(*operands).axis_types


def _mesh(*operands: Array):
    """The mesh in the types of the operands. The ambient one may be empty, though they have one."""
    meshes = [jax.typeof(x).sharding.mesh for x in operands]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _entries(spec: PartitionSpec, ndim: int) -> tuple:
    return tuple(spec) + (None,) * (ndim - len(spec))


def _size(mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of shards that the entry `axes` of a `PartitionSpec` makes."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
