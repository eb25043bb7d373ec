# SPDX-License-Identifier: Apache-2.0
"""The drop-in against `jax.nn.dot_product_attention`: same results, same refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    Shape,
    assert_as_accurate,
    generator,
    plain_attention,
    quick_compilation,
    random_qkv,
    temporary_bytes,
    visible,
)

from eqx_flash import dot_product_attention
from eqx_flash._spec import AttentionSpec


def theirs(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):  # jax.nn relies on it
        return jax.nn.dot_product_attention(*args, implementation="xla", **kwargs)


ours = functools.partial(dot_product_attention, implementation="xla")

SHAPE = Shape(batch=2, seq_q=9, seq_k=13, heads=4, heads_k=2, head_dim=8)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]), quick_compilation():
        yield


def assert_all_close(results, expected):
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, results, expected)


# ---- Results -------------------------------------------------------------------------------------


def bias(*shape):
    return {"bias": shape}


def mask(*shape):
    return {"mask": shape}


LENGTHS = {"query_seq_lengths", "key_value_seq_lengths"}
SELF = Shape(2, 11, 11, 2, 2, 8)
SINGLE = Shape(1, 9, 13, 4, 1, 8)

# Shape and arguments; bias and mask are given by their shape.
CASES = {
    "plain": (SHAPE, {}),
    "no_groups": (SELF, {}),
    "one_key_value_head": (SINGLE, {}),
    "scale": (SHAPE, {"scale": 0.7}),
    "scale_numpy": (SHAPE, {"scale": np.float32(0.7)}),
    "scale_array": (SHAPE, {"scale": jnp.float32(0.7)}),
    "scale_negative": (SHAPE, {"scale": -2}),
    "scale_0": (SHAPE, {"scale": 0.0}),
    "causal_more_keys": (SHAPE, {"is_causal": True}),
    "causal_more_queries": (Shape(2, 13, 9, 4, 2, 8), {"is_causal": True}),
    "bias": (SHAPE, bias(2, 4, 9, 13)),
    "bias_1": (SHAPE, bias(1, 1, 1, 1)),
    "bias_of_heads": (SHAPE, bias(1, 4, 1, 1)),
    "bias_rank_3": (SHAPE, bias(4, 9, 13)),
    "bias_rank_2": (SHAPE, bias(9, 1)),
    "mask": (SHAPE, mask(2, 4, 9, 13)),
    "mask_of_keys": (SHAPE, mask(2, 1, 1, 13)),
    "mask_rank_3": (SHAPE, mask(1, 9, 13)),
    "mask_rank_1": (SHAPE, mask(13)),
    "bias_and_mask": (SHAPE, bias(1, 4, 9, 13) | mask(2, 1, 9, 13)),
    "query_lengths": (SHAPE, {"query_seq_lengths": [9, 4]}),
    "key_lengths": (SHAPE, {"key_value_seq_lengths": [3, 13]}),
    "window": (SHAPE, {"local_window_size": 2}),
    "window_left_right": (SHAPE, {"local_window_size": (5, 1)}),
    "window_causal": (SELF, {"local_window_size": (3, 2), "is_causal": True}),
    "window_0": (SHAPE, {"local_window_size": 0}),
    "window_wide": (SHAPE, {"local_window_size": (100, 100)}),
    "everything": (
        SHAPE,
        bias(2, 1, 9, 13)
        | mask(1, 4, 9, 13)
        | {
            "scale": 0.5,
            "is_causal": True,
            "local_window_size": (6, 3),
            "query_seq_lengths": [9, 7],
            "key_value_seq_lengths": [12, 6],
        },
    ),
}


def prepare(key, shape, arguments):
    """(query, key, value), the arguments to differentiate in, and the others."""
    rng = generator(key)
    others = dict(arguments)
    differentiable = {}
    if "bias" in others:
        differentiable["bias"] = jnp.asarray(rng.standard_normal(others.pop("bias")), jnp.float32)
    if isinstance(others.get("scale"), jax.Array):
        differentiable["scale"] = others.pop("scale")
    if "mask" in others:
        others["mask"] = jnp.asarray(rng.random(others["mask"]) < 0.7)
    for name in LENGTHS & others.keys():
        others[name] = jnp.array(others[name], jnp.int32)
    return random_qkv(key, shape), differentiable, others


def seen_queries(shape, arguments):
    """[batch, seq_q, heads]: which queries may see a key."""
    left_right = arguments.get("local_window_size")
    spec = AttentionSpec(
        1.0,
        causal=arguments.get("is_causal", False),
        window=(left_right, left_right) if isinstance(left_right, int) else left_right,
    )
    seen = np.broadcast_to(visible(spec, shape.seq_q, shape.seq_k), shape.scores)
    seen = seen & np.asarray(arguments.get("mask", True))
    lengths = np.reshape(arguments.get("query_seq_lengths", shape.seq_q), (-1, 1, 1, 1))
    seen = seen & (np.arange(shape.seq_q)[:, None] < lengths)
    lengths = np.reshape(arguments.get("key_value_seq_lengths", shape.seq_k), (-1, 1, 1, 1))
    seen = seen & (np.arange(shape.seq_k) < lengths)
    return np.swapaxes(seen.any(axis=-1), 1, 2)


@pytest.mark.parametrize("shape, arguments", CASES.values(), ids=CASES)
def test_same_as_jax_nn(shape, arguments, getkey):
    qkv, differentiable, others = prepare(getkey(), shape, arguments)
    seen = seen_queries(shape, others)

    @functools.partial(jax.jit, static_argnums=0)
    def results(attention, qkv, differentiable):
        def loss(qkv, differentiable):
            out, lse = attention(*qkv, **differentiable, **others, return_residual=True)
            # Only of queries that see a key: jax.nn gives the others the mean of value.
            weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
            return jnp.sum(jnp.where(seen[..., None], out * weights, 0)), (out, lse)

        return jax.grad(loss, (0, 1), has_aux=True)(qkv, differentiable)

    grads, (out, lse) = results(ours, qkv, differentiable)
    expected_grads, (expected_out, expected_lse) = results(theirs, qkv, differentiable)
    np.testing.assert_allclose(out[seen], expected_out[seen], atol=1e-5)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=1e-5)
    assert_all_close(grads, expected_grads)
    assert (out[~seen] == 0).all() and np.isneginf(lse[~seen]).all()


@pytest.mark.parametrize(
    "names", [(), ("bias",), ("mask", "is_causal"), ("query_seq_lengths", "key_value_seq_lengths")]
)
def test_without_batch(names, getkey):
    shape = Shape(1, 9, 13, 4, 2, 8)
    rng = generator(getkey())
    q, k, v = (x[0] for x in random_qkv(getkey(), shape))
    available = {
        "bias": jnp.asarray(rng.standard_normal((4, 9, 13)), jnp.float32),
        "mask": jnp.asarray(rng.random((9, 13)) < 0.7).at[:, 0].set(True),
        "is_causal": True,
        "query_seq_lengths": jnp.array([5], jnp.int32),
        "key_value_seq_lengths": jnp.array([8], jnp.int32),
    }
    arguments = {name: available[name] for name in names}
    out, lse = ours(q, k, v, **arguments, return_residual=True)
    expected, expected_lse = theirs(q, k, v, **arguments, return_residual=True)
    assert out.shape == (9, 4, 8) and lse.shape == (9, 4)
    seen = np.isfinite(lse)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=1e-5)


def test_numpy_and_lists(getkey):
    q, k, v = (np.asarray(x) for x in random_qkv(getkey(), SHAPE))
    rng = generator(getkey())
    arguments = {
        "bias": rng.standard_normal((1, 4, 9, 13)).astype(np.float32),
        "mask": (rng.random((2, 1, 9, 13)) < 0.7) | (np.arange(13) == 0),
        "query_seq_lengths": np.array([9, 5]),
        "key_value_seq_lengths": [7, 13],
    }
    out = ours(q.tolist(), k, v, **arguments)
    assert isinstance(out, jax.Array)
    np.testing.assert_allclose(out, theirs(q.tolist(), k, v, **arguments), atol=1e-5)


def test_bias_of_integers(getkey):
    qkv = random_qkv(getkey(), SHAPE)
    bias = jnp.arange(13).reshape(1, 1, 1, 13) % 3

    def grads(attention):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(attention(*qkv, bias)), (0, 1, 2)))(*qkv)

    assert_all_close(grads(ours), grads(theirs))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "scale, implementation", [(0.07, None), (jnp.float32(0.07), "xla")], ids=["static", "traced"]
)
def test_low_precision(dtype, scale, implementation, getkey):
    low = random_qkv(getkey(), Shape(2, 65, 80, 4, 2, 64), dtype)
    exact = [x.astype(jnp.float32) for x in low]

    def results(attention, qkv):
        def loss(*qkv):
            out = attention(*qkv)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)
        return [out, *grads]

    def attend(*qkv):
        return dot_product_attention(
            *qkv, scale=scale, is_causal=True, implementation=implementation
        )

    def plain(*qkv):  # jax.nn has no float16 on a CPU
        return plain_attention(AttentionSpec(0.07, causal=True), *qkv)[0]

    mine = results(attend, low)
    assert [x.dtype for x in mine] == [dtype] * 4
    for x, rough, best in zip(mine, results(plain, low), results(plain, exact), strict=True):
        assert_as_accurate(x, rough, best)


def test_float64(getkey):
    with jax.enable_x64(True):
        qkv = random_qkv(getkey(), SHAPE, jnp.float64)
        out, lse = ours(*qkv, return_residual=True)
        assert out.dtype == lse.dtype == jnp.float64
        # The softmax of jax.nn is in float32.
        np.testing.assert_allclose(out, theirs(*qkv), atol=1e-6)


def test_vmap_over_every_array(getkey):
    rng = generator(getkey())
    pairs = [random_qkv(getkey(), SHAPE) for _ in range(2)]
    qkv = [jnp.stack(xs, axis) for axis, xs in enumerate(zip(*pairs, strict=True))]
    bias = jnp.asarray(rng.standard_normal((2, 1, 4, 1, 13)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, 9, 13, 2)) < 0.7).at[..., 0, :].set(True)
    lengths = jnp.array([[9, 13], [3, 7]], jnp.int32)

    def results(attention):
        def attend(q, k, v, bias, mask, lengths):
            return attention(q, k, v, bias, mask, key_value_seq_lengths=lengths)

        return jax.jit(jax.vmap(attend, (0, 1, 2, 0, -1, 0)))(*qkv, bias, mask, lengths)

    np.testing.assert_allclose(results(ours), results(theirs), atol=1e-5)


# ---- Beyond jax.nn -------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_q, seq_k", [(9, 13), (13, 9)])
@pytest.mark.parametrize(
    "causal, window", [(True, None), (False, (2, None)), (False, (None, 1)), (True, (3, 0))]
)
def test_bottom_right_and_one_sided_windows(causal, window, seq_q, seq_k, getkey):
    shape = Shape(1, seq_q, seq_k, 2, 1, 8)
    qkv = random_qkv(getkey(), shape)
    attend = functools.partial(
        ours,
        is_causal=causal,
        local_window_size=window,
        causal_alignment="bottom_right",
        return_residual=True,
    )
    out, lse = jax.jit(attend)(*qkv)
    spec = AttentionSpec(1.0, causal, "bottom_right", window)
    mask = visible(spec, seq_q, seq_k)
    seen = mask.any(axis=-1)
    plain = functools.partial(theirs, mask=mask, return_residual=True)
    expected, expected_lse = jax.jit(plain)(*qkv)
    np.testing.assert_allclose(out[:, seen], expected[:, seen], atol=1e-5)
    np.testing.assert_allclose(lse[:, seen], expected_lse[:, seen], atol=1e-5)
    assert (out[:, ~seen] == 0).all() and np.isneginf(lse[:, ~seen]).all()


def test_residual_is_differentiable(getkey):
    qkv = random_qkv(getkey(), SHAPE)
    bias = jnp.asarray(generator(getkey()).standard_normal((1, 4, 9, 13)), jnp.float32)

    def loss(q, k, v, bias):
        _, lse = ours(q, k, v, bias, return_residual=True)
        return jnp.sum(jnp.sin(lse))

    def plain(q, k, v, bias):
        scores = 8**-0.5 * jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2)) + bias
        return jnp.sum(jnp.sin(jax.nn.logsumexp(scores, axis=-1))) + 0 * jnp.sum(v)

    grads = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*qkv, bias) for f in (loss, plain))
    assert_all_close(*grads)


def test_residual_of_low_precision_is_float32(getkey):
    _, lse = ours(*random_qkv(getkey(), SHAPE, jnp.bfloat16), return_residual=True)
    assert lse.dtype == jnp.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {"bias": jnp.full((1, 1, 9, 1), -jnp.inf).at[:, :, 5:].set(0)},
        {"mask": jnp.zeros((9, 1), bool).at[5:].set(True)},
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ],
    ids=["bias", "mask", "causal"],
)
def test_queries_that_see_no_key(arguments, getkey):
    qkv = random_qkv(getkey(), Shape(1, 9, 4, 2, 2, 8))

    def loss(*qkv):
        out, lse = ours(*qkv, **arguments, return_residual=True)
        return jnp.sum(out**2) + jnp.sum(jnp.exp(lse)), (out, lse)

    (dq, *others), (out, lse) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    assert (out[:, :5] == 0).all() and np.isneginf(lse[:, :5]).all() and (dq[:, :5] == 0).all()
    assert np.isfinite(lse[:, 5:]).all() and all(np.isfinite(x).all() for x in (dq, *others))
    # In jax.nn such a query gets the mean of value.
    if "causal_alignment" not in arguments and "bias" not in arguments:
        mean = jnp.broadcast_to(jnp.mean(qkv[2], axis=1, keepdims=True), (1, 5, 2, 8))
        np.testing.assert_allclose(theirs(*qkv, **arguments)[:, :5], mean, atol=1e-6)


def test_memory_is_linear():
    """The scores of 32k tokens are 4 GiB a head."""
    x = jax.ShapeDtypeStruct((1, 32768, 2, 64), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((32768,), jnp.bool_)

    def loss(q, k, v, mask):
        return jnp.sum(ours(q, k, v, mask=mask, is_causal=True).astype(jnp.float32))

    assert temporary_bytes(jax.value_and_grad(loss, (0, 1, 2)), x, x, x, mask) < 2**28


# ---- Refusals ------------------------------------------------------------------------------------


def zeros(*shape, dtype=jnp.float32):
    return jnp.zeros(shape, dtype)


Q, K = zeros(2, 9, 4, 8), zeros(2, 13, 2, 8)

# What jax.nn refuses, and so do we.
REFUSED = {
    "no_query": {"query": None},
    "query_of_text": {"query": "query"},
    "query_rank_5": {"query": zeros(1, 2, 9, 4, 8)},
    "key_rank_5": {"key": zeros(1, 2, 13, 2, 8)},
    "value_rank_3": {"value": zeros(13, 2, 8)},
    "key_without_batch": {"key": zeros(13, 2, 8), "value": zeros(13, 2, 8)},
    "batch_of_query": {"query": zeros(3, 9, 4, 8)},
    "batch_of_1": {"query": zeros(1, 9, 4, 8)},
    "batch_of_value": {"value": zeros(3, 13, 2, 8)},
    "length_of_value": {"value": zeros(2, 12, 2, 8)},
    "heads_of_value": {"value": zeros(2, 13, 4, 8)},
    "head_dim_of_query": {"query": zeros(2, 9, 4, 16)},
    "head_dim_of_value": {"value": zeros(2, 13, 2, 16)},
    "heads_not_a_multiple": {"query": zeros(2, 9, 3, 8)},
    "fewer_heads_than_keys": {"query": zeros(2, 9, 1, 8)},
    "no_key_heads": {"key": zeros(2, 13, 0, 8), "value": zeros(2, 13, 0, 8)},
    "dtype_of_query": {"query": zeros(2, 9, 4, 8, dtype=jnp.bfloat16)},
    "dtype_of_key": {"key": zeros(2, 13, 2, 8, dtype=jnp.float16)},
    "dtype_of_value": {"value": zeros(2, 13, 2, 8, dtype=jnp.bfloat16)},
    "bias_rank_5": {"bias": zeros(1, 2, 4, 9, 13)},
    "bias_batch": {"bias": zeros(3, 1, 1, 1)},
    "bias_heads": {"bias": zeros(1, 3, 1, 1)},
    "bias_key_heads": {"bias": zeros(1, 2, 1, 1)},
    "bias_queries": {"bias": zeros(1, 1, 8, 1)},
    "bias_keys": {"bias": zeros(1, 1, 1, 12)},
    "bias_transposed": {"bias": zeros(2, 4, 13, 9)},
    "bias_of_text": {"bias": "bias"},
    "mask_float": {"mask": zeros(1, 1, 9, 13)},
    "mask_integers": {"mask": zeros(1, 1, 9, 13, dtype=jnp.int32)},
    "mask_rank_5": {"mask": zeros(1, 2, 4, 9, 13, dtype=bool)},
    "mask_batch": {"mask": zeros(3, 1, 1, 1, dtype=bool)},
    "mask_heads": {"mask": zeros(1, 3, 1, 1, dtype=bool)},
    "mask_key_heads": {"mask": zeros(1, 2, 1, 1, dtype=bool)},
    "mask_queries": {"mask": zeros(1, 1, 10, 1, dtype=bool)},
    "mask_keys": {"mask": zeros(1, 1, 1, 14, dtype=bool)},
    "query_lengths_float": {"query_seq_lengths": zeros(2)},
    "query_lengths_int8": {"query_seq_lengths": zeros(2, dtype=jnp.int8)},
    "query_lengths_batch": {"query_seq_lengths": zeros(3, dtype=jnp.int32)},
    "query_lengths_rank_2": {"query_seq_lengths": zeros(2, 1, dtype=jnp.int32)},
    "query_lengths_scalar": {"query_seq_lengths": 5},
    "key_lengths_float": {"key_value_seq_lengths": zeros(2)},
    "key_lengths_uint32": {"key_value_seq_lengths": zeros(2, dtype=jnp.uint32)},
    "key_lengths_batch": {"key_value_seq_lengths": zeros(1, dtype=jnp.int32)},
    "key_lengths_rank_0": {"key_value_seq_lengths": zeros(dtype=jnp.int32)},
    "window_of_3": {"local_window_size": (1, 2, 3)},
    "window_of_1": {"local_window_size": (1,)},
    "window_float": {"local_window_size": 2.0},
    "window_text": {"local_window_size": "12"},
    "scale_text": {"scale": "large"},
    "scale_vector": {"scale": zeros(3)},
    "implementation": {"implementation": "flashy"},
    "unknown_argument": {"dropout": 0.1},
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_refuses_what_jax_nn_refuses(arguments):
    call = {"query": Q, "key": K, "value": K, "implementation": "xla"} | arguments
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(Exception):  # noqa: B017, as jax.nn raises what happens to come
            jax.nn.dot_product_attention(**call)
        with pytest.raises((ValueError, TypeError)):
            dot_product_attention(**call)


def test_arguments_by_keyword_only():
    for attention in (ours, theirs):
        with pytest.raises(TypeError):
            attention(Q, K, K, None, None, 0.5)  # pyright: ignore[reportCallIssue]
