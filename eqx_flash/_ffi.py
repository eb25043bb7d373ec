# SPDX-License-Identifier: Apache-2.0
"""The seam to the compiled kernels: registration, the XLA calls, their result types and attributes.

The only importer of the compiled module. A tree that was never built, or was built without CUDA,
imports just as well: a call to a kernel can then be traced, lowered and exported, but not run.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._spec import AttentionSpec

FORWARD = "eqx_flash_forward"
BACKWARD = "eqx_flash_backward"
ALL_HEAD_DIMS = (64, 128, 256)

# Of the backward kernels; csrc/params.h and csrc/tile_config.h have the same.
_QUERY_PADDING = 128
_LARGEST_FUSED_HEAD_DIM = 128


def _load() -> ModuleType | None:
    try:
        return importlib.import_module("._C", __package__)
    except ModuleNotFoundError:
        return None


_C = _load()

if _C is not None:
    for _name, _handler in _C.registrations().items():
        jax.ffi.register_ffi_target(_name, _handler, platform="CUDA")


def build_info() -> dict[str, str]:
    """How the compiled module was built; empty if there is none."""
    return {} if _C is None else _C.build_info()


def built_head_dims() -> tuple[int, ...]:
    """Head dims that kernels were compiled for. A smaller one runs in the next larger kernel."""
    return tuple(int(d) for d in build_info().get("head_dims", "").split(",") if d)


def tile_config() -> list[dict[str, Any]]:
    """One entry per compiled kernel."""
    return [] if _C is None else _C.tile_config()


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to know to export a kernel call.

    ```python
    exported = jax.export.export(jitted, disabled_checks=eqx_flash.export_checks())(*args)
    ```
    """
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD, BACKWARD)]


def forward(spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array):
    """Calls the forward kernel: `(out, lse)`."""
    batch, seq_q, heads, _ = q.shape
    out, lse, _ = jax.ffi.ffi_call(
        FORWARD,
        (
            _result(q, q.shape, q.dtype, (0, 1, 2, 3)),
            _result(q, (batch, heads, seq_q), jnp.float32, (0, 2, 1)),
            # The kernel's tile counter: scratch memory has to be a result, for XLA to own it.
            _result(q, (1,), jnp.int32, (None,)),
        ),
    )(
        q,
        k,
        v,
        **_attributes(spec),
    )
    return out, lse


def backward(spec: AttentionSpec, q, k, v, out, lse, dout, *dlse):
    """Calls the backward kernels: `(dq, dk, dv)`. `dlse` may be left out if it is zero."""
    batch, seq_q, heads, head_dim = q.shape
    padded = -(-seq_q // _QUERY_PADDING) * _QUERY_PADDING
    row_stats = _result(q, (batch, heads, padded), jnp.float32, (0, 2, None))
    # The fused kernel sums dQ in fp32, in rows as wide as its tile.
    width = _tile_head_dim(head_dim)
    fused = not spec.deterministic and width <= _LARGEST_FUSED_HEAD_DIM
    accumulator = batch * heads * padded * width if fused else 1
    dq, dk, dv, *_ = jax.ffi.ffi_call(
        BACKWARD,
        (
            _result(q, q.shape, q.dtype, (0, 1, 2, 3)),
            _result(k, k.shape, k.dtype, (0, 1, 2, 3)),
            _result(v, v.shape, v.dtype, (0, 1, 2, 3)),
            row_stats,
            row_stats,
            _result(q, (accumulator,), jnp.float32, (None,)),
            _result(q, (1,), jnp.int32, (None,)),  # the fused kernel's tile counter
        ),
    )(q, k, v, out, lse, dout, *dlse, **_attributes(spec), deterministic=spec.deterministic)
    return dq, dk, dv


def _tile_head_dim(head_dim: int) -> int:
    """The head dim of the tile that serves `head_dim`.

    Without one in this build, that of a full build: a program may be lowered for another machine.
    """
    built = [d for d in built_head_dims() if d >= head_dim]
    return min(built or [d for d in ALL_HEAD_DIMS if d >= head_dim])


def _attributes(spec: AttentionSpec) -> dict[str, Any]:
    return {
        "softmax_scale": np.float32(spec.scale),  # a Python float would arrive as a double
        "causal": spec.causal,
        "bottom_right": spec.causal_alignment == "bottom_right",
    }


def _result(x: jax.Array, shape, dtype, dims: tuple[int | None, ...]) -> jax.ShapeDtypeStruct:
    """A result type that lives where `x` does: its axis i is sharded like axis `dims[i]` of `x`.

    Inside `jax.shard_map` a plain type would claim that all devices hold the same value.
    """
    like = jax.typeof(x)
    if like.sharding.mesh.empty:
        return jax.ShapeDtypeStruct(shape, dtype)
    axes = tuple(like.sharding.spec) + (None,) * (like.ndim - len(like.sharding.spec))
    spec = PartitionSpec(*(None if d is None else axes[d] for d in dims))
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(like.sharding.mesh, spec),
        manual_axis_type=like.manual_axis_type,
    )
