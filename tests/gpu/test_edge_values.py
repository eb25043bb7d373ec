# SPDX-License-Identifier: Apache-2.0
"""Scores at the ends of their range, scales of any sign, empty rows, and where NaN may go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import eqx_flash
from eqx_flash import _ffi

pytestmark = pytest.mark.gpu

TILE_HEAD_DIMS = (64, 128, 256)  # one for each size of kernel
each_head_dim = pytest.mark.parametrize("head_dim", TILE_HEAD_DIMS)
each_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES)


# ---- Empty rows ----------------------------------------------------------------------------------


@each_head_dim
@pytest.mark.parametrize("seq_q, seq_k", [(300, 100), (1000, 1), (520, 129)])
def test_rows_without_visible_keys(head_dim, seq_q, seq_k):
    q, k, v = oracle.random_qkv("bfloat16", 2, seq_q, seq_k, 4, 2, head_dim)
    out, lse = oracle.flash(q, k, v, "bottom_right")
    empty = seq_q - seq_k
    assert not np.asarray(out[:, :empty]).any()
    assert np.all(np.asarray(lse[..., :empty]) == -np.inf)
    assert np.isfinite(np.asarray(lse[..., empty:])).all()
    oracle.assert_close(q, k, v, out, lse, "bottom_right")


# ---- Scores --------------------------------------------------------------------------------------


@each_head_dim
@pytest.mark.parametrize("factor", [6.0, 30.0, 400.0])
def test_scores_that_rise_within_a_tile(head_dim, factor):
    """By a little, by more than 30 log2, by what overflows; not every block looks for a maximum."""
    q, k, v = oracle.random_qkv("bfloat16", 2, 200, 1500, 2, 1, head_dim)
    q = (q.astype(np.float32) * factor).astype(q.dtype)
    for mask in ("full", "bottom_right"):
        out, lse = oracle.flash(q, k, v, mask)
        oracle.assert_close(q, k, v, out, lse, mask)


@each_dtype
@each_head_dim
def test_one_hot(dtype, head_dim):
    """Logits of 1e4 and 0: each query returns one value vector, to the bit."""
    eye = 100 * np.eye(head_dim, dtype=oracle.DTYPES[dtype])
    order = np.random.default_rng(0).permutation(head_dim)
    q, k = eye[order][None, :, None], eye[None, :, None]
    v = oracle.random_qkv(dtype, 1, 1, head_dim, 1, 1, head_dim)[2]
    out, lse = oracle.flash(q, k, v, scale=1.0)
    oracle.assert_bitwise_equal(out, v[:, order])
    np.testing.assert_allclose(lse, 1e4, rtol=oracle.LSE_RELATIVE)


@each_head_dim
@pytest.mark.parametrize(
    "logit",
    [
        0.0,
        -1e4,
        1e8,
        -1e8,
        # The scaled row max is rounded to float32 before it is subtracted; from about 2e9 on, its
        # rounding alone leaves the range of exp2. FlashAttention's kernels share this limit.
        pytest.param(-1e30, marks=pytest.mark.xfail(reason="logit beyond 2e9", strict=False)),
    ],
)
def test_equal_scores(head_dim, logit):
    q, k, v = oracle.random_qkv("bfloat16", 2, 200, 333, 2, 1, head_dim)
    if logit:  # a power of two: all scores are exactly equal, in whatever order they are summed
        root = 2 ** np.round(np.log2(abs(logit) * head_dim**-0.5) / 2)
        q, k = np.full_like(q, root), np.full_like(k, np.copysign(root, logit))
    else:
        q = np.zeros_like(q)
    for mask in ("full", "top_left"):
        out, lse = oracle.flash(q, k, v, mask)
        assert np.isfinite(np.asarray(lse)).all()
        # At 1e8, neighbouring float32 are 8 apart: of lse only the relative error means something.
        found = oracle.errors(q, k, v, out, lse, mask)
        assert found.out <= found.bound, found


@each_head_dim
@pytest.mark.parametrize("step", [7.9, 8.1, 60.0])
@pytest.mark.parametrize("direction", ["rising", "falling"])
def test_row_max_moves_from_block_to_block(head_dim, step, direction):
    """By `step` powers of two: around 2^8, lazily rescaled outputs would take another branch."""
    block = {tile["block_n"] for tile in _ffi.tile_config() if tile["head_dim"] == head_dim}.pop()
    # float16: the criterion would forgive much more to bfloat16 scores this large.
    q, k, v = oracle.random_qkv("float16", 1, 256, 9 * block - 5, 2, 2, head_dim)
    level = step * (np.arange(k.shape[1]) // block) * (1 if direction == "rising" else -1)
    # q's first component times k's carries the level; the others keep the scores random.
    q[..., 0] = head_dim**0.5 * np.log(2)
    k[..., 0] = level[None, :, None]
    for mask in oracle.MASKS:
        oracle.assert_close(q, k, v, *oracle.flash(q, k, v, mask), mask=mask)


@each_head_dim
def test_denormals(head_dim):
    q, k, v = oracle.random_qkv("float16", 1, 130, 140, 2, 2, head_dim)
    tiny = np.float16(2e-6)  # the smallest normal float16 is 6e-5
    oracle.assert_close(q * tiny, k, v, *oracle.flash(q * tiny, k, v))
    oracle.assert_close(q, k, v * tiny, *oracle.flash(q, k, v * tiny))
    # float32's denormals are bfloat16's too: all scores are 0, and the values may be flushed.
    q, k, v = oracle.random_qkv("bfloat16", 1, 130, 140, 2, 2, head_dim)
    least = oracle.DTYPES["bfloat16"](1e-39)
    oracle.assert_close(q * least, k, v, *oracle.flash(q * least, k, v))
    assert np.abs(np.asarray(oracle.flash(q, k, v * least)[0], np.float32)).max() < 1e-38


# ---- Scales --------------------------------------------------------------------------------------


@each_head_dim
@pytest.mark.parametrize("scale", [0.0, -0.0, -0.2, 1.0, 1e-20, -1e-45])
def test_scale(head_dim, scale):
    q, k, v = oracle.random_qkv("bfloat16", 2, 200, 150, 2, 2, head_dim)
    for mask in oracle.MASKS:
        oracle.assert_close(q, k, v, *oracle.flash(q, k, v, mask, scale), mask=mask, scale=scale)
    drop_in = eqx_flash.dot_product_attention(q, k, v, scale=scale, is_causal=True)
    oracle.assert_bitwise_equal(drop_in, oracle.flash(q, k, v, "top_left", scale)[0])


def test_traced_scale():
    q, k, v = oracle.random_qkv("bfloat16", 2, 200, 150, 2, 2, 64)

    @jax.jit
    def scaled(scale):
        return eqx_flash.dot_product_attention(
            q, k, v, scale=scale, implementation="flash", return_residual=True
        )

    for scale in (-0.5, 0.0, 0.25):  # powers of two: scaling q beforehand rounds nothing
        out, lse = scaled(jnp.float32(scale))
        oracle.assert_close(q, k, v, out, jnp.swapaxes(lse, 1, 2), scale=scale)


# ---- NaN and infinity ----------------------------------------------------------------------------


def on_host(results) -> list[np.ndarray]:
    """Also waits, so that the operands may be overwritten."""
    return [np.array(x) for x in results]


@each_head_dim
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_query_spoils_its_own_row(head_dim, value):
    q, k, v = oracle.random_qkv("bfloat16", 2, 200, 150, 4, 2, head_dim)
    clean = on_host(oracle.flash(q, k, v))
    q[1, 77, 2, 5] = value
    out, lse = on_host(oracle.flash(q, k, v))
    assert np.isnan(out[1, 77, 2]).all()
    assert not np.isfinite(lse[1, 2, 77])
    out[1, 77, 2], lse[1, 2, 77] = clean[0][1, 77, 2], clean[1][1, 2, 77]
    oracle.assert_bitwise_equal(out, clean[0])
    oracle.assert_bitwise_equal(lse, clean[1])


@each_head_dim
@pytest.mark.parametrize("key", [0, 63, 64, 130, 259])
def test_nan_key_spoils_the_rows_that_see_it(head_dim, key):
    q, k, v = oracle.random_qkv("bfloat16", 2, 260, 260, 4, 2, head_dim)
    clean = on_host(oracle.flash(q, k, v, "top_left"))
    k[0, key, 1] = np.nan
    out, lse = on_host(oracle.flash(q, k, v, "top_left"))
    out, clean_out = out.swapaxes(1, 2), clean[0].swapaxes(1, 2)  # [batch, heads, seq_q, head_dim]
    seen = np.zeros(lse.shape, bool)
    seen[0, 2:, key:] = True  # query heads 2 and 3 share key head 1
    np.testing.assert_array_equal(np.isnan(lse), seen)
    np.testing.assert_array_equal(np.isnan(out).all(-1), seen)
    oracle.assert_bitwise_equal(lse[~seen], clean[1][~seen])
    oracle.assert_bitwise_equal(out[~seen], clean_out[~seen])


@each_head_dim
def test_minus_infinity_hides_a_key(head_dim):
    """A score of -inf is an ordinary score: its weight is 0."""
    q, k, v = oracle.random_qkv("bfloat16", 1, 200, 150, 2, 2, head_dim)
    q[..., 0] = np.abs(q[..., 0]) + 1
    k[:, [0, 70, 149], :, 0] = -np.inf
    out, lse = oracle.flash(q, k, v)
    assert np.isfinite(np.asarray(lse)).all()
    oracle.assert_close(q, k, v, out, lse)


@each_head_dim
@pytest.mark.parametrize("mask", oracle.MASKS)
def test_nan_neighbours(head_dim, mask):
    """Batch entries and heads full of NaN lie on all sides of the clean ones."""
    q, k, v = oracle.random_qkv("bfloat16", 3, 130, 201, 6, 3, head_dim)
    clean = on_host(oracle.flash(q, k, v, mask))
    for x in (q, k, v):
        x[[0, 2]] = np.nan
    for x, heads in ((q, [0, 1, 4, 5]), (k, [0, 2]), (v, [0, 2])):
        x[:, :, heads] = np.nan
    out, lse = oracle.flash(q, k, v, mask)
    oracle.assert_bitwise_equal(out[1, :, 2:4], clean[0][1, :, 2:4])
    oracle.assert_bitwise_equal(lse[1, 2:4], clean[1][1, 2:4])


@each_head_dim
def test_nan_in_unreachable_key_blocks(head_dim):
    """Causal, with more keys than queries: blocks of keys that no query sees are not even read."""
    q, k, v = oracle.random_qkv("bfloat16", 2, 100, 700, 2, 2, head_dim)
    clean = on_host(oracle.flash(q, k, v, "top_left"))
    k[:, 512:], v[:, 512:] = np.nan, np.nan
    for result, expected in zip(oracle.flash(q, k, v, "top_left"), clean, strict=True):
        oracle.assert_bitwise_equal(result, expected)


# ---- Unwritten results ---------------------------------------------------------------------------

POISONED_SHAPES = [(1, 1), (63, 65), (113, 203), (799, 3), (1023, 1024), (2049, 511)]


@pytest.mark.parametrize("head_dim", [40, 64, 128, 192, 256])
@pytest.mark.parametrize("seq_q, seq_k", POISONED_SHAPES)
def test_every_element_is_written(head_dim, seq_q, seq_k):
    """The results live in memory that held NaN."""
    q, k, v = map(jnp.asarray, oracle.random_qkv("float16", 3, seq_q, seq_k, 3, 3, head_dim))
    for mask in oracle.MASKS:
        out, lse = into_nan(functools.partial(oracle.flash, mask=mask), q, k, v)
        assert np.isfinite(np.asarray(out)).all()
        assert not np.isnan(np.asarray(lse)).any()


def into_nan(fn, *arguments):
    """`fn(*arguments)`, its results in memory that holds NaN: donated arrays of their shapes."""
    nans = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.eval_shape(lambda: fn(*arguments))]
    program = jax.jit(lambda arguments, nans: fn(*arguments), donate_argnums=1, keep_unused=True)
    addresses = [x.unsafe_buffer_pointer() for x in nans]
    results = program(arguments, nans)
    assert [x.unsafe_buffer_pointer() for x in results] == addresses
    return results
