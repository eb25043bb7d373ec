# SPDX-License-Identifier: Apache-2.0
"""The gradients of both backward implementations over the forward's sweep of shapes."""

import functools

import gradient_oracle as gradients
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_determinism as determinism
import test_forward as forward

import eqx_flash

pytestmark = pytest.mark.gpu

COLUMNS = (
    "dtype", "head_dim", "seq_q", "seq_k", "heads", "heads_k", "mask", "deterministic",
    *(f"{name}_{what}" for name in gradients.NAMES for what in ("error", "bound")), "passed",
)  # fmt: skip

each_implementation = pytest.mark.parametrize("deterministic", [False, True])


@forward.each_dtype
@forward.each_head_dim
def test_sample(dtype, head_dim):
    check(dtype, head_dim, [(113, 203), (256, 512), (1023, 1024)])


@pytest.mark.slow
@forward.each_dtype
@forward.each_head_dim
def test_whole_sweep(dtype, head_dim):
    record = f"backward_{dtype}_{head_dim}.csv"
    check(dtype, head_dim, forward.SHAPES, record)


def check(dtype: str, head_dim: int, shapes, record: str | None = None) -> None:
    lines = [case for shape in shapes for case in run_shape(dtype, head_dim, *shape)]
    forward.report(COLUMNS, lines, record)


def run_shape(dtype: str, head_dim: int, seq_q: int, seq_k: int) -> list[tuple]:
    """All variants of one shape by both implementations, as lines of the record."""
    seed = hash((head_dim, seq_q, seq_k)) % 2**32
    sizes = (forward.BATCH, seq_q, seq_k, forward.HEADS, forward.HEADS, head_dim)
    q, k, v = oracle.random_qkv(dtype, *sizes, seed=seed)
    dout, dlse = gradients.random_cotangents(dtype, forward.BATCH, seq_q, forward.HEADS, head_dim)
    padding = next(n for n in forward.PADDINGS if n >= max(seq_q, seq_k))
    variants = [oracle.Variant.of(forward.HEADS, n, m, seq_q, seq_k) for n, m in forward.VARIANTS]
    variants = jax.tree.map(lambda *leaves: np.stack(leaves), *variants)
    q_p, k_p, v_p, dout_p = (forward.pad(x, padding, np) for x in (q, k, v, dout))
    dlse_p = np.pad(dlse, ((0, 0), (0, 0), (0, padding - seq_q)))
    lines = []
    for deterministic in (False, True):
        found = gradients.measure(
            q_p, k_p, v_p, dout_p, dlse_p,
            run_variants(q, k, v, dout, dlse, padding, deterministic),
            variants, np.float32(head_dim**-0.5), seq_q, seq_k,
        )  # fmt: skip
        found = gradients.Errors(*map(np.asarray, found))
        for i, variant in enumerate(forward.VARIANTS):
            pairs = zip(found.error[i], found.bound[i], strict=True)
            figures = [f"{x:.3g}" for pair in pairs for x in pair]
            lines.append(
                (dtype, head_dim, seq_q, seq_k, forward.HEADS, *variant, deterministic, *figures,
                 bool(found.passed[i].all()))
            )  # fmt: skip
    return lines


@functools.partial(jax.jit, static_argnums=(5, 6))
def run_variants(q, k, v, dout, dlse, padding: int, deterministic: bool):
    """`(dq, dk, dv)` of VARIANTS, padded for the formula, which has all heads in k and v."""
    results = []
    for heads_k, mask in forward.VARIANTS:
        grads = gradients.flash_gradients(
            q, k[:, :, :heads_k], v[:, :, :heads_k], dout, dlse, mask, deterministic
        )
        missing = ((0, 0), (0, 0), (0, forward.HEADS - heads_k), (0, 0))
        dq, *dkv = (forward.pad(x, padding, jnp) for x in grads)
        results.append((dq, *(jnp.pad(x, missing) for x in dkv)))
    return tuple(jnp.stack(x) for x in zip(*results, strict=True))


def operands(dtype, batch, seq_q, seq_k, heads, heads_k, head_dim):
    q, k, v = oracle.random_qkv(dtype, batch, seq_q, seq_k, heads, heads_k, head_dim)
    dout, dlse = gradients.random_cotangents(dtype, batch, seq_q, heads, head_dim)
    return tuple(map(jnp.asarray, (q, k, v, dout, dlse)))


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_that_sees_nothing_gives_and_gets_zeros(head_dim, deterministic):
    """Nor does a NaN in its dlse leak, which is what autodiff of -inf often makes."""
    q, k, v, dout, dlse = operands("bfloat16", 1, 300, 100, 2, 1, head_dim)
    run = functools.partial(
        gradients.flash_gradients, mask="bottom_right", deterministic=deterministic
    )
    dq, dk, dv = run(q, k, v, dout, dlse.at[:, :, :200].set(jnp.nan))
    assert not np.asarray(dq[:, :200], np.float32).any()
    for actual, expected in zip(
        (dq[:, 200:], dk, dv), run(q[:, 200:], k, v, dout[:, 200:], dlse[:, :, 200:]), strict=True
    ):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=1e-2
        )


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_dlse_does_not_reach_dv(value, head_dim, deterministic):
    """P and dP start from numbers that lie side by side."""
    q, k, v, dout, dlse = operands("bfloat16", 1, 200, 150, 2, 2, head_dim)

    def run(dlse):
        found = gradients.flash_gradients(q, k, v, dout, dlse, "full", deterministic)
        return [np.asarray(x, np.float32) for x in found]

    dq, dk, dv = run(dlse.at[0, 1, 77].set(value))
    expected_dq, expected_dk, expected_dv = run(dlse)
    np.testing.assert_array_equal(dv, expected_dv)
    np.testing.assert_array_equal(dk[:, :, 0], expected_dk[:, :, 0])  # the other head
    assert not np.isfinite(dk[:, :, 1]).any()
    assert not np.isfinite(dq[0, 77, 1]).any()
    np.testing.assert_allclose(  # the others' sums may come in another order
        np.delete(dq[0, :, 1], 77, 0), np.delete(expected_dq[0, :, 1], 77, 0), atol=1e-2
    )


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("scale", [1e-20, 1.2e-38])
def test_a_scale_that_leaves_nothing_of_the_scores(scale, head_dim, deterministic):
    """S starts from -lse / scale, which may not overflow."""
    q, k, v, dout, dlse = operands("bfloat16", 1, 200, 256, 2, 2, head_dim)
    out, lse = oracle.flash(q, k, v, scale=scale)
    np.testing.assert_allclose(lse, np.log(256), rtol=1e-5)
    _, _, dv = eqx_flash.flash_attention_hopper_bwd(
        q, k, v, out, lse, dout, dlse, scale, deterministic=deterministic
    )
    mean = np.asarray(dout, np.float32).sum(axis=1, keepdims=True) / 256
    np.testing.assert_allclose(
        np.asarray(dv, np.float32), np.broadcast_to(mean, v.shape), atol=1e-2, rtol=1e-2
    )


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_without_dlse_as_with_zeros(head_dim):
    q, k, v, dout, dlse = operands("bfloat16", 2, 300, 200, 4, 2, head_dim)
    run = functools.partial(gradients.flash_gradients, mask="top_left", deterministic=True)
    for absent, zeros in zip(run(q, k, v, dout, None), run(q, k, v, dout, 0 * dlse), strict=True):
        np.testing.assert_array_equal(absent, zeros)


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("seq", [(1, 1), (1, 300), (64, 64), (192, 320)])
def test_very_negative_lse(seq, head_dim, deterministic):
    """exp(-lse) overflows; other libraries gave NaN, with seq % 128 == 64 or a single query."""
    q, k, v, dout, dlse = operands("bfloat16", 1, *seq, 2, 2, head_dim)
    q, k = jnp.abs(q) * 8, -jnp.abs(k) * 8  # scores far below zero
    for mask in ("full", "bottom_right"):
        grads = gradients.flash_gradients(q, k, v, dout, dlse, mask, deterministic)
        assert all(np.isfinite(np.asarray(g, np.float32)).all() for g in grads)


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_neighbours_do_not_leak(head_dim, deterministic):
    """Free memory full of NaN and a batch entry full of NaN: the others do not notice."""
    arrays = operands("bfloat16", 3, 200, 333, 4, 2, head_dim)
    run = jax.jit(
        functools.partial(
            gradients.flash_gradients, mask="bottom_right", deterministic=deterministic
        )
    )
    expected = run(*arrays)
    poisoned = [x.at[1].set(jnp.nan) for x in arrays]
    junk = [jnp.full((1 << 22,), jnp.nan, jnp.float32) + i for i in range(16)]
    jax.block_until_ready(junk)
    del junk
    for actual, exact in zip(run(*poisoned), expected, strict=True):
        for entry in (0, 2):
            np.testing.assert_allclose(
                np.asarray(actual[entry], np.float32), np.asarray(exact[entry], np.float32),
                atol=1e-2,
            )  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask", ["full", "bottom_right"])
def test_deterministic_means_bitwise(mask, head_dim):
    arrays = operands("bfloat16", 2, 777, 1023, 6, 2, head_dim)
    run = jax.jit(functools.partial(gradients.flash_gradients, mask=mask, deterministic=True))
    first = run(*arrays)
    mismatches = jnp.zeros((), jnp.int32)
    for _ in range(1000):
        mismatches = determinism.add_mismatches(mismatches, run(*arrays), first)
    assert mismatches == 0


@each_implementation
def test_the_gradient_of_the_drop_in_is_the_kernels(deterministic):
    q, k, v, dout, _ = operands("bfloat16", 2, 300, 300, 4, 2, 64)

    def loss(q, k, v):
        out = eqx_flash.dot_product_attention(
            q, k, v, is_causal=True, implementation="flash", deterministic=deterministic
        )
        return jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
    text = compiled.as_text()
    assert text.count("eqx_flash_forward") and text.count("eqx_flash_backward")
    expected = gradients.flash_gradients(
        q, k, v, dout, jnp.zeros((2, 4, 300)), "top_left", deterministic
    )
    for actual, exact in zip(compiled(q, k, v), expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(exact, np.float32), atol=2e-2
        )


@pytest.mark.slow
@pytest.mark.large
def test_more_than_2_to_the_31_elements_of_scratch():
    """The fp32 accumulator of dQ is the largest array: here 2^31 + 2^28 elements."""
    heads, seq = 9, 2**18
    q = jax.random.normal(jax.random.key(0), (1, seq, heads * 8, 128), jnp.bfloat16)
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 64, 1, 128), jnp.bfloat16)
    grads = gradients.flash_gradients(
        q, k, v, q, jnp.zeros((1, heads * 8, seq)), "full", deterministic=False
    )
    last = gradients.flash_gradients(
        q[:, -128:, -1:], k, v, q[:, -128:, -1:], jnp.zeros((1, 1, 128)), "full",
        deterministic=False,
    )  # fmt: skip
    np.testing.assert_allclose(
        np.asarray(grads[0][:, -128:, -1:], np.float32), np.asarray(last[0], np.float32), atol=1e-2
    )
