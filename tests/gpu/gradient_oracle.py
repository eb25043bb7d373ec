# SPDX-License-Identifier: Apache-2.0
"""What the backward kernels are held to: autodiff of the formula, by the measure of `oracle`.

The loss is sum(out * dout) + sum(lse * dlse): the gradient through the LSE is in every case.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import eqx_flash

NAMES = ("dq", "dk", "dv")


def flash_gradients(q, k, v, dout, dlse, mask: str, deterministic: bool):
    """`(dq, dk, dv)` of the kernels, through the public functions."""
    out, lse = oracle.flash(q, k, v, mask)
    return flash_backward(q, k, v, out, lse, dout, dlse, mask, deterministic)


def flash_backward(q, k, v, out, lse, dout, dlse, mask: str, deterministic: bool):
    return eqx_flash.flash_attention_hopper_bwd(
        q,
        k,
        v,
        out,
        lse,
        dout,
        dlse,
        causal=mask != "full",
        causal_alignment="bottom_right" if mask == "bottom_right" else "top_left",
        deterministic=deterministic,
    )


def random_cotangents(dtype, batch, seq_q, heads, head_dim, seed=1):
    rng = np.random.default_rng(seed)
    dout = rng.standard_normal((batch, seq_q, heads, head_dim), dtype=np.float32)
    dlse = rng.standard_normal((batch, heads, seq_q), dtype=np.float32)
    return dout.astype(oracle.DTYPES[dtype]), dlse


class Errors(NamedTuple):
    """Distances of dq, dk and dv from autodiff, and what they may be; arrays of three."""

    error: jax.Array
    bound: jax.Array

    @property
    def passed(self):
        return self.error <= self.bound


@jax.jit
def measure(q, k, v, dout, dlse, gradients, variants: oracle.Variant, scale, seq_q, seq_k):
    """The errors of several results (first axis of the three `gradients`) for the same operands."""

    def formula_gradients(variant, round_to):
        def loss(q, k, v):
            out, lse = oracle.formula(q, k, v, scale, variant, seq_q, seq_k, round_to)
            lse = jnp.where(lse == -jnp.inf, 0.0, lse)  # rows that see nothing have no gradient
            return jnp.sum(out * dout.astype(jnp.float32)) + jnp.sum(lse * dlse)

        return jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))

    def compared(arguments):
        actual, variant = arguments
        exact = formula_gradients(variant, None)
        coarse = formula_gradients(variant, q.dtype)
        found = [_errors(*three, q.dtype) for three in zip(actual, exact, coarse, strict=True)]
        return Errors(*(jnp.stack(x) for x in zip(*found, strict=True)))

    return jax.lax.map(compared, (gradients, variants))


def _errors(actual, exact, coarse, dtype):
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(exact + 0.3, info.nexp, info.nmant)
    # FlashAttention's rule again; a gradient is stored in the inputs' type, hence its rounding.
    noise = jnp.max(jnp.abs(rounded - 0.3 - exact))
    error = jnp.abs(actual.astype(jnp.float32) - exact)
    error = jnp.max(jnp.where(jnp.isnan(error), jnp.inf, error))
    return error, 2 * jnp.max(jnp.abs(coarse - exact)) + 2 * noise
