# SPDX-License-Identifier: Apache-2.0
"""`attend`: attention as JAX sees it. Derivatives, `vmap` and the choice of platform.

From the outside in: mesh, `custom_vjp`, `custom_vmap`, `custom_partitioning`, platform, kernel. The
order is forced: the inner mechanisms have no rules for the outer transformations. All that depends
on JAX's means of customisation, other than meshes, is in this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from beartype import beartype
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values
from jaxtyping import jaxtyped

from . import _ffi, _partition, _reference
from ._reverse_mode import reverse_mode_only
from ._spec import AttentionSpec
from ._types import Bias, KeyValue, Lengths, LogSumExp, Mask, Query

SECOND_ORDER = (
    "the flash kernel has no second derivatives; "
    'pass implementation="xla" to eqx_flash.dot_product_attention'
)


# Under `jit`, types are checked once for each new shape, and an eager call costs one dispatch.
@functools.partial(jax.jit, static_argnums=0, inline=True)
@jaxtyped(typechecker=beartype)
def attend(
    spec: AttentionSpec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    bias: Bias | None = None,
    mask: Mask | None = None,
    query_lengths: Lengths | None = None,
    key_value_lengths: Lengths | None = None,
) -> tuple[Query, LogSumExp]:
    """`(out, lse)` of canonical operands, differentiable in q, k, v and bias.

    The last four operands are for `spec.dispatch == "xla"` only.
    """
    q, k, v, bias = reverse_mode_only((q, k, v, bias))
    return _partition.per_shard(
        functools.partial(_attend, spec), q, k, v, bias, mask, query_lengths, key_value_lengths
    )


@functools.partial(jax.jit, static_argnums=0, inline=True)
@jaxtyped(typechecker=beartype)
def gradients(
    spec: AttentionSpec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    out: Query,
    lse: LogSumExp,
    dout: Query,
    dlse: LogSumExp | None,
) -> tuple[Query, KeyValue, KeyValue]:
    """`(dq, dk, dv)` by the kernels: the backward pass of `attend` by itself.

    `dlse=None` stands for zeros.
    """
    if _partition.has_explicit_axes(q, k, v):
        raise NotImplementedError(
            "flash_attention_hopper_bwd: arrays on Explicit mesh axes are not supported; "
            "differentiate flash_attention_hopper_fwd with jax.grad or jax.vjp, which shards them"
        )
    operands = _partition.vary(q, k, v, out, lse, dout, dlse)
    return _first_order(_backward, spec)(*operands)[:3]


# ---- Derivatives ---------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(spec, q, k, v, *extras):
    return _forward(spec, q, k, v, *extras)


def _attend_fwd(spec, *operands):
    q, k, v, *extras = custom_vjp_primal_tree_values(operands)
    out, lse = _first_order(_forward, spec)(q, k, v, *extras)
    # Named, so that a `jax.checkpoint` policy can keep them and spare a second forward pass.
    out, lse = map(checkpoint_name, (out, lse), spec.checkpoint_names)
    return (out, lse), (q, k, v, out, lse, extras)


def _attend_bwd(spec, residuals, cotangents):
    q, k, v, out, lse, extras = residuals
    dout, dlse = cotangents
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros_like(out)
    if isinstance(dlse, SymbolicZero):  # nearly always, and zeros would cost a kernel and a read
        dlse = None
    dq, dk, dv, dbias = _first_order(_backward, spec)(q, k, v, out, lse, dout, dlse, *extras)
    return dq, dk, dv, dbias, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd, symbolic_zeros=True)


def _first_order(fn: Callable, spec: AttentionSpec) -> Callable:
    """`fn(spec, ...)`, which must not be differentiated again if it runs a kernel.

    It refuses only when a cotangent arrives or a tangent is computed, so that a gradient under
    `stop_gradient` passes.
    """
    bound = functools.partial(fn, spec)
    if spec.dispatch == "xla":
        return bound

    def refuse(*_):
        raise NotImplementedError(SECOND_ORDER)

    guarded = jax.custom_vjp(bound)
    guarded.defvjp(lambda *operands: (bound(*operands), None), refuse)
    return lambda *operands: guarded(*reverse_mode_only(operands, SECOND_ORDER))


def _forward(spec, q, k, v, *extras):
    if spec.dispatch != "xla":
        return _forward_batched(spec, q, k, v)
    out, lse = _reference.forward(spec, q, k, v, *extras)
    # Adds 0, an empty sum. If `vmap` maps over v, lse must be mapped like out: JAX counts the
    # cotangent of an output of a `custom_vjp` that is not mapped once for every example.
    return out, lse + jnp.sum(v[:, :0], dtype=lse.dtype)


def _backward(spec, q, k, v, out, lse, dout, dlse, *extras):
    if spec.dispatch == "xla":
        return _reference.backward(spec, q, k, v, out, lse, dout, dlse, *extras)
    cotangents = (dout,) if dlse is None else (dout, dlse)
    return *_backward_batched(spec, q, k, v, out, lse, *cotangents), None


# ---- vmap ----------------------------------------------------------------------------------------


def _forward_batched(spec, q, k, v):
    call = custom_vmap(functools.partial(_forward_partitioned, spec))
    forward = functools.partial(_forward_batched, spec)

    @call.def_vmap
    def _(size, mapped, q, k, v):
        if mapped == [True, False, False] and _partition.is_local(q):
            # Shared keys and values are not copied: fold into the query heads. On a mesh rather
            # into the batch, which is easier to shard than a part of the heads.
            fold, unfold = _folding_heads(size, q.shape[3], k.shape[2])
            out, lse = forward(fold(q, 2), k, v)
            return (unfold(out, 2), unfold(lse, 1)), (True, True)
        fold, unfold = _folding_batch(size, k.shape[mapped[1]])
        return unfold(_partition.per_batch(forward, *fold(mapped, q, k, v))), (True, True)

    return call(q, k, v)


def _backward_batched(spec, *operands):
    call = custom_vmap(functools.partial(_backward_partitioned, spec))
    backward = functools.partial(_backward_batched, spec)

    @call.def_vmap
    def _(size, mapped, q, *operands):
        # Gradients of shared keys and values stay apart here. JAX sums them where it should: under
        # grad(vmap), not under vmap(grad).
        fold, unfold = _folding_batch(size, q.shape[mapped[0]])
        grads = _partition.per_batch(backward, *fold(mapped, q, *operands))
        return unfold(grads), (True, True, True)

    return call(*operands)


def _folding_batch(size, batch):
    """`fold`: [size, batch, ...] -> [size * batch, ...], and its inverse."""

    def fold(mapped, *arrays):
        for x, is_mapped in zip(arrays, mapped, strict=True):
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            yield x.reshape(size * batch, *x.shape[2:])

    def unfold(arrays):
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in arrays)

    return fold, unfold


def _folding_heads(size, heads, heads_k):
    """`fold`: [size, ..., heads, ...] -> [..., heads_k * size * group, ...], and its inverse.

    `axis` is that of the heads in the folded array. The query heads of a key/value head stay
    together.
    """
    split = (heads_k, heads // heads_k)

    def fold(x, axis):
        before, after = x.shape[1 : axis + 1], x.shape[axis + 2 :]
        x = jnp.moveaxis(x.reshape(size, *before, *split, *after), 0, axis + 1)
        return x.reshape(*before, size * heads, *after)

    def unfold(x, axis):
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        x = jnp.moveaxis(x.reshape(*before, heads_k, size, split[1], *after), axis + 1, 0)
        return x.reshape(size, *before, heads, *after)

    return fold, unfold


# ---- Platform ------------------------------------------------------------------------------------


def _forward_here(spec, *operands):
    return _on_platform(spec, _ffi.forward, _reference.forward, *operands)


def _backward_here(spec, *operands):
    def reference(*args):
        return _reference.backward(*args)[:3]  # there is no bias

    return _on_platform(spec, _ffi.backward, reference, *operands)


def _on_platform(spec, kernel, reference, q, k, *operands):
    if 0 in (*q.shape, *k.shape):  # the kernels have no empty axes, but a mapped one may be
        return reference(spec, q, k, *operands)
    if spec.dispatch == "flash":
        return kernel(spec, q, k, *operands)
    return jax.lax.platform_dependent(
        q,
        k,
        *operands,
        cuda=functools.partial(kernel, spec),
        default=functools.partial(reference, spec),
    )


_forward_partitioned = _partition.partitioned(_forward_here, operands="qkk", results="ql")
_backward_with_dlse = _partition.partitioned(_backward_here, operands="qkkqlql", results="qkk")
_backward_without_dlse = _partition.partitioned(_backward_here, operands="qkkqlq", results="qkk")


def _backward_partitioned(spec, q, k, v, out, lse, dout, *dlse):
    backward = _backward_with_dlse if dlse else _backward_without_dlse
    return backward(spec, q, k, v, out, lse, dout, *dlse)
