# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong: each message names the argument, what came and what to do."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_flash
from eqx_flash import dot_product_attention, flash_attention_hopper_fwd

QUERY, KEY = (2, 5, 6, 8), (2, 7, 3, 8)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def arrays(**shapes) -> dict[str, Any]:
    shapes = {"query": QUERY, "key": KEY, "value": KEY, **shapes}
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def ints(*shape, dtype=jnp.int32):
    return jnp.ones(shape, dtype)


SHAPE_ERRORS = [
    ({"query": (5, 6)}, r"query: expected shape \[batch, seq_q, heads, head_dim\] .*\(5, 6\)"),
    ({"key": (1, 2, 7, 3, 8)}, r"key: expected shape \[batch, seq_k, heads_k, head_dim\]"),
    ({"value": (2, 7, 3, 9)}, r"value: expected key's shape \(2, 7, 3, 8\), got \(2, 7, 3, 9\)"),
    ({"value": (2, 8, 3, 8)}, r"value: expected key's shape"),
    ({"key": (3, 7, 3, 8), "value": (3, 7, 3, 8)}, r"key: its batch 3 differs from query's 2"),
    ({"query": QUERY[1:]}, r"key: its batch 2 differs from query's 1"),
    ({"query": (2, 5, 6, 16)}, r"key: its head_dim 8 differs from query's 16"),
    ({"query": (2, 5, 7, 8)}, r"query: its 7 heads are not a multiple of key's 3"),
    ({"key": (2, 7, 0, 8), "value": (2, 7, 0, 8)}, r"query: its 6 heads .* key's 0"),
    (
        {"query": (2, 5, 6, 0), "key": (2, 7, 3, 0), "value": (2, 7, 3, 0)},
        r"query: head_dim must be at least 1",
    ),
]

VALUE_ERRORS = [
    ({"key": jnp.zeros(KEY, jnp.bfloat16)}, r"key: its dtype bfloat16 differs .* float32.*astype"),
    ({"value": jnp.zeros(KEY, jnp.float16)}, r"value: its dtype float16 differs"),
    ({"query": ints(*QUERY)}, r"query: expected one of the dtypes bfloat16, .*, got int32.*astype"),
    ({"query": jnp.zeros(QUERY, jnp.complex64)}, r"query: expected one of the dtypes"),
    ({"query": jnp.zeros(QUERY, jnp.float8_e4m3fn)}, r"query: expected one of the dtypes"),
    ({"bias": jnp.zeros((2, 4, 5, 7))}, r"bias: shape \(2, 4, 5, 7\) .* \(2, 6, 5, 7\)"),
    ({"bias": jnp.zeros((1, 1, 1, 1, 1))}, r"bias: shape \(1, 1, 1, 1, 1\) does not broadcast"),
    ({"bias": jnp.zeros((5, 7), bool)}, r"bias: expected numbers, got bool; .* as mask"),
    ({"bias": jnp.zeros((5, 7), jnp.complex64)}, r"bias: expected real numbers"),
    ({"mask": jnp.zeros((3, 1, 5, 7), bool)}, r"mask: shape \(3, 1, 5, 7\) does not broadcast"),
    ({"mask": jnp.zeros((5, 7))}, r"mask: expected booleans .*, got float32; .* bias"),
    ({"query_seq_lengths": ints(3)}, r"query_seq_lengths: expected shape \[batch\] = \(2,\)"),
    (
        {"key_value_seq_lengths": ints(2, dtype=jnp.int16)},
        r"key_value_seq_lengths: expected int32, got int16; use .astype",
    ),
    ({"key_value_seq_lengths": ints(2, 1)}, r"key_value_seq_lengths: .* got \(2, 1\)"),
    ({"scale": jnp.ones(6)}, r"scale: expected a float scalar, got float32 of shape \(6,\)"),
    ({"scale": jnp.int32(1)}, r"scale: expected a float scalar, got int32"),
    ({"scale": np.ones(2)}, r"scale: expected a scalar, got an array of shape \(2,\)"),
    ({"scale": float("nan")}, r"scale: expected a finite number, got nan"),
    ({"scale": 1e39}, r"scale: expected a finite number"),
    ({"local_window_size": (1, 2, 3)}, r"local_window_size: expected an int or \(left, right\)"),
    ({"local_window_size": -1}, r"local_window_size: -1 has a negative side; use None"),
    ({"local_window_size": (2, -1)}, r"local_window_size: \(2, -1\) has a negative side"),
    ({"implementation": "cudnn"}, r'implementation: "cudnn" .* None .*"flash" .*"xla"'),
    ({"implementation": "triton"}, r'implementation: expected None, "flash" or "xla", got'),
    ({"causal_alignment": "centre"}, r'causal_alignment: expected "top_left" .*"bottom_right"'),
]

TYPE_ERRORS = [
    ({"query": "q"}, r"query: expected an array, got str"),
    ({"mask": object()}, r"mask: expected an array, got object"),
    ({"is_causal": 1}, r"is_causal: expected a static bool, got int"),
    ({"is_causal": "yes"}, r"is_causal: expected a static bool, got str"),
    ({"deterministic": None}, r"deterministic: expected a static bool, got NoneType"),
    ({"scale": "1"}, r"scale: expected a number, got str"),
    ({"scale": True}, r"scale: expected a number, got bool"),
    ({"local_window_size": 1.5}, r"local_window_size: expected a static int .* got 1.5"),
    ({"local_window_size": (1, "2")}, r"local_window_size: expected a static int"),
    ({"local_window_size": True}, r"local_window_size: expected a static int"),
    ({"causal_alignment": ["top_left"]}, r"causal_alignment: expected a str"),
    ({"implementation": {}}, r"implementation: expected None or a str"),
    ({"checkpoint_names": "context"}, r"checkpoint_names: expected two names, .* got 'context'"),
    ({"checkpoint_names": ("context", None)}, r"checkpoint_names: expected two names"),
]


@pytest.mark.parametrize("shapes, message", SHAPE_ERRORS)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**arrays(**shapes))


@pytest.mark.parametrize("given, message", VALUE_ERRORS)
def test_values(given, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(**arrays() | given)


@pytest.mark.parametrize("given, message", TYPE_ERRORS)
def test_types(given, message):
    with pytest.raises(TypeError, match=message):
        dot_product_attention(**arrays() | given)


def test_errors_are_raised_at_trace_time_too():
    with pytest.raises(ValueError, match="value: expected key's shape"):
        jax.jit(dot_product_attention)(*arrays(value=QUERY).values())
    with pytest.raises(TypeError, match=r"is_causal: .* traced .* static"):
        jax.jit(lambda c: dot_product_attention(**arrays(), is_causal=c))(True)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (
            {"query": jnp.zeros((5, 6, 8))},
            ValueError,
            r"query: expected \[batch, seq, .* \(5, 6, 8\)",
        ),
        ({"value": jnp.zeros((2, 7, 3, 9))}, ValueError, "value: expected key's shape"),
        ({"softmax_scale": float("inf")}, ValueError, "softmax_scale: expected a finite number"),
        ({"causal": None}, TypeError, "causal: expected a static bool"),
        ({"causal_alignment": "left"}, ValueError, "causal_alignment: expected"),
    ],
)
def test_hopper_function(given, error, message):
    with pytest.raises(error, match=message):
        flash_attention_hopper_fwd(**arrays() | given)


def test_signature_begins_like_that_of_jax_nn():
    theirs = list(inspect.signature(jax.nn.dot_product_attention).parameters.values())
    ours = list(inspect.signature(dot_product_attention).parameters.values())
    for x, y in zip(theirs, ours, strict=False):
        assert (x.name, x.kind, x.default) == (y.name, y.kind, y.default)
    assert [p.name for p in ours[len(theirs) :]] == [
        "causal_alignment",
        "deterministic",
        "checkpoint_names",
    ]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(theirs) :])
    explained = inspect.signature(eqx_flash.explain).parameters.values()
    assert [(p.name, p.kind, p.default) for p in explained] == [
        (p.name, p.kind, p.default) for p in ours
    ]
