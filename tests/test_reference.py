# SPDX-License-Identifier: Apache-2.0
"""The blockwise reference: values, gradients, empty rows, transformations, memory.

Most tests cut the scores into tiles of at most 16 x 16, so that small inputs have many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    SHAPES,
    Shape,
    assert_as_accurate,
    generator,
    plain_attention,
    quick_compilation,
    random_qkv,
    temporary_bytes,
    visible,
)
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from eqx_flash import _reference
from eqx_flash._spec import AttentionSpec

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def small_tiles(request, monkeypatch):
    if "full_size_tiles" in request.fixturenames:
        yield
        return
    monkeypatch.setattr(_reference, "_MAX_BLOCK", 16)
    with quick_compilation():
        yield


@pytest.fixture
def full_size_tiles():
    """Leaves tiles, and the optimisation of compiled code, as users have them."""


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield jnp.float64


# Forward and backward tied together, as `_primitive` does.
attend = jax.custom_vjp(_reference.forward, nondiff_argnums=(0,))


def attend_fwd(spec, q, k, v, *extras):
    out, lse = _reference.forward(spec, q, k, v, *extras)
    return (out, lse), (q, k, v, out, lse, extras)


def attend_bwd(spec, residuals, cotangents):
    *arrays, extras = residuals
    return *_reference.backward(spec, *arrays, *cotangents, *extras), None, None, None


attend.defvjp(attend_fwd, attend_bwd)
forward = jax.jit(_reference.forward, static_argnums=0)


def make_extras(key, shape, *names, dtype=jnp.float32) -> list:
    """bias, mask, query_lengths, key_value_lengths; those not in `names` are None."""
    rng = generator(key)
    batch, heads, seq_q, seq_k = shape.scores
    # Each axis of a bias or mask is full or 1.
    shapes = {
        "bias": shape.scores,
        "head_bias": (1, heads, 1, seq_k),
        "row_bias": (batch, 1, seq_q, 1),
        "mask": shape.scores,
        "key_mask": (batch, 1, 1, seq_k),
        "head_mask": (1, heads, seq_q, 1),
    }
    extras = dict.fromkeys(["bias", "mask", "query_lengths", "key_value_lengths"])
    for name in names:
        if name.endswith("bias"):
            extras["bias"] = jnp.asarray(rng.standard_normal(shapes[name]), dtype)
        elif name.endswith("mask"):
            extras["mask"] = jnp.asarray(rng.random(shapes[name]) < 0.6)
        else:
            longest = seq_q if name == "query_lengths" else seq_k
            extras[name] = jnp.asarray(rng.integers(longest // 2, longest + 1, batch), jnp.int32)
    return list(extras.values())


def value_and_grads(fn, spec, q, k, v, bias=None, *extras):
    """Values, and gradients in q, k, v, bias of a loss that weighs every finite result."""
    differentiable = [q, k, v] + ([] if bias is None else [bias])

    def loss(*arrays):
        out, lse = fn(spec, *arrays[:3], *(arrays[3:] or [None]), *extras)
        weights = jnp.cos(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        lse_weights = jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        finite_lse = jnp.where(jnp.isfinite(lse), lse, 0)
        total = jnp.sum(weights * out.astype(lse.dtype)) + jnp.sum(lse_weights * finite_lse)
        return total, (out, lse)

    argnums = tuple(range(len(differentiable)))
    grad = jax.grad(loss, argnums, has_aux=True)
    grads, values = jax.jit(grad)(*differentiable)
    return *values, *grads


def assert_all_close(ours, theirs, **tolerance):
    for x, y in zip(ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, **tolerance)


# ---- Values and gradients ------------------------------------------------------------------------

SPECS = {
    "full": AttentionSpec(0.3),
    "scale_0": AttentionSpec(0.0),
    "scale_negative": AttentionSpec(-0.7, causal=True),
    "causal": AttentionSpec(0.3, causal=True),
    "causal_bottom_right": AttentionSpec(0.3, causal=True, causal_alignment="bottom_right"),
    "window": AttentionSpec(0.3, window=(5, 20)),
    "window_left": AttentionSpec(0.3, window=(3, None)),
    "window_right": AttentionSpec(0.3, window=(None, 2), causal_alignment="bottom_right"),
    "window_causal": AttentionSpec(
        0.3, causal=True, window=(4, 9), causal_alignment="bottom_right"
    ),
    "window_0": AttentionSpec(0.3, window=(0, 0)),
    "window_huge": AttentionSpec(0.3, window=(2**40, 2**31 - 1)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_exact_by_spec(spec, float64, getkey):
    args = (spec, *random_qkv(getkey(), SHAPES["grouped"], float64))
    ours = value_and_grads(attend, *args)
    theirs = value_and_grads(plain_attention, *args)
    assert_all_close(ours, theirs, atol=1e-11)


EXTRAS = [
    ["bias"],
    ["head_bias", "key_mask"],
    ["row_bias", "head_mask"],
    ["mask"],
    ["query_lengths"],
    ["key_value_lengths"],
    ["bias", "mask", "query_lengths", "key_value_lengths"],
]


@pytest.mark.parametrize("names", EXTRAS, ids="+".join)
def test_exact_by_extras(names, float64, getkey):
    shape = SHAPES["grouped"]
    extras = make_extras(getkey(), shape, *names, dtype=float64)
    args = (SPECS["causal_bottom_right"], *random_qkv(getkey(), shape, float64), *extras)
    ours = value_and_grads(attend, *args)
    theirs = value_and_grads(plain_attention, *args)
    assert_all_close(ours, theirs, atol=1e-11)


@each_shape
def test_exact_by_shape(shape, float64, getkey):
    extras = make_extras(getkey(), shape, "bias", "mask", "key_value_lengths", dtype=float64)
    args = (SPECS["causal"], *random_qkv(getkey(), shape, float64), *extras)
    ours = value_and_grads(attend, *args)
    theirs = value_and_grads(plain_attention, *args)
    assert_all_close(ours, theirs, atol=1e-11)


@pytest.mark.usefixtures("full_size_tiles")
def test_full_size_tiles(getkey):
    shape = Shape(1, 701, 1100, 2, 1, 8)  # 2 x 3 tiles, whose sides divide neither length
    extras = make_extras(getkey(), shape, "bias", "mask")
    args = (SPECS["causal_bottom_right"], *random_qkv(getkey(), shape), *extras)
    ours = value_and_grads(attend, *args)
    theirs = value_and_grads(plain_attention, *args)
    assert_all_close(ours, theirs, atol=1e-4)


def test_bias_keeps_its_dtype(getkey):
    shape = SHAPES["square"]
    arrays = random_qkv(getkey(), shape)
    bias, *_ = make_extras(getkey(), shape, "head_bias", dtype=jnp.bfloat16)
    *_, dbias = value_and_grads(attend, SPECS["full"], *arrays, bias)
    *_, expected = value_and_grads(attend, SPECS["full"], *arrays, bias.astype(jnp.float32))
    assert dbias.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dbias, expected.astype(jnp.bfloat16))


def test_matches_jax_nn(getkey):
    shape = SHAPES["grouped"]
    q, k, v = random_qkv(getkey(), shape)
    bias, mask, *lengths = make_extras(
        getkey(), shape, "bias", "mask", "query_lengths", "key_value_lengths"
    )
    spec = AttentionSpec(0.2, causal=True, window=(10, 20))
    out, lse = forward(spec, q, k, v, bias, mask, *lengths)
    expected, expected_lse = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias,
        mask,
        scale=0.2,
        is_causal=True,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        local_window_size=(10, 20),
        return_residual=True,
    )
    # Where a query sees no key, jax.nn has the mean of v.
    lse = jnp.swapaxes(lse, 1, 2)
    seen = np.isfinite(lse)
    assert 0.2 < seen.mean() < 1
    np.testing.assert_allclose(out[seen], expected[seen], atol=1e-5)
    np.testing.assert_allclose(lse[seen], expected_lse[seen], atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_as_accurate_as_the_plain_formula(dtype, getkey):
    shape = Shape(2, 100, 130, 4, 2, 64)
    low = random_qkv(getkey(), shape, dtype)
    exact = [x.astype(jnp.float32) for x in low]
    spec = AttentionSpec(64**-0.5, causal=True)
    ours = value_and_grads(attend, spec, *low)
    plain = value_and_grads(plain_attention, spec, *low)
    exact = value_and_grads(plain_attention, spec, *exact)
    assert [x.dtype for x in ours] == [dtype, jnp.float32, dtype, dtype, dtype]
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert_as_accurate(x, y, z)


# ---- Derivatives of derivatives ------------------------------------------------------------------


def small_problem(key, dtype):
    shape = Shape(1, 5, 7, 2, 1, 3)
    bias, *rest = make_extras(key, shape, "head_bias", "mask", dtype=dtype)
    return [*random_qkv(key, shape, dtype), bias], rest


def test_finite_differences_to_second_order(float64, getkey, monkeypatch):
    monkeypatch.setattr(_reference, "_MAX_BLOCK", 4)
    spec = SPECS["causal_bottom_right"]
    arrays, (mask, *_) = small_problem(getkey(), float64)

    @jax.jit
    def fn(*arrays):
        out, lse = attend(spec, *arrays, mask)
        return out, jnp.where(jnp.isfinite(lse), lse, 0)

    check_grads(fn, arrays, order=2, modes=["rev"])


def test_forward_can_be_differentiated_itself(float64, getkey):
    shape = SHAPES["shared"]
    extras = make_extras(getkey(), shape, "bias", "mask", dtype=float64)
    args = (SPECS["causal_bottom_right"], *random_qkv(getkey(), shape, float64), *extras)
    through = value_and_grads(_reference.forward, *args)
    assert_all_close(through, value_and_grads(attend, *args), atol=1e-11)


def test_forward_mode(float64, getkey):
    arrays, extras = small_problem(getkey(), float64)

    @jax.jit
    def fn(*arrays):
        return _reference.forward(SPECS["causal"], *arrays, *extras)[0]

    check_grads(fn, arrays, order=1, modes=["fwd"])


# ---- Queries that see no key ---------------------------------------------------------------------


def empty_rows(shape) -> dict[str, tuple[AttentionSpec, list, np.ndarray]]:
    """Ways to hide every key from some queries: spec, extras, and which queries."""
    batch, _, seq_q, seq_k = shape.scores
    t, batch_entry = np.arange(seq_q)[:, None], np.arange(batch)[:, None, None, None]
    hidden = (batch_entry == 0) & (t >= 3) & (t < 20)
    bias = jnp.where(hidden, -jnp.inf, jnp.zeros((batch, 1, seq_q, seq_k)))
    queries = jnp.array([4, seq_q], jnp.int32)
    keys = jnp.array([0, seq_k], jnp.int32)
    full = AttentionSpec(0.3)
    bottom_right = AttentionSpec(0.3, causal=True, causal_alignment="bottom_right")
    return {
        "mask": (full, [None, jnp.asarray(~hidden)], hidden),
        "bias": (full, [bias], hidden),
        "query_lengths": (full, [None, None, queries], (batch_entry == 0) & (t >= 4)),
        "key_value_lengths": (full, [None, None, None, keys], (batch_entry == 0) & (t >= 0)),
        "causal": (bottom_right, [], (batch_entry >= 0) & (t < seq_q - seq_k)),
    }


EMPTY_SHAPE = Shape(2, 37, 21, 2, 1, 8)
EMPTY_ROWS = empty_rows(EMPTY_SHAPE)


@pytest.mark.parametrize("spec, extras, empty", EMPTY_ROWS.values(), ids=EMPTY_ROWS)
def test_empty_rows(spec, extras, empty, getkey):
    q, k, v = random_qkv(getkey(), EMPTY_SHAPE)
    out, lse = forward(spec, q, k, v, *extras)
    row = np.broadcast_to(empty[..., 0], lse.shape)
    column = np.swapaxes(row, 1, 2)[..., None]
    assert row.any() and not row.all()
    np.testing.assert_array_equal(np.isneginf(lse), row)
    assert np.isfinite(lse[~row]).all() and np.isfinite(out).all()
    assert (np.where(column, out, 0) == 0).all()

    # Their cotangents change nothing, whatever they are.
    @jax.jit
    def backward(junk):
        dout, dlse = jnp.where(column, junk, jnp.cos(out)), jnp.where(row, junk, lse)
        return _reference.backward(spec, q, k, v, out, lse, dout, dlse, *extras)

    dq, _, _, dbias = grads = backward(jnp.nan)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    jax.tree.map(np.testing.assert_array_equal, grads, backward(0.0))
    assert (np.where(column, dq, 0) == 0).all()
    if dbias is not None:
        assert (np.where(empty, dbias, 0) == 0).all()


def test_second_derivatives_of_empty_rows_are_finite(getkey):
    spec, extras, _ = EMPTY_ROWS["causal"]

    def loss(*arrays):
        return jnp.sum(attend(spec, *arrays, *extras)[0] ** 2)

    def penalty(*arrays):
        return sum(jnp.sum(x**2) for x in jax.grad(loss, (0, 1, 2))(*arrays))

    grads = jax.jit(jax.grad(penalty, (0, 1, 2)))(*random_qkv(getkey(), EMPTY_SHAPE))
    assert all(np.isfinite(x).all() for x in grads)


def test_padding_may_be_nan(getkey):
    shape = SHAPES["grouped"]
    spec = SPECS["causal"]
    query_lengths, key_value_lengths = jnp.array([[10, 33], [47, 30]], jnp.int32)
    extras = [None, None, query_lengths, key_value_lengths]
    arrays = random_qkv(getkey(), shape)

    def padded(x, lengths, value):
        beyond = np.arange(x.shape[1])[:, None, None] >= lengths[:, None, None, None]
        return jnp.where(beyond, value, x)

    @jax.jit
    def run(padding):
        q, k, v = (
            padded(x, lengths, padding)
            for x, lengths in zip(
                arrays, (query_lengths, key_value_lengths, key_value_lengths), strict=True
            )
        )
        out, lse = _reference.forward(spec, q, k, v, *extras)
        return out, lse, *_reference.backward(spec, q, k, v, out, lse, q, lse, *extras)[:3]

    assert_all_close(run(jnp.nan), run(0.0), rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(0, 5, 7, 2, 1, 8),
        Shape(2, 0, 7, 2, 1, 8),
        Shape(2, 5, 0, 2, 1, 8),
        Shape(2, 0, 0, 2, 1, 8),
        Shape(1, 40, 0, 2, 1, 8),
    ],
    ids="{0.batch}-{0.seq_q}-{0.seq_k}".format,
)
def test_sizes_of_zero(shape, getkey):
    q, k, v = random_qkv(getkey(), shape)
    spec = AttentionSpec(0.3, causal=True, window=(2, None), causal_alignment="bottom_right")
    extras = make_extras(getkey(), shape, "bias", "mask")
    out, lse, *grads = value_and_grads(attend, spec, q, k, v, *extras)
    assert out.shape == q.shape and lse.shape == shape.scores[:3]
    assert (out == 0).all() and np.isneginf(lse).all()
    assert all((x == 0).all() for x in grads)


# ---- Transformations -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(2, 1, 4, 0), (0, None, None, None), (None, 1, 0, 2)])
def test_vmap(axes, float64, getkey):
    shape = Shape(2, 19, 21, 4, 2, 4)

    def grad(*arrays):
        def loss(*arrays):
            return sum(jnp.sum(jnp.sin(x)) for x in attend(SPECS["causal"], *arrays))

        return jax.grad(loss, (0, 1, 2, 3))(*arrays)

    def inputs():
        bias, *_ = make_extras(getkey(), shape, "head_bias", dtype=float64)
        return [*random_qkv(getkey(), shape, float64), bias]

    entries = [inputs() for _ in range(3)]
    stacked = [
        xs[0] if axis is None else jnp.stack(xs, axis)
        for axis, xs in zip(axes, zip(*entries, strict=True), strict=True)
    ]
    ours = jax.jit(jax.vmap(grad, in_axes=axes))(*stacked)
    for i, entry in enumerate(entries):
        args = [entries[0][n] if axis is None else entry[n] for n, axis in enumerate(axes)]
        assert_all_close([x[i] for x in ours], jax.jit(grad)(*args), atol=1e-12)


def test_shard_map(getkey):
    mesh = jax.make_mesh((2, 2), ("batch", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    arrays = random_qkv(getkey(), Shape(4, 19, 21, 4, 2, 8))
    single = functools.partial(attend, SPECS["causal"])
    split = P("batch", None, "heads")
    sharded = jax.shard_map(
        single, mesh=mesh, in_specs=(split,) * 3, out_specs=(split, P("batch", "heads"))
    )

    def grad(fn):
        def loss(*arrays):
            return sum(jnp.sum(jnp.sin(x)) for x in fn(*arrays))

        return jax.jit(jax.grad(loss, (0, 1, 2)))

    assert_all_close(grad(sharded)(*arrays), grad(single)(*arrays), atol=1e-5)


# ---- Cost ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", ["grouped", "shared"])
def test_tiles_without_a_visible_score_are_skipped(spec, name):
    _, seq_q, seq_k, *_ = SHAPES[name]
    tiles = _reference._Tiles.covering(spec, jnp.zeros((seq_q, 1)), jnp.zeros((seq_k, 1)))
    rows, cols = tiles.starts()
    seen = visible(spec, seq_q, seq_k)
    expected = [
        (t, s)
        for t in range(0, seq_q, tiles.block_q)
        for s in range(0, seq_k, tiles.block_k)
        if seen[t : t + tiles.block_q, s : s + tiles.block_k].any()
    ]
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == expected


@pytest.mark.usefixtures("full_size_tiles")
def test_memory_is_linear():
    """The scores of 32k tokens are 4 GiB a head."""
    spec = AttentionSpec(0.3, causal=True)

    def loss(*arrays):
        out, lse = attend(spec, *arrays)
        return jnp.sum(out.astype(lse.dtype)) + jnp.sum(lse)

    def memory(fn, seq):
        x = jax.ShapeDtypeStruct((1, seq, 2, 64), jnp.bfloat16)
        bias = jax.ShapeDtypeStruct((1, 2, 1, seq), jnp.float32)
        return temporary_bytes(fn, x, x, x, bias)

    qkv = 3 * 32768 * 2 * 64 * 2
    assert memory(functools.partial(attend, spec), 32768) < 8 * qkv
    grad = jax.grad(loss, (0, 1, 2, 3))
    at_32k = memory(grad, 32768)
    assert at_32k < 8 * qkv
    assert at_32k < 2.1 * memory(grad, 16384)
