# SPDX-License-Identifier: Apache-2.0
"""jit, vmap, scan, remat and gradients around the kernel itself."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import eqx_flash

pytestmark = pytest.mark.gpu

CASES = [
    # dtype, batch, seq_q, seq_k, heads, heads_k, head_dim, mask
    ("bfloat16", 2, 200, 333, 4, 2, 64, "full"),
    ("bfloat16", 2, 333, 200, 4, 1, 128, "bottom_right"),
    ("float16", 1, 300, 300, 3, 3, 128, "top_left"),
    ("float16", 2, 129, 257, 2, 1, 256, "bottom_right"),
    ("bfloat16", 1, 77, 100, 6, 2, 72, "top_left"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case):
    """Of out and lse both, against autodiff of the formula, by the criterion of the outputs."""
    *_, batch, seq_q, seq_k, heads, heads_k, head_dim, mask = case
    operands = oracle.random_qkv(*case[:-1])
    out_weight, *_ = oracle.random_qkv(*case[:-1], seed=1)
    lse_weight = np.random.default_rng(2).standard_normal((batch, heads, seq_q), np.float32)
    variant = oracle.Variant.of(heads, heads_k, mask, seq_q, seq_k)

    def loss(results):
        out, lse = results
        # Of an empty row, lse is -inf: leave it out, so that the sum stays finite.
        lse = jnp.where(lse == -jnp.inf, 0.0, lse)
        return jnp.sum(out.astype(jnp.float32) * out_weight.astype(np.float32)) + jnp.sum(
            lse * lse_weight
        )

    def gradients(fn, *arrays):
        return jax.jit(jax.grad(lambda *xs: loss(fn(*xs)), argnums=(0, 1, 2)))(*arrays)

    def exact(*xs, round_to=None):
        scale = np.float32(head_dim**-0.5)
        return oracle.formula(
            *xs, scale=scale, variant=variant, seq_q=seq_q, seq_k=seq_k, round_to=round_to
        )

    def coarse(*xs):
        return exact(*xs, round_to=operands[0].dtype)

    ours = gradients(lambda *xs: oracle.flash(*xs, mask=mask), *operands)
    in_float32 = [x.astype(np.float32) for x in operands]
    expected = gradients(exact, *in_float32)
    for name, x, x_exact, x_coarse in zip(
        "qkv", ours, expected, gradients(coarse, *in_float32), strict=True
    ):
        x, x_exact, x_coarse = (np.asarray(a, np.float32) for a in (x, x_exact, x_coarse))
        noise = 2 * np.abs((x_exact + np.float32(0.3)) - np.float32(0.3) - x_exact).max()
        error, bound = np.abs(x - x_exact).max(), 2 * np.abs(x_coarse - x_exact).max() + noise
        assert error <= bound, f"d{name}: {error} > {bound}"


def test_gradient_of_empty_rows_is_zero():
    q, k, v = oracle.random_qkv("bfloat16", 1, 300, 100, 2, 1, 64)
    weight = oracle.random_qkv("bfloat16", 1, 300, 1, 2, 1, 64, seed=1)[0].astype(np.float32)

    def loss(q, k, v):
        out, lse = oracle.flash(q, k, v, "bottom_right")
        return jnp.sum(out.astype(jnp.float32) * weight) + jnp.sum(jnp.exp(lse))

    dq, dk, dv = (np.asarray(x, np.float32) for x in jax.grad(loss, argnums=(0, 1, 2))(q, k, v))
    assert not dq[:, :200].any() and dq[:, 200:].any()
    assert np.isfinite(dk).all() and np.isfinite(dv).all()


@pytest.mark.parametrize("mapped", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, None)])
def test_vmap(mapped):
    q, k, v = oracle.random_qkv("bfloat16", 2, 130, 140, 4, 2, 64)
    operands = []
    for x, axis in zip((q, k, v), mapped, strict=True):
        stacked = np.stack([x, x[:, ::-1], -x], axis=axis or 0)
        operands.append(x if axis is None else stacked)
    out, lse = jax.vmap(lambda *xs: oracle.flash(*xs, mask="bottom_right"), in_axes=mapped)(
        *operands
    )
    for i in range(3):
        one = (
            x if axis is None else np.take(x, i, axis)
            for x, axis in zip(operands, mapped, strict=True)
        )
        expected = oracle.flash(*one, mask="bottom_right")
        oracle.assert_bitwise_equal(out[i], expected[0])
        oracle.assert_bitwise_equal(lse[i], expected[1])


def test_jit_and_scan():
    q, k, v = map(jnp.asarray, oracle.random_qkv("bfloat16", 2, 300, 300, 4, 4, 128))

    def layer(x, _):
        x, lse = oracle.flash(x, k, v, "top_left")
        return x, lse

    expected, expected_lse = q, []
    for _ in range(4):
        expected, lse = layer(expected, None)
        expected_lse.append(lse)
    for scan in (jax.lax.scan, jax.jit(jax.lax.scan, static_argnums=0, static_argnames="length")):
        out, lse = scan(layer, q, length=4)
        oracle.assert_bitwise_equal(out, expected)
        oracle.assert_bitwise_equal(lse, jnp.stack(expected_lse))


def test_remat():
    q, k, v = map(jnp.asarray, oracle.random_qkv("bfloat16", 2, 200, 200, 4, 2, 64))

    def loss(fn):
        return lambda q: jnp.sum(jnp.tanh(fn(q)[0].astype(jnp.float32)))

    def attention(q):
        return oracle.flash(q, k, v, "top_left")

    plain = jax.jit(jax.value_and_grad(loss(attention)))(q)
    rematerialised = jax.jit(jax.value_and_grad(loss(jax.checkpoint(attention))))(q)
    np.testing.assert_allclose(rematerialised[0], plain[0], rtol=1e-6)
    # XLA may fuse the backward pass differently; the results are bfloat16.
    np.testing.assert_allclose(
        *(np.asarray(x[1], np.float32) for x in (rematerialised, plain)), rtol=2**-7, atol=1e-6
    )


def test_drop_in_runs_the_kernel():
    q, k, v = map(jnp.asarray, oracle.random_qkv("bfloat16", 2, 200, 300, 4, 2, 64))

    def attention(q, k, v):
        return eqx_flash.dot_product_attention(q, k, v, is_causal=True, return_residual=True)

    program = jax.jit(attention).lower(q, k, v).compile()
    assert "eqx_flash_forward" in (program.as_text() or "")
    out, lse = program(q, k, v)
    expected = oracle.flash(q, k, v, "top_left")
    oracle.assert_bitwise_equal(out, expected[0])
    oracle.assert_bitwise_equal(lse, jnp.swapaxes(expected[1], 1, 2))
    oracle.assert_close(q, k, v, *expected, mask="top_left")
