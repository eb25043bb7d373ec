# SPDX-License-Identifier: Apache-2.0
"""Layers, inputs and masks for the tests of `eqx_flash.nn.MultiheadAttention`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from common import generator

from eqx_flash.nn import MultiheadAttention

HEADS, SIZE, Q_SEQ, KV_SEQ = 4, 32, 7, 9

# Of Equinox's layer, and ours.
CONFIGS = {
    "defaults": {},
    "sizes": {"key_size": 12, "value_size": 20, "output_size": 5},
    "biases": {f"use_{name}_bias": True for name in ("query", "key", "value", "output")},
    "query_bias": {"use_query_bias": True},
    "wide_values": {"qk_size": 8, "vo_size": 24},
    "narrow_values": {"qk_size": 24, "vo_size": 3},
    "odd_heads": {"query_size": 30},  # 7 channels a head, and 2 left over
}


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


def repeat_heads(parameter, num_kv_heads):
    """The parameter of a key or value projection with one head for each query head."""
    heads = parameter.reshape(num_kv_heads, -1, *parameter.shape[1:])
    return jnp.repeat(heads, HEADS // num_kv_heads, axis=0).reshape(-1, *parameter.shape[1:])
