# SPDX-License-Identifier: Apache-2.0
"""`eqx_flash.nn.MultiheadAttention` keeps Equinox's promises, and its own."""

import io
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from common import assert_as_accurate, generator, quick_compilation
from lowered import BACKWARD, KERNEL, cuda_text, kernel_calls

from eqx_flash.nn import MultiheadAttention

HEADS, SIZE, Q_SEQ, KV_SEQ = 4, 32, 7, 9

CONFIGS = {
    "defaults": {},
    "sizes": {"key_size": 12, "value_size": 20, "output_size": 5},
    "biases": {f"use_{name}_bias": True for name in ("query", "key", "value", "output")},
    "query_bias": {"use_query_bias": True},
    "wide_values": {"qk_size": 8, "vo_size": 24},
    "narrow_values": {"qk_size": 24, "vo_size": 3},
    "odd_heads": {"query_size": 30},  # 7 channels a head, and 2 left over
}

# On a GPU these float32 calls are not for the kernel, which is said once.
pytestmark = pytest.mark.filterwarnings("ignore:attention runs on the XLA reference")


@pytest.fixture(autouse=True)
def exact_float32_products():
    with jax.default_matmul_precision("highest"), quick_compilation():
        yield


@pytest.fixture
def without_type_checks(monkeypatch):
    """As users run it: without pytest's checks of the annotations, which come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def pair(key, **config):
    """Equinox's layer and ours, made by the same call."""
    config = {"num_heads": HEADS, "query_size": SIZE, **config}
    return eqx.nn.MultiheadAttention(**config, key=key), MultiheadAttention(**config, key=key)


def ours_only(key, **config):
    """Our layer, with options that Equinox's does not have."""
    return MultiheadAttention(**{"num_heads": HEADS, "query_size": SIZE, **config}, key=key)


def inputs(getkey, layer, batch=(), q_seq=Q_SEQ, kv_seq=KV_SEQ):
    rng = generator(getkey())

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((*batch, *shape), np.float32))

    query = normal(q_seq, layer.query_size)
    return query, normal(kv_seq, layer.key_size), normal(kv_seq, layer.value_size)


def to_bfloat16(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) else x, tree)


def random_mask(key, *heads):
    """Every query sees at least one key: Equinox and we differ where one sees none."""
    mask = generator(key).random((*heads, Q_SEQ, KV_SEQ)) < 0.5
    mask[..., 0] = True
    return jnp.asarray(mask)


def window_mask(left, right):
    """Which keys stand at most that far to the left and right of each query."""
    distance = jnp.arange(KV_SEQ) - jnp.arange(Q_SEQ)[:, None]
    return (-left <= distance) & (distance <= right)


def assert_close(actual, expected, rtol=1e-5):
    """Equal, leaf by leaf, up to the rounding of numbers of order one or of the largest element."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=rtol * abs(np.asarray(b)).max(initial=1), rtol=0)


# ---- The same layer as Equinox's -----------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_equinoxs_bit_by_bit(getkey, config):
    theirs, ours = pair(getkey(), **config, dropout_p=0.1)
    their_leaves = jax.tree_util.tree_leaves_with_path(theirs)
    our_leaves = jax.tree_util.tree_leaves_with_path(ours)
    assert [path for path, _ in our_leaves] == [path for path, _ in their_leaves]
    for (_, a), (_, b) in zip(our_leaves, their_leaves, strict=True):
        assert jnp.array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_of_parameters(getkey, dtype):
    theirs, ours = pair(getkey(), dtype=dtype)
    assert eqx.tree_equal(ours.to_equinox(), theirs)


@pytest.mark.parametrize(
    "config, mask_heads",
    [
        *((name, None) for name in CONFIGS),
        *((name, ()) for name in ("defaults", "wide_values")),
        *((name, (HEADS,)) for name in ("defaults", "narrow_values")),
    ],
)
def test_outputs_and_gradients_equal_equinox(getkey, config, mask_heads):
    theirs, ours = pair(getkey(), **CONFIGS[config])
    args = inputs(getkey, theirs)
    mask = None if mask_heads is None else random_mask(getkey(), *mask_heads)
    cotangent = generator(getkey()).standard_normal((Q_SEQ, theirs.output_size), np.float32)

    @eqx.filter_jit
    def output_and_gradients(layer):
        def loss(parameters_and_args):
            layer, args = parameters_and_args
            out = layer(*args, mask)
            return (out * cotangent).sum(), out

        (_, out), (layer, d_args) = eqx.filter_value_and_grad(loss, has_aux=True)((layer, args))
        return out, jax.tree.leaves(layer), d_args

    assert_close(output_and_gradients(ours), output_and_gradients(theirs))


def test_process_heads_equals_equinox(getkey):
    theirs, ours = pair(getkey())
    rotary = eqx.nn.RotaryPositionalEmbedding(SIZE // HEADS)

    def process_heads(query, key, value):
        rotate = jax.vmap(rotary, in_axes=1, out_axes=1)
        return rotate(query), rotate(key), 2 * value

    args = inputs(getkey, theirs)
    expected = theirs(*args, process_heads=process_heads)
    assert_close(ours(*args, process_heads=process_heads), expected)


def test_bfloat16_is_as_accurate_as_equinox(getkey):
    theirs, ours = pair(getkey(), query_size=256)
    args = inputs(getkey, theirs, q_seq=100, kv_seq=120)
    exact = theirs(*args)
    theirs, ours, args = to_bfloat16((theirs, ours, args))
    our_out, their_out = ours(*args), theirs(*args)
    assert our_out.dtype == jnp.bfloat16
    assert_as_accurate(our_out, their_out, exact)


def test_deterministic_is_deprecated(getkey):
    _, layer = pair(getkey(), dropout_p=0.5)
    args = inputs(getkey, layer)
    with pytest.warns(DeprecationWarning, match="inference="):
        out = layer(*args, deterministic=True)
    assert jnp.array_equal(out, layer(*args, inference=True))


# ---- Conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_conversion_both_ways(getkey, config):
    theirs, ours = pair(getkey(), **config, dropout_p=0.25, inference=True)
    converted = MultiheadAttention.from_equinox(theirs)
    assert eqx.tree_equal(converted, ours)
    assert converted.key_proj.weight is theirs.key_proj.weight
    assert eqx.tree_equal(converted.to_equinox(), theirs)


def test_conversion_takes_our_options(getkey):
    theirs, _ = pair(getkey())
    converted = MultiheadAttention.from_equinox(
        theirs,
        is_causal=True,
        local_window_size=3,
        compute_dtype=jnp.float32,
        implementation="xla",
    )
    assert converted.is_causal and converted.implementation == "xla"
    assert converted.compute_dtype == jnp.float32
    args = inputs(getkey, theirs)
    assert_close(converted(*args), theirs(*args, window_mask(3, 0)))


def test_conversion_of_an_ensemble(getkey):
    keys = jax.random.split(getkey(), 3)
    theirs = eqx.filter_vmap(lambda key: pair(key)[0])(keys)
    ours = eqx.filter_vmap(lambda key: pair(key)[1])(keys)
    assert eqx.tree_equal(MultiheadAttention.from_equinox(theirs), ours)
    assert eqx.tree_equal(ours.to_equinox(), theirs)


def test_checkpoints_carry_over(getkey):
    saved, _ = pair(getkey(), use_key_bias=True)
    _, ours = pair(getkey(), use_key_bias=True)
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, saved)
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, ours)
    assert eqx.tree_equal(loaded.to_equinox(), saved)


def test_to_equinox_refuses_what_equinox_lacks(getkey):
    with pytest.raises(ValueError, match="num_kv_heads: expected num_heads=4, got 2"):
        ours_only(getkey(), num_kv_heads=2).to_equinox()
    causal = ours_only(getkey(), is_causal=True)
    with pytest.raises(ValueError, match=r"is_causal: .* drop_is_causal=True"):
        causal.to_equinox()
    args = inputs(getkey, causal)
    converted = causal.to_equinox(drop_is_causal=True)
    assert_close(converted(*args, jnp.tri(Q_SEQ, KV_SEQ, dtype=bool)), causal(*args))
    with pytest.raises(ValueError, match=r"local_window_size: expected None, got \(3, 3\); .*mask"):
        ours_only(getkey(), local_window_size=3).to_equinox()
    with pytest.raises(ValueError, match=r"use_qk_norm: expected False, got True; .*process_heads"):
        ours_only(getkey(), use_qk_norm=True).to_equinox()


def test_to_equinox_leaves_the_compute_dtype_behind(getkey):
    theirs, _ = pair(getkey())
    converted = MultiheadAttention.from_equinox(theirs, compute_dtype=jnp.bfloat16)
    assert eqx.tree_equal(converted.to_equinox(), theirs)


def test_from_equinox_takes_equinox_layers_only(without_type_checks):
    module: Any = eqx.nn.Identity()
    with pytest.raises(TypeError, match=r"module: expected an equinox.*, got Identity"):
        MultiheadAttention.from_equinox(module)


# ---- Grouped queries, causality, empty rows ------------------------------------------------------


def repeat_heads(parameter, num_kv_heads):
    """The parameter of a key or value projection with one head for each query head."""
    heads = parameter.reshape(num_kv_heads, -1, *parameter.shape[1:])
    return jnp.repeat(heads, HEADS // num_kv_heads, axis=0).reshape(-1, *parameter.shape[1:])


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


def test_norms_are_computed_in_float32(getkey):
    """In float16 the squares of these heads overflow."""
    key, seen = getkey(), []

    def process_heads(*heads):
        seen.append(heads)
        return heads

    plain, normed = (
        ours_only(key, use_qk_norm=use_qk_norm, num_kv_heads=2, dtype=jnp.float16)
        for use_qk_norm in (False, True)
    )
    args = [(1000 * x).astype(jnp.float16) for x in inputs(getkey, plain)]
    for layer in (plain, normed):
        layer(*args, process_heads=process_heads)
    (*heads, value), (*normed_heads, normed_value) = seen
    assert jnp.array_equal(value, normed_value)
    for x, actual in zip(heads, normed_heads, strict=True):
        assert actual.dtype == jnp.float16
        expected = rms_norm(x.astype(jnp.float32), 1.0)
        rounding = float(jnp.finfo(jnp.float16).eps) / 2
        np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=1.01 * rounding)


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


# ---- Transformations -----------------------------------------------------------------------------


def loop(layer, *args):
    return jnp.stack([layer(*arg) for arg in zip(*args, strict=True)])


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "is_causal": True}])
def test_vmap_equals_a_loop(getkey, options):
    layer = ours_only(getkey(), **options)
    args = inputs(getkey, layer, batch=(3,))
    assert_close(jax.vmap(layer)(*args), loop(layer, *args))
    masks = jnp.stack([random_mask(getkey()) for _ in range(3)])
    assert_close(jax.vmap(layer)(*args, masks), loop(layer, *args, masks))


def test_vmap_over_queries_with_shared_keys(getkey):
    layer = ours_only(getkey(), num_kv_heads=2)
    query, *_ = inputs(getkey, layer, batch=(3,))
    _, key_, value = inputs(getkey, layer)
    expected = jnp.stack([layer(q, key_, value) for q in query])
    assert_close(jax.vmap(layer, in_axes=(0, None, None))(query, key_, value), expected)


def test_nested_vmap_under_grad(getkey):
    layer = ours_only(getkey(), is_causal=True)
    args = inputs(getkey, layer, batch=(2, 3))

    def loss(args, attend):
        return jnp.sin(attend(*args)).sum()

    flat = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), args)
    actual = jax.grad(loss)(args, jax.vmap(jax.vmap(layer)))
    expected = jax.grad(loss)(flat, lambda *args: loop(layer, *args))
    assert_close(jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), actual), expected)


def test_filter_vmap_over_an_ensemble(getkey):
    layers = [ours_only(getkey(), num_kv_heads=2) for _ in range(3)]
    ensemble = jax.tree.map(lambda *xs: jnp.stack(xs) if eqx.is_array(xs[0]) else xs[0], *layers)
    args = inputs(getkey, layers[0])
    actual = eqx.filter_vmap(lambda layer: layer(*args))(ensemble)
    assert_close(actual, jnp.stack([layer(*args) for layer in layers]))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=["single", "vmap", "nested_vmap"])
def test_vmap_is_one_kernel_call(getkey, batch):
    layer = ours_only(getkey(), query_size=64 * HEADS, num_kv_heads=2, dtype=jnp.bfloat16)

    def attend(x):
        return layer(x, x, x)

    for _ in batch:
        attend = jax.vmap(attend)
    x = jnp.zeros((*batch, Q_SEQ, 64 * HEADS), jnp.bfloat16)
    program = cuda_text(attend, x)
    assert kernel_calls(program) == 1
    (call,) = (line for line in program.splitlines() if f"@{KERNEL}" in line)
    assert f"tensor<{math.prod(batch)}x{Q_SEQ}x{HEADS}x64xbf16>" in call


def test_filter_jit_does_not_trace_again(getkey):
    layer = ours_only(getkey())
    args = inputs(getkey, layer)
    traces = []

    @eqx.filter_jit
    def call(layer, args):
        traces.append(None)
        return layer(*args)

    assert_close(call(layer, args), layer(*args))
    call(eqx.tree_at(lambda m: m.key_proj.weight, layer, replace_fn=jnp.negative), args)
    assert len(traces) == 1


@pytest.mark.parametrize("names, calls", [(("out_7", "lse_7"), 1), (("out_8", "lse_8"), 2)])
def test_saved_by_its_checkpoint_names(getkey, names, calls):
    """A policy that saves them spares the second forward kernel."""
    layer = ours_only(
        getkey(),
        query_size=64 * HEADS,
        compute_dtype=jnp.bfloat16,
        checkpoint_names=("out_7", "lse_7"),
    )
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(x):
        block = jax.checkpoint(lambda x: layer(x, x, x), policy=policy)
        return block(x).astype(jnp.float32).sum()

    x = jax.ShapeDtypeStruct((Q_SEQ, 64 * HEADS), jnp.float32)
    assert kernel_calls(cuda_text(jax.value_and_grad(loss), x)) == calls


def test_implementation_is_passed_on(getkey):
    layer = ours_only(getkey(), implementation="flash")
    with pytest.raises(NotImplementedError, match="float32"):
        layer(*inputs(getkey, layer))


# ---- Dropout -------------------------------------------------------------------------------------

WARNING = r"stores the attention weights.*dropout_p=0.4"


@pytest.mark.parametrize("config, mask_heads", [({}, None), ({}, ()), ({"vo_size": 24}, (HEADS,))])
def test_active_dropout_is_equinoxs(getkey, config, mask_heads):
    theirs, ours = pair(getkey(), **config, dropout_p=0.4)
    args = inputs(getkey, theirs)
    mask = None if mask_heads is None else random_mask(getkey(), *mask_heads)
    key = getkey()
    with pytest.warns(UserWarning, match=WARNING):
        out = ours(*args, mask, key=key)
    assert_close(out, theirs(*args, mask, key=key))
    assert float(abs(out - ours(*args, mask, inference=True)).max()) > 0.01


def test_active_dropout_with_grouped_heads_and_causality(getkey):
    theirs, _ = pair(getkey(), dropout_p=0.4)
    ours = ours_only(getkey(), num_kv_heads=2, is_causal=True, dropout_p=0.4, implementation="xla")
    ours = eqx.tree_at(
        lambda m: (m.query_proj, m.output_proj), ours, (theirs.query_proj, theirs.output_proj)
    )
    theirs = eqx.tree_at(
        lambda m: (m.key_proj.weight, m.value_proj.weight),
        theirs,
        (repeat_heads(ours.key_proj.weight, 2), repeat_heads(ours.value_proj.weight, 2)),
    )
    args = inputs(getkey, theirs)
    key = getkey()
    expected = theirs(*args, jnp.tri(Q_SEQ, KV_SEQ, dtype=bool), key=key)
    assert_close(ours(*args, key=key), expected)


def test_dropout_under_vmap_and_grad(getkey):
    theirs, _ = pair(getkey(), dropout_p=0.4)
    ours = MultiheadAttention.from_equinox(theirs, implementation="xla")
    args = inputs(getkey, theirs, batch=(3,))
    keys = jax.random.split(getkey(), 3)

    def gradients(layer):
        return jax.grad(lambda args: jnp.sin(jax.vmap(layer)(*args, key=keys)).sum())(args)

    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("how", ["argument", "constructor", "inference_mode", "p=0"])
def test_inactive_dropout_uses_no_key_and_does_not_warn(getkey, how):
    key = getkey()
    layer = ours_only(key, dropout_p=0.0 if how == "p=0" else 0.4, inference=how == "constructor")
    if how == "inference_mode":
        layer = eqx.nn.inference_mode(layer)
    args = inputs(getkey, layer)
    out = layer(*args, inference=True if how == "argument" else None)  # a warning is an error here
    assert_close(out, pair(key)[0](*args))


def test_inference_false_activates_dropout(getkey):
    layer = ours_only(getkey(), dropout_p=1.0, inference=True, use_output_bias=True)
    args = inputs(getkey, layer)
    with pytest.warns(UserWarning, match="stores the attention weights"):
        out = layer(*args, key=getkey(), inference=False)
    bias = layer.output_proj.bias
    assert bias is not None and all(jnp.array_equal(row, bias) for row in out)


def test_dropout_errors(getkey):
    flash = ours_only(getkey(), dropout_p=0.4, implementation="flash")
    args = inputs(getkey, flash)
    with pytest.raises(NotImplementedError, match=r'"flash".*dropout_p=0.4.*inference=True'):
        flash(*args, key=getkey())
    keyless = ours_only(getkey(), dropout_p=0.4)
    with pytest.raises(RuntimeError, match=r"key: .* got None.*dropout_p=0.4"):
        keyless(*args)


# ---- Errors name the argument, what came, and what is allowed ------------------------------------


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected a divisor of num_heads=4, got 0"),
        ({"num_kv_heads": 8}, "num_kv_heads: expected a divisor of num_heads=4, got 8"),
        ({"query_size": 3}, r"qk_size: expected at least 1, got 0; .* = 3 // 4"),
        ({"vo_size": -1}, "vo_size: expected at least 1, got -1"),
        ({"dropout_p": 1.5}, "dropout_p: expected a probability from 0 to 1, got 1.5"),
        ({"implementation": "cudnn"}, 'implementation: "cudnn" is an implementation of jax.nn'),
        ({"local_window_size": (1, -1)}, r"local_window_size: \(1, -1\) has a negative .* None"),
        ({"local_window_size": (1, 2, 3)}, r"local_window_size: .* \(left, right\), got \(1, 2, 3"),
        (
            {"compute_dtype": jnp.int32},
            r"compute_dtype: expected one .*bfloat16.*, got int32; None",
        ),
        ({"compute_dtype": jnp.float8_e4m3fn}, "compute_dtype: expected .*, got float8_e4m3fn"),
    ],
)
def test_constructor_errors(getkey, without_type_checks, config, message):
    with pytest.raises(ValueError, match=message):
        ours_only(getkey(), **config)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"local_window_size": 1.5}, r"local_window_size: expected a static int or .*, got 1\.5"),
        ({"local_window_size": (True, 1)}, r"local_window_size: .*, got \(True, 1\)"),
        ({"compute_dtype": "bf16"}, "compute_dtype: expected a dtype, got 'bf16'"),
        ({"checkpoint_names": "ab"}, "checkpoint_names: expected two names, .* got 'ab'"),
    ],
)
def test_constructor_type_errors(getkey, without_type_checks, config, message):
    with pytest.raises(TypeError, match=message):
        ours_only(getkey(), **config)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query": (2, Q_SEQ, SIZE)}, r"query: .*query_size=32\], got \(2, 7, 32\); .*jax.vmap"),
        ({"query": (Q_SEQ, 8)}, r"query: expected shape \[sequence, query_size=32\], got \(7, 8\)"),
        ({"key_": (KV_SEQ, 8)}, r"key_: expected shape \[sequence, key_size=32\], got \(9, 8\)"),
        ({"value": (SIZE,)}, r"value: expected shape \[sequence, value_size=32\], got \(32,\)"),
        ({"value": (8, SIZE)}, "value: expected key_'s length 9, got 8"),
        ({"mask": (KV_SEQ, Q_SEQ)}, r"mask: .*\(7, 9\) or .*\(4, 7, 9\), got \(9, 7\)"),
        ({"mask": (2, Q_SEQ, KV_SEQ)}, r"mask: .*\(7, 9\) or .*\(4, 7, 9\), got \(2, 7, 9\)"),
    ],
)
def test_call_errors(getkey, without_type_checks, changes, message):
    layer = ours_only(getkey())
    shapes = {"query": (Q_SEQ, SIZE), "key_": (KV_SEQ, SIZE), "value": (KV_SEQ, SIZE)} | changes
    query, key_, value = (jnp.ones(shapes[name]) for name in ("query", "key_", "value"))
    mask = jnp.ones(shapes["mask"], bool) if "mask" in shapes else None
    with pytest.raises(ValueError, match=message):
        layer(query, key_, value, mask)


def test_mask_dtype_error(getkey, without_type_checks):
    layer = ours_only(getkey())
    with pytest.raises(ValueError, match=r"mask: expected booleans.*, got float32"):
        layer(*inputs(getkey, layer), jnp.zeros((Q_SEQ, KV_SEQ)))


def test_process_heads_error(getkey, without_type_checks):
    layer = ours_only(getkey(), num_kv_heads=2)
    message = r"process_heads: expected key heads of the same shape \(9, 2, 8\), got \(9, 4, 8\)"
    with pytest.raises(ValueError, match=message):
        layer(*inputs(getkey, layer), process_heads=lambda q, k, v: (q, jnp.repeat(k, 2, 1), v))
