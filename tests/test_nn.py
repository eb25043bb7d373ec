# SPDX-License-Identifier: Apache-2.0
"""`eqx_flash.nn.MultiheadAttention` keeps the promises of Equinox's layer."""

import io
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from common import assert_as_accurate, generator
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
from lowered import KERNEL, cuda_text, kernel_calls

from eqx_flash.nn import MultiheadAttention

# On a GPU these float32 calls are not for the kernel, which is said once.
pytestmark = [
    pytest.mark.filterwarnings("ignore:attention runs on the XLA reference"),
    pytest.mark.usefixtures("exact_float32_products"),
]


@pytest.fixture
def without_type_checks(monkeypatch):
    """As users run it: without pytest's checks of the annotations, which come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


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
