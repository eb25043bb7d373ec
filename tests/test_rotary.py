# SPDX-License-Identifier: Apache-2.0
"""`eqx_flash.nn.RotaryEmbedding` turns by the angles of the paper, and remembers nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from common import generator, quick_compilation

from eqx_flash.nn import MultiheadAttention, RotaryEmbedding

SEQ, HEADS, SIZE = 11, 3, 8


@pytest.fixture(autouse=True)
def fast():
    with quick_compilation():
        yield


def random(key, *shape, dtype=jnp.float32):
    return jnp.asarray(generator(key).standard_normal(shape), dtype)


def turned(x, positions, theta):
    """What the paper says, in float64: pairs are complex numbers, turned by a unit factor."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)
    factors = np.exp(1j * np.asarray(positions, np.float64)[:, None] * frequencies)
    factors = factors.reshape(len(x), *[1] * (x.ndim - 2), half)
    pairs = (x[..., :half] + 1j * x[..., half:]) * factors
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(SEQ, SIZE), (SEQ, HEADS, SIZE), (1, 2), (0, HEADS, SIZE)])
def test_values(getkey, shape):
    x = random(getkey(), *shape)
    out = RotaryEmbedding(shape[-1])(x)
    np.testing.assert_allclose(out, turned(x, range(len(x)), 10_000.0), atol=1e-5)


def test_values_at_positions(getkey):
    x = random(getkey(), 5, HEADS, SIZE)
    positions = jnp.array([4095, 0, -7, 4095, 63])
    out = RotaryEmbedding(SIZE, theta=500.0)(x, positions)
    np.testing.assert_allclose(out, turned(x, positions, 500.0), atol=1e-3)
    np.testing.assert_array_equal(out[1], x[1])


def test_a_continued_text_agrees_with_the_whole(getkey):
    x, rotary = random(getkey(), SEQ, HEADS, SIZE), RotaryEmbedding(SIZE)
    tail = rotary(x[-2:], jnp.array([SEQ - 2, SEQ - 1]))
    np.testing.assert_array_equal(tail, rotary(x)[-2:])


def test_scores_depend_on_distances_only(getkey):
    query, key = random(getkey(), SEQ, SIZE), random(getkey(), SEQ, SIZE)
    rotary = RotaryEmbedding(SIZE)

    def scores(start):
        positions = start + jnp.arange(SEQ)
        return rotary(query, positions) @ rotary(key, positions).T

    np.testing.assert_allclose(scores(0), scores(100), atol=1e-4)


def test_bfloat16_is_computed_in_float32(getkey):
    x, rotary = random(getkey(), 300, SIZE, dtype=jnp.bfloat16), RotaryEmbedding(SIZE)
    out = rotary(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, rotary(x.astype(jnp.float32)).astype(jnp.bfloat16))


# ---- Against Equinox -----------------------------------------------------------------------------


def test_layout_is_that_of_equinox(getkey):
    eqx.clear_caches()  # see the next test
    x = random(getkey(), SEQ, SIZE)
    np.testing.assert_allclose(
        RotaryEmbedding(SIZE)(x), eqx.nn.RotaryPositionalEmbedding(SIZE)(x), atol=1e-5
    )


def test_two_thetas_in_one_process(getkey):
    x = random(getkey(), SEQ, SIZE)
    for theta in (10_000.0, 100.0, 10_000.0):
        out = RotaryEmbedding(SIZE, theta)(x)
        np.testing.assert_allclose(out, turned(x, range(SEQ), theta), atol=1e-5)


def test_where_equinox_forgets_theta(getkey):
    """Equinox 0.13.8 gives the second layer the angles of the first. So no cache here."""
    eqx.clear_caches()
    x = random(getkey(), SEQ, SIZE)
    first, second = (
        eqx.nn.RotaryPositionalEmbedding(SIZE, theta)(x) for theta in (10_000.0, 100.0)
    )
    eqx.clear_caches()
    if not np.array_equal(first, second):
        pytest.skip("this Equinox keeps two thetas apart")
    assert np.abs(second - turned(x, range(SEQ), 100.0)).max() > 0.1


# ---- Transformations -----------------------------------------------------------------------------


def test_jit_with_traced_positions(getkey):
    x, rotary = random(getkey(), SEQ, HEADS, SIZE), RotaryEmbedding(SIZE)
    positions = jnp.arange(SEQ) + 5
    out = eqx.filter_jit(rotary)(x, positions)
    np.testing.assert_allclose(out, rotary(x, positions), atol=1e-5)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_vmap(getkey, in_axes):
    x, positions = random(getkey(), 2, SEQ, HEADS, SIZE), jnp.arange(2 * SEQ).reshape(2, SEQ)
    args = [a if axis == 0 else a[0] for a, axis in zip((x, positions), in_axes, strict=True)]
    rotary = RotaryEmbedding(SIZE)
    out = jax.vmap(rotary, in_axes)(*args)
    for i in range(2):
        one = [a[i] if axis == 0 else a for a, axis in zip(args, in_axes, strict=True)]
        np.testing.assert_allclose(out[i], rotary(*one), atol=1e-6)


def test_the_gradient_turns_back(getkey):
    x, dout = random(getkey(), SEQ, HEADS, SIZE), random(getkey(), SEQ, HEADS, SIZE)
    rotary, positions = RotaryEmbedding(SIZE), jnp.arange(SEQ)
    _, vjp = jax.vjp(lambda x: rotary(x, positions), x)
    np.testing.assert_allclose(vjp(dout)[0], rotary(dout, -positions), atol=1e-5)


def test_in_attention(getkey):
    """Grouped-query heads through `process_heads`: moving the whole text changes nothing."""
    attention = MultiheadAttention(4, 32, num_kv_heads=2, is_causal=True, key=getkey())
    rotary = RotaryEmbedding(8)
    x = random(getkey(), SEQ, 32)

    def attend(start):
        positions = start + jnp.arange(SEQ)
        return attention(
            x,
            x,
            x,
            process_heads=lambda q, k, v: (rotary(q, positions), rotary(k, positions), v),
        )

    np.testing.assert_allclose(attend(0), attend(50), atol=1e-4)
    assert np.abs(attend(0) - attention(x, x, x)).max() > 1e-3


# ---- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -2, 7])
def test_odd_size(size):
    with pytest.raises(ValueError, match=f"embedding_size: expected an even .* got {size}"):
        RotaryEmbedding(size)


@pytest.mark.parametrize("theta", [0.0, -1.0, float("nan")])
def test_theta(theta):
    with pytest.raises(ValueError, match="theta: expected a number above 0"):
        RotaryEmbedding(SIZE, theta)


@pytest.mark.parametrize(
    "x, positions, message",
    [
        (jnp.ones((SEQ, SIZE + 2)), None, r"x: expected shape .* got \(11, 10\)"),
        (jnp.ones(SIZE), None, r"x: expected shape .* got \(8,\); map over a batch"),
        (jnp.ones((SEQ, SIZE)), jnp.arange(3), r"positions: .* 11 places of x, got int32"),
        (jnp.ones((SEQ, SIZE)), jnp.ones(SEQ), "positions: expected one integer .* got float32"),
    ],
)
def test_inputs(monkeypatch, x, positions, message):
    # As users run it: without pytest's checks of the annotations, which come before our own.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(SIZE)(x, positions)
