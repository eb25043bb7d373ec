# SPDX-License-Identifier: Apache-2.0
"""The kernels without the drop-in's generality: a Hopper GPU and a supported call, or an error."""

from __future__ import annotations

from typing import no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from . import _canonical, _checks, _primitive
from ._spec import CausalAlignment


@no_type_check  # `_checks` and then `_primitive.attend` check, as in `dot_product_attention`
def flash_attention_hopper_fwd(
    query: Float[Array, "batch seq_q heads head_dim"],
    key: Float[Array, "batch seq_k heads_k head_dim"],
    value: Float[Array, "batch seq_k heads_k head_dim"],
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    causal_alignment: CausalAlignment = "bottom_right",
    deterministic: bool = False,
) -> tuple[Float[Array, "batch seq_q heads head_dim"], Float32[Array, "batch heads seq_q"]]:
    r"""Exact attention $\text{softmax}(QK^\intercal / \sqrt{d})V$ by the Hopper kernel, never
    storing the scores.

    For code that wants the kernel or an error; [`eqx_flash.dot_product_attention`][] is the
    function for all others.

    **Arguments:**

    - `query`, `key`, `value`: float16 or bfloat16; `head_dim` a multiple of 8 up to 256, no axis
        empty. `heads` must be a multiple of `heads_k`: each key/value head serves
        `heads // heads_k` query heads.
    - `softmax_scale`: Multiplies the scores. Defaults to `head_dim**-0.5`.
    - `causal`: Whether a query may see only keys at or before its own position.
    - `causal_alignment`: Whether positions count from the start (`"top_left"`) or from the end
        (`"bottom_right"`) of both sequences. It matters only if their lengths differ.
    - `deterministic`: Of the gradient, as in [`eqx_flash.flash_attention_hopper_bwd`][].

    **Returns:**

    The output, like `query`, and the natural log-sum-exp of the scaled scores. Both can be
    differentiated, once and in reverse mode. A query that may see no key gets zeros and minus
    infinity.

    **Raises:**

    `ValueError` or `TypeError` for an argument that does not fit; `NotImplementedError` without a
    Hopper GPU, without compiled kernels, or for a call that they do not support.

    !!! info

        `vmap` folds the mapped axis into `batch`: one kernel launch, not a loop.

    ??? cite

        [FlashAttention-3: Fast and Accurate Attention with Asynchrony and
        Low-precision](https://arxiv.org/abs/2407.08608), Shah et al., 2024.
    """
    operands = _canonical.Operands.of(query, key, value)
    plan = _canonical.plan_kernel(operands, softmax_scale, causal, causal_alignment, deterministic)
    return _primitive.attend(plan.spec, *_canonical.arrays(operands, plan.q_factor))


@no_type_check
def flash_attention_hopper_bwd(
    query: Float[Array, "batch seq_q heads head_dim"],
    key: Float[Array, "batch seq_k heads_k head_dim"],
    value: Float[Array, "batch seq_k heads_k head_dim"],
    out: Float[Array, "batch seq_q heads head_dim"],
    lse: Float32[Array, "batch heads seq_q"],
    dout: Float[Array, "batch seq_q heads head_dim"],
    dlse: Float32[Array, "batch heads seq_q"] | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    causal_alignment: CausalAlignment = "bottom_right",
    deterministic: bool = False,
) -> tuple[
    Float[Array, "batch seq_q heads head_dim"],
    Float[Array, "batch seq_k heads_k head_dim"],
    Float[Array, "batch seq_k heads_k head_dim"],
]:
    r"""The gradients of [`eqx_flash.flash_attention_hopper_fwd`][], by the Hopper kernels.

    `jax.grad` of any public function calls the same kernels; this is for code that keeps `out` and
    `lse` itself. With $P = e^{S - \text{lse}}$ and
    $\delta = \text{rowsum}(dO \circ O) - d\text{lse}$,

    $$dV = P^\intercal dO, \qquad dS = P \circ (dO V^\intercal - \delta), \qquad
    dQ = \text{scale} \cdot dS K, \qquad dK = \text{scale} \cdot dS^\intercal Q.$$

    **Arguments:**

    - `query`, `key`, `value`, `softmax_scale`, `causal`, `causal_alignment`: As in the forward.
    - `out`, `lse`: Its results.
    - `dout`, `dlse`: The gradients with respect to them. `None` for a loss that does not see `lse`.
    - `deterministic`: Whether to give the same bits every time. Otherwise head dims up to 128 sum
        `dq` in whatever order the thread blocks come, which is faster.

    **Returns:**

    `(dq, dk, dv)`, like `query`, `key` and `value`. A query that may see no key gets, and gives,
    zeros.

    **Raises:**

    As the forward. The gradients themselves cannot be differentiated.

    ??? cite

        [FlashAttention-2: Faster Attention with Better Parallelism and Work
        Partitioning](https://arxiv.org/abs/2307.08691), Dao, 2023, section 3.1.2.
    """
    operands = _canonical.Operands.of(query, key, value)
    plan = _canonical.plan_kernel(operands, softmax_scale, causal, causal_alignment, deterministic)
    residuals = _checks.residuals(operands.query, out=out, lse=lse, dout=dout, dlse=dlse)
    q, k, v, *_ = _canonical.arrays(operands, plan.q_factor)
    dq, dk, dv = _primitive.gradients(plan.spec, q, k, v, *residuals)
    return dq if plan.q_factor is None else dq * jnp.asarray(plan.q_factor, dq.dtype), dk, dv
