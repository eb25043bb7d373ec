# SPDX-License-Identifier: Apache-2.0
"""Arrays of more than 2^31 elements, and more tiles than a grid's y axis could count."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.large]

BATCH, LONG, SHORT, HEADS, HEAD_DIM = 3, 100_000, 256, 64, 128
assert (BATCH - 1) * LONG * HEADS * HEAD_DIM < 2**31 < BATCH * LONG * HEADS * HEAD_DIM


def large(seed: int, seq: int):
    """Random enough: all (batch, position, head) differ, and nothing larger is built on the way."""

    @jax.jit
    def build():
        keys = jax.random.split(jax.random.key(seed), 2)
        entries = jax.random.normal(keys[0], (BATCH, 1, HEADS, HEAD_DIM))
        positions = jax.random.normal(keys[1], (1, seq, 1, HEAD_DIM))
        return ((entries + positions) / 2**0.5).astype(jnp.bfloat16)

    return build()


# (batch, head) of corners of the arrays.
CORNERS = [(0, 0), (1, 33), (BATCH - 1, HEADS - 1)]


@pytest.mark.parametrize("mask", ["full", "bottom_right"])
def test_many_queries(mask):
    q, k, v = large(0, LONG), large(1, SHORT), large(2, SHORT)
    out, lse = oracle.flash(q, k, v, mask)
    for batch, head in CORNERS:
        if mask == "bottom_right":  # the last SHORT queries see keys, the first ones do not
            assert not np.asarray(out[batch, :SHORT, head]).any()
            assert np.all(np.asarray(lse[batch, head, :SHORT]) == -np.inf)
        one = slice(batch, batch + 1), slice(None), slice(head, head + 1)
        # Cut from the end of the queries, a block keeps its place on the diagonal.
        for start in (0, LONG - 2 * SHORT) if mask == "full" else (LONG - 2 * SHORT,):
            rows = slice(start, start + 2 * SHORT)
            oracle.assert_close(
                q[one[0], rows, one[2]],
                k[one],
                v[one],
                out[one[0], rows, one[2]],
                lse[one[0], one[2], rows],
                mask,
            )


@pytest.mark.parametrize("mask", ["full", "bottom_right"])
def test_many_keys(mask):
    q, k, v = large(0, SHORT), large(1, LONG), large(2, LONG)
    out, lse = oracle.flash(q, k, v, mask)
    for batch, head in CORNERS:
        one = slice(batch, batch + 1), slice(None), slice(head, head + 1)
        oracle.assert_close(q[one], k[one], v[one], out[one], lse[one[0], one[2]], mask)


def test_many_short_heads():
    """Ten times the heads that fit 16 bits, each with less than a tile of work."""
    q, k, v = map(jnp.asarray, oracle.random_qkv("float16", 1024, 5, 7, 640, 640, 8))
    out, lse = oracle.flash(q, k, v)
    for batch in (0, 511, 1023):
        one = slice(batch, batch + 1)
        oracle.assert_close(q[one], k[one], v[one], out[one], lse[one])
