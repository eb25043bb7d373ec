# SPDX-License-Identifier: Apache-2.0
"""What the kernel is held to: the plain formula, and FlashAttention's measure of closeness to it.

An output passes if it is at most twice as far from the formula in float32 as the same formula is
when each of its steps is rounded to the inputs' 16-bit type, plus the float32 formula's own noise.
No tolerance is chosen by hand.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import eqx_flash

MASKS = ("full", "top_left", "bottom_right")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

LSE_ABSOLUTE, LSE_RELATIVE = 1e-4, 1e-5


def flash(q, k, v, mask: str = "full", scale: float | None = None):
    """`(out, lse)` of the kernel, through the public function."""
    return eqx_flash.flash_attention_hopper_fwd(
        q,
        k,
        v,
        scale,
        mask != "full",
        causal_alignment="bottom_right" if mask == "bottom_right" else "top_left",
    )


def random_qkv(dtype, batch, seq_q, seq_k, heads, heads_k, head_dim, seed=0):
    """Standard normal operands, on the host: cutting and padding them there compiles nothing."""
    rng = np.random.default_rng(seed)
    shapes = (batch, seq_q, heads, head_dim), *((batch, seq_k, heads_k, head_dim),) * 2
    return tuple(rng.standard_normal(s, dtype=np.float32).astype(DTYPES[dtype]) for s in shapes)


# ---- The formula ---------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What distinguishes calls on the same padded arrays, as arrays: one program serves all."""

    key_heads: Any  # int32 [heads]: the key head of each query head
    causal: Any  # bool
    diagonal: Any  # int32: query t sees key s if s <= t + diagonal

    @classmethod
    def of(cls, heads: int, heads_k: int, mask: str, seq_q: int, seq_k: int):
        key_heads = np.arange(heads, dtype=np.int32) // (heads // heads_k)
        diagonal = seq_k - seq_q if mask == "bottom_right" else 0
        return cls(key_heads, np.bool_(mask != "full"), np.int32(diagonal))


def formula(q, k, v, scale, variant: Variant, seq_q, seq_k, round_to=None):
    """softmax(scale q k^T) v in float32 and its log-sum-exp, with the scores written out.

    `seq_q` and `seq_k` are the lengths before padding. With `round_to`, every step is rounded to
    that type, as a program in that type would. A row that sees no key gives 0 and -inf.
    """
    rounded = _rounding(round_to)
    # Exact already; their gradients are rounded here.
    q, k, v = (rounded(x.astype(jnp.float32)) for x in (q, k, v))
    k, v = k[:, :, variant.key_heads], v[:, :, variant.key_heads]
    rows = jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
    cols = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    visible = (rows < seq_q) & (cols < seq_k)
    visible &= ~variant.causal | (cols <= rows + variant.diagonal)

    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = rounded(product("btnd,bsnd->bnts", rounded(q * scale), k))
    scores = jnp.where(visible, scores, -jnp.inf)
    row_max = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(row_max == -jnp.inf, 0.0, row_max))
    row_sum = jnp.sum(weights, axis=-1, keepdims=True)
    safe_sum = jnp.where(row_sum == 0, 1.0, row_sum)  # no NaN in the gradient of an empty row
    weights = rounded(weights / safe_sum)
    lse = (row_max + jnp.log(safe_sum))[..., 0]
    return rounded(product("bnts,bsnd->btnd", weights, v)), lse


def _rounding(dtype):
    if dtype is None:
        return lambda x: x
    # Not a pair of casts, which XLA may drop ("excess precision").
    info = jnp.finfo(dtype)
    return lambda x: jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


# ---- Closeness -----------------------------------------------------------------------------------


class Errors(NamedTuple):
    """Distances from the formula; infinite where it is finite and the kernel is not."""

    out: jax.Array
    bound: jax.Array  # of `out`
    lse: jax.Array  # beyond LSE_RELATIVE; infinite also if a row without visible keys is not -inf

    @property
    def passed(self):
        return (self.out <= self.bound) & (self.lse <= LSE_ABSOLUTE)


@jax.jit
def measure(q, k, v, outs, lses, variants: Variant, scale, seq_q, seq_k) -> Errors:
    """The errors of several results `outs`, `lses` (first axis) for the same operands."""

    def one(arguments):
        out, lse, variant = arguments
        exact, exact_lse = formula(q, k, v, scale, variant, seq_q, seq_k)
        coarse, _ = formula(q, k, v, scale, variant, seq_q, seq_k, round_to=q.dtype)
        noise = jax.lax.optimization_barrier(exact + 0.3) - 0.3 - exact
        bound = 2 * jnp.max(jnp.abs(coarse - exact)) + 2 * jnp.max(jnp.abs(noise))
        out_error = jnp.abs(out.astype(jnp.float32) - exact)
        lse_error = jnp.abs(lse - exact_lse) - LSE_RELATIVE * jnp.abs(exact_lse)
        in_range = jnp.arange(lse.shape[-1]) < seq_q
        lse_error = jnp.where(in_range & (lse != exact_lse), lse_error, 0.0)  # both may be -inf
        return Errors(_largest(out_error), bound, _largest(lse_error))

    return jax.lax.map(one, (outs, lses, variants))


def _largest(x):
    # Whether max() returns or ignores a NaN is up to the platform.
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x))


def errors(q, k, v, out, lse, mask: str = "full", scale: float | None = None) -> Errors:
    """The errors of one result."""
    seq_q, heads = q.shape[1:3]
    seq_k, heads_k, head_dim = k.shape[1:]
    variant = Variant.of(heads, heads_k, mask, seq_q, seq_k)
    factor = np.float32(head_dim**-0.5 if scale is None else scale)
    variants = jax.tree.map(lambda x: x[None], variant)
    found = measure(q, k, v, out[None], lse[None], variants, factor, seq_q, seq_k)
    return Errors(*(np.asarray(x)[0] for x in found))


def assert_close(q, k, v, out, lse, mask: str = "full", scale: float | None = None) -> None:
    found = errors(q, k, v, out, lse, mask, scale)
    assert found.passed, found


def bits(x) -> np.ndarray:
    """The bit patterns, for comparisons to which NaN and -0 are values like any other."""
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_bitwise_equal(actual, expected) -> None:
    np.testing.assert_array_equal(bits(actual), bits(expected))
