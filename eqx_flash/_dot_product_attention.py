# SPDX-License-Identifier: Apache-2.0
"""The drop-in for `jax.nn.dot_product_attention`."""

from __future__ import annotations

import warnings
from typing import Literal, no_type_check, overload

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Float32, Int32, Num

from . import _canonical, _primitive
from ._spec import CHECKPOINT_NAMES, CausalAlignment

Window = int | tuple[int | None, int | None]
Implementation = Literal["flash", "xla"]


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[False] = ...,
    causal_alignment: CausalAlignment = "top_left",
    deterministic: bool = False,
    checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window | None = None,
    implementation: Implementation | None = None,
    return_residual: Literal[True],
    causal_alignment: CausalAlignment = "top_left",
    deterministic: bool = False,
    checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
) -> tuple[Array, Array]: ...


# Not checked against these annotations: `_checks` comes first, as its messages are better. The
# canonical arrays are then checked in `_primitive.attend`.
@no_type_check
def dot_product_attention(
    query: Float[ArrayLike, "*batch seq_q heads head_dim"],
    key: Float[ArrayLike, "*batch seq_k heads_k head_dim"],
    value: Float[ArrayLike, "*batch seq_k heads_k head_dim"],
    bias: Num[ArrayLike, "*#batch #heads #seq_q #seq_k"] | None = None,
    mask: Bool[ArrayLike, "*#batch #heads #seq_q #seq_k"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int32[ArrayLike, " batch"] | None = None,
    key_value_seq_lengths: Int32[ArrayLike, " batch"] | None = None,
    local_window_size: Window | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    deterministic: bool = False,
    checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
) -> (
    Float[Array, "*batch seq_q heads head_dim"]
    | tuple[Float[Array, "*batch seq_q heads head_dim"], Float32[Array, "*batch seq_q heads"]]
):
    r"""Exact attention in memory linear in the sequence lengths. A drop-in for
    [`jax.nn.dot_product_attention`][]: change the import and nothing else.

    For each head, with the scores $S = \text{scale} \cdot QK^\intercal + \text{bias}$,

    $$\text{out} = \text{softmax}(S)\,V, \qquad \text{residual} = \log \sum_s e^{S_{ts}}.$$

    On a Hopper GPU this runs a CUDA kernel; elsewhere, and for what the kernel does not support,
    the same algorithm in plain JAX. [`eqx_flash.explain`][] says which, and why.

    **Arguments:**

    - `query`: float16, bfloat16, float32 or float64, `[batch, seq_q, heads, head_dim]`, or without
        `batch`.
    - `key`, `value`: The same dtype, `[batch, seq_k, heads_k, head_dim]`, or without `batch`.
        `heads` must be a multiple of `heads_k`: query head `i` uses key/value head
        `i // (heads // heads_k)`.
    - `bias`: Added to the scaled scores; broadcastable to `[batch, heads, seq_q, seq_k]`.
    - `mask`: Booleans, broadcastable likewise. A query sees a key where it is `True`.
    - `scale`: Multiplies the scores. Defaults to `head_dim**-0.5`. A Python number is part of the
        compiled program; an array is multiplied into `query`, in its dtype, and has a gradient.
    - `is_causal`: Whether a query may see only keys at or before its own position.
    - `query_seq_lengths`, `key_value_seq_lengths`: int32 `[batch]`. Queries and keys at or past
        these lengths are padding: no query sees a padding key, and a padding query gets 0.
    - `local_window_size`: How many positions to the `(left, right)` of its own a query may see,
        inclusive; `None` for an unbounded side. A single integer stands for both sides.
    - `implementation`: `None` takes the kernel where it can, and otherwise the reference, with a
        warning if there is a GPU. `"flash"` is the kernel or an error, `"xla"` the reference.
    - `return_residual`: Whether to return the log-sum-exp as well.
    - `causal_alignment`: Where own positions count from if `seq_q != seq_k`. In `"top_left"`, as in
        `jax.nn`, query 0 has the position of key 0; in `"bottom_right"`, as in FlashAttention and
        in decoding, the last query has that of the last key. Windows move along.
    - `deterministic`: Whether the gradient must have the same bits every time. Without it, head
        dims up to 128 sum the gradient of `query` on the GPU in whatever order comes, faster.
    - `checkpoint_names`: What policies of `jax.checkpoint` call the output and the log-sum-exp,
        `"eqx_flash_out"` and `"eqx_flash_lse"` by default.

    **Returns:**

    The output, like `query`; with `return_residual` a tuple of it and the natural log-sum-exp of
    the scores, float32 (float64 for float64 inputs) `[batch, seq_q, heads]`, both differentiable.

    **Raises:**

    `ValueError` for a shape, dtype or value that does not fit, `TypeError` for an argument of the
    wrong Python type, `NotImplementedError` if `implementation="flash"` cannot serve the call, or
    if the kernel is differentiated twice.

    !!! info

        A query that may see no key gets 0, a residual of minus infinity, and zero gradients; in
        `jax.nn` it gets the mean of `value`.

        The residual of `jax.nn` has the dtype of the inputs and no gradient.

        Forward-mode differentiation (`jax.jvp`, `jax.jacfwd`) and, where the kernel serves the
        call, second derivatives raise `NotImplementedError`; the latter work with
        `implementation="xla"`.

        `vmap` folds the mapped axis into the batch: one kernel launch, not a loop. Under
        `jax.checkpoint`, a policy that saves both `checkpoint_names` spares the second forward
        pass. For sharded arrays, batch and heads stay where they are. All promises are in
        `docs/transformations.md`.

    ??? cite

        [FlashAttention-3: Fast and Accurate Attention with Asynchrony and
        Low-precision](https://arxiv.org/abs/2407.08608), Shah et al., 2024.
    """
    operands = _canonical.Operands.of(
        query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths
    )
    plan = _canonical.plan(
        operands,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        implementation=implementation,
        causal_alignment=causal_alignment,
        deterministic=deterministic,
        checkpoint_names=checkpoint_names,
    )
    if (warning := _canonical.new_warning(plan.choice)) is not None:
        warnings.warn(warning, stacklevel=2)
    out, lse = _primitive.attend(plan.spec, *_canonical.arrays(operands, plan.q_factor))
    shape = operands.query.shape
    if len(shape) == 3:
        out = out.reshape(shape)
    return (out, jnp.swapaxes(lse, 1, 2).reshape(shape[:-1])) if return_residual else out
