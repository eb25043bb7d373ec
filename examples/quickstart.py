# SPDX-License-Identifier: Apache-2.0
"""Attention in ten lines: the call of `jax.nn.dot_product_attention`, on the flash kernel."""

import jax
import jax.numpy as jnp

import eqx_flash

query_key, key_key, value_key = jax.random.split(jax.random.key(0), 3)
query = jax.random.normal(query_key, (2, 1024, 8, 64), jnp.bfloat16)  # batch, sequence, heads, size
key = jax.random.normal(key_key, (2, 1024, 2, 64), jnp.bfloat16)  # each for 4 query heads
value = jax.random.normal(value_key, (2, 1024, 2, 64), jnp.bfloat16)

out = eqx_flash.dot_product_attention(query, key, value, is_causal=True)
expected = jax.nn.dot_product_attention(query, key, value, is_causal=True)

print(eqx_flash.explain(query, key, value, is_causal=True))
print("output", out.shape, out.dtype, "differs from jax.nn by at most", abs(out - expected).max())
