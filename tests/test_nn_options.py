# SPDX-License-Identifier: Apache-2.0
"""What `eqx_flash.nn.MultiheadAttention` can do and Equinox's layer cannot."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import generator
from layers import (
    CONFIGS,
    HEADS,
    KV_SEQ,
    Q_SEQ,
    SIZE,
    assert_close,
    inputs,
    ours_only,
    pair,
    random_mask,
    repeat_heads,
    to_bfloat16,
    window_mask,
)
from lowered import BACKWARD, KERNEL, cuda_text, kernel_calls

from eqx_flash.nn import MultiheadAttention

# On a GPU these float32 calls are not for the kernel, which is said once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:attention runs on the XLA reference"),
    pytest.mark.usefixtures("exact_float32_products"),
]


# ---- Grouped queries, causality, empty rows ------------------------------------------------------


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sizes", [{}, {"qk_size": 5, "vo_size": 6}], ids=["square", "qk_vo"])
def test_grouped_heads_equal_repeated_heads(getkey, num_kv_heads, sizes):
    grouped = ours_only(getkey(), num_kv_heads=num_kv_heads, use_value_bias=True, **sizes)

    full = ours_only(getkey(), use_value_bias=True, **sizes)
    full = eqx.tree_at(  # the static sizes in `Linear` do not matter here
        lambda m: (m.query_proj, m.key_proj.weight, m.value_proj, m.output_proj),
        full,
        (
            grouped.query_proj,
            repeat_heads(grouped.key_proj.weight, num_kv_heads),
            jax.tree.map(lambda x: repeat_heads(x, num_kv_heads), grouped.value_proj),
            grouped.output_proj,
        ),
    )
    args = inputs(getkey, grouped)
    assert grouped.key_proj.weight.shape[0] == num_kv_heads * grouped.qk_size
    assert_close(grouped(*args), full(*args))


@pytest.mark.parametrize("q_seq, kv_seq", [(7, 7), (5, 9), (9, 5), (1, 9)])
def test_causal_equals_a_triangular_mask(getkey, q_seq, kv_seq):
    theirs, _ = pair(getkey())
    ours = MultiheadAttention.from_equinox(theirs, is_causal=True)
    args = inputs(getkey, theirs, q_seq=q_seq, kv_seq=kv_seq)
    assert_close(ours(*args), theirs(*args, jnp.tri(q_seq, kv_seq, dtype=bool)))


def test_causal_combines_with_a_mask(getkey):
    theirs, _ = pair(getkey())
    ours = MultiheadAttention.from_equinox(theirs, is_causal=True)
    args = inputs(getkey, theirs)
    mask = random_mask(getkey(), HEADS)
    assert_close(ours(*args, mask), theirs(*args, mask & jnp.tri(Q_SEQ, KV_SEQ, dtype=bool)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_query_without_keys_gets_zeros(getkey, dropout_p):
    layer = ours_only(getkey(), dropout_p=dropout_p, implementation="xla")
    args = inputs(getkey, layer)
    mask = jnp.ones((Q_SEQ, KV_SEQ), bool).at[3].set(False)
    key = getkey()

    def call(query):
        return layer(query, *args[1:], mask, key=key)

    assert jnp.array_equal(call(args[0])[3], jnp.zeros(SIZE))
    gradient = jax.grad(lambda query: call(query).sum())(args[0])
    assert jnp.isfinite(gradient).all() and jnp.array_equal(gradient[3], jnp.zeros(SIZE))


@pytest.mark.parametrize("q_seq, kv_seq", [(0, 3), (3, 0), (0, 0)])
def test_empty_sequences(getkey, q_seq, kv_seq):
    layer = ours_only(getkey(), vo_size=5)
    out = layer(*inputs(getkey, layer, q_seq=q_seq, kv_seq=kv_seq))
    assert jnp.array_equal(out, jnp.zeros((q_seq, SIZE)))


# ---- Windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    "window, is_causal, left, right",
    [
        (2, False, 2, 2),
        (2, True, 2, 0),
        ((3, 0), False, 3, 0),
        ((None, 1), False, KV_SEQ, 1),
        ((1, None), False, 1, KV_SEQ),
        ((2**40, 2**40), False, KV_SEQ, KV_SEQ),
    ],
)
def test_a_window_equals_a_mask(getkey, window, is_causal, left, right, dropout_p):
    theirs, _ = pair(getkey(), dropout_p=dropout_p)
    ours = MultiheadAttention.from_equinox(
        theirs, is_causal=is_causal, local_window_size=window, implementation="xla"
    )
    args = inputs(getkey, theirs)
    mask = random_mask(getkey(), HEADS) | jnp.eye(Q_SEQ, KV_SEQ, dtype=bool)
    key = getkey()
    expected = theirs(*args, mask & window_mask(left, right), key=key)
    assert_close(ours(*args, mask, key=key), expected)


def test_the_kernel_refuses_a_window(getkey):
    layer = ours_only(getkey(), local_window_size=2, implementation="flash", dtype=jnp.bfloat16)
    args = to_bfloat16(inputs(getkey, layer))
    with pytest.raises(NotImplementedError, match="local_window_size is not supported"):
        layer(*args)


# ---- Norms of queries and keys -------------------------------------------------------------------


def rms_norm(heads, weight):
    return heads / jnp.sqrt((heads**2).mean(-1, keepdims=True) + 1e-6) * weight


def test_norms_equal_their_formula(getkey):
    theirs, _ = pair(getkey())
    ours = ours_only(getkey(), use_qk_norm=True)
    rng = generator(getkey())
    weights = [jnp.asarray(rng.standard_normal(ours.qk_size), jnp.float32) for _ in range(2)]
    projections = (theirs.query_proj, theirs.key_proj, theirs.value_proj, theirs.output_proj)
    ours = eqx.tree_at(
        lambda m: (
            *(m.query_proj, m.key_proj, m.value_proj, m.output_proj),
            *(m.query_norm.weight, m.key_norm.weight),
        ),
        ours,
        (*projections, *weights),
    )
    args = inputs(getkey, theirs)
    cotangent = generator(getkey()).standard_normal((Q_SEQ, SIZE), np.float32)

    def process_heads(query, key, value):  # does not commute with the norms
        return query + 1, 1 - key, 2 * value

    def our_loss(parameters):
        layer, args = parameters
        return (layer(*args, process_heads=process_heads) * cotangent).sum()

    def their_loss(parameters):
        layer, (query_weight, key_weight), args = parameters
        out = layer(
            *args,
            process_heads=lambda query, key, value: process_heads(
                rms_norm(query, query_weight), rms_norm(key, key_weight), value
            ),
        )
        return (out * cotangent).sum()

    our_results = eqx.filter_value_and_grad(our_loss)((ours, args))
    their_results = eqx.filter_value_and_grad(their_loss)((theirs, weights, args))
    # Both in this order: the loss, the projections, the weights of the norms, the inputs.
    assert_close(jax.tree.leaves(our_results), jax.tree.leaves(their_results), rtol=3e-5)


def heads_of(layer, args):
    """The heads that `process_heads` gets."""
    seen = []

    def process_heads(*heads):
        seen.extend(heads)
        return heads

    layer(*args, process_heads=process_heads)
    return seen


def assert_rounded_once(actual, expected):
    rounding = float(jnp.finfo(actual.dtype).eps) / 2
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=1.01 * rounding)


def test_norms_are_computed_in_float32(getkey):
    """In float16 the squares of these heads overflow."""
    key = getkey()
    plain, normed = (
        ours_only(key, use_qk_norm=use_qk_norm, num_kv_heads=2, dtype=jnp.float16)
        for use_qk_norm in (False, True)
    )
    args = [(1000 * x).astype(jnp.float16) for x in inputs(getkey, plain)]
    *heads, value = heads_of(plain, args)
    *normed_heads, normed_value = heads_of(normed, args)
    assert jnp.array_equal(value, normed_value)
    for x, actual in zip(heads, normed_heads, strict=True):
        assert actual.dtype == jnp.float16
        assert_rounded_once(actual, rms_norm(x.astype(jnp.float32), 1.0))


def test_norms_keep_their_float32_weights(getkey):
    key = getkey()
    plain, normed = (
        ours_only(key, use_qk_norm=use_qk_norm, compute_dtype=jnp.bfloat16)
        for use_qk_norm in (False, True)
    )
    weight = jnp.asarray(1 + generator(getkey()).random(normed.qk_size), jnp.float32)
    normed = eqx.tree_at(lambda m: m.query_norm.weight, normed, weight)
    args = inputs(getkey, plain)
    query, actual = heads_of(plain, args)[0], heads_of(normed, args)[0]
    assert actual.dtype == jnp.bfloat16
    assert_rounded_once(actual, rms_norm(query.astype(jnp.float32), weight))


def test_norms_come_after_equinoxs_leaves(getkey):
    theirs, _ = pair(key := getkey())
    leaves = jax.tree_util.tree_leaves_with_path(ours_only(key, use_qk_norm=True))
    their_leaves = jax.tree_util.tree_leaves_with_path(theirs)
    *same, query_norm, key_norm = leaves
    assert eqx.tree_equal(same, their_leaves)
    for name, (path, weight) in (("query_norm", query_norm), ("key_norm", key_norm)):
        assert jax.tree_util.keystr(path) == f".{name}.weight"
        assert jnp.array_equal(weight, jnp.ones(SIZE // HEADS))


# ---- Computing in another dtype than that of the parameters --------------------------------------


def test_compute_dtype_equals_casts_outside(getkey):
    """Bit by bit, but for gradients, which come back in the dtype of the parameters."""
    key, options = getkey(), {**CONFIGS["biases"], "implementation": "xla"}
    layer = ours_only(key, **options, compute_dtype=jnp.bfloat16)
    plain = ours_only(key, **options)
    args = inputs(getkey, layer)

    @eqx.filter_value_and_grad(has_aux=True)
    def results(layer_and_args):
        layer, args = layer_and_args
        out = layer(*args)
        return jnp.sin(out).sum(), out

    (_, out), gradients = results((layer, args))
    (_, expected), plain_gradients = results(to_bfloat16((plain, args)))
    assert out.dtype == jnp.bfloat16 and jnp.array_equal(out, expected)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True):
        assert a.dtype == jnp.float32 and jnp.array_equal(a, b.astype(jnp.float32))


def test_the_kernel_serves_float32_parameters(getkey):
    layer = ours_only(
        getkey(),
        query_size=64 * HEADS,
        num_kv_heads=2,
        is_causal=True,
        use_qk_norm=True,
        compute_dtype=jnp.bfloat16,
    )

    def in_float32(query, key, value):
        return query.astype(jnp.float32), key.astype(jnp.float32), value

    @eqx.filter_grad
    def gradients(layer_and_x):
        layer, x = layer_and_x
        out = jax.vmap(lambda x: layer(x, x, x, process_heads=in_float32))(x)
        assert out.dtype == jnp.bfloat16
        return out.astype(jnp.float32).sum()

    x = jnp.zeros((3, Q_SEQ, 64 * HEADS))
    parameters_and_x = eqx.filter((layer, x), eqx.is_array)
    shapes = eqx.filter_eval_shape(gradients, (layer, x))
    for leaf, gradient in zip(*map(jax.tree.leaves, (parameters_and_x, shapes)), strict=True):
        assert leaf.dtype == gradient.dtype == jnp.float32 and leaf.shape == gradient.shape

    program = cuda_text(lambda x: jax.tree.leaves(gradients((layer, x))), x)
    for target in (KERNEL, BACKWARD):
        assert kernel_calls(program, target) == 1
        (call,) = (line for line in program.splitlines() if f"@{target}(" in line)
        assert f"(tensor<3x{Q_SEQ}x{HEADS}x64xbf16>" in call


def test_compute_dtype_with_dropout(getkey):
    key, options = getkey(), {"dropout_p": 0.4, "implementation": "xla"}
    layer = ours_only(key, **options, compute_dtype=jnp.bfloat16)
    plain = ours_only(key, **options)
    args = inputs(getkey, layer)
    out = layer(*args, key=key)
    assert out.dtype == jnp.bfloat16
    assert jnp.array_equal(out, to_bfloat16(plain)(*to_bfloat16(args), key=key))
