# SPDX-License-Identifier: Apache-2.0
"""What several test files share: shapes, inputs, the formula to compare with, a tolerance.

Here `tests/` is on the path: `from common import SHAPES, plain_attention`.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqx_flash._spec import AttentionSpec


class Shape(NamedTuple):
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    heads_k: int
    head_dim: int

    @property
    def query(self):
        return (self.batch, self.seq_q, self.heads, self.head_dim)

    @property
    def key_value(self):
        return (self.batch, self.seq_k, self.heads_k, self.head_dim)

    @property
    def scores(self):
        return (self.batch, self.heads, self.seq_q, self.seq_k)


# Small, each for a reason. As `@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)`.
SHAPES = {
    "square": Shape(2, 32, 32, 2, 2, 16),
    "grouped": Shape(2, 34, 47, 6, 2, 8),  # lengths that no tile divides, heads in threes
    "shared": Shape(1, 47, 33, 4, 1, 8),  # more queries than keys, one key/value head
    "decode": Shape(3, 1, 65, 4, 2, 16),
    "one_key": Shape(2, 19, 1, 2, 2, 8),
}


@contextlib.contextmanager
def quick_compilation():
    """For tests that compile much and run little: twice as fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def temporary_bytes(fn, *arguments: jax.ShapeDtypeStruct) -> int:
    """Memory that compiled `fn` takes beside its arguments and results. Runs nothing."""
    analysis = jax.jit(fn).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def generator(key: jax.Array) -> np.random.Generator:
    """NumPy's random numbers, as JAX would spend seconds on compiling its own for each shape."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def random_qkv(key: jax.Array, shape: Shape, dtype=jnp.float32):
    """Standard normal q, k, v."""
    rng = generator(key)
    shapes = (shape.query, shape.key_value, shape.key_value)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def visible(spec: AttentionSpec, seq_q: int, seq_k: int) -> np.ndarray:
    """[seq_q, seq_k]: which keys causality and window let each query see."""
    position = np.arange(seq_q)[:, None] + spec.diagonal(seq_q, seq_k)
    s = np.arange(seq_k)
    left, right = spec.window or (None, None)
    seen = np.ones((seq_q, seq_k), bool)
    if spec.causal:
        seen &= s <= position
    if left is not None:
        seen &= s >= position - left
    if right is not None:
        seen &= s <= position + right
    return seen


def plain_attention(
    spec, q, k, v, bias=None, mask=None, query_lengths=None, key_value_lengths=None
):
    """`eqx_flash._reference.forward` as the formula says it: all scores at once, in q's dtype.

    Give it float64 for exact values and, by autodiff, exact gradients.
    """
    (_, seq_q, heads, _), (_, seq_k, heads_k, _) = q.shape, k.shape
    k, v = (jnp.repeat(x, heads // heads_k, axis=2) for x in (k, v))
    scores = spec.scale * jnp.einsum("btnh,bsnh->bnts", q, k)
    seen = jnp.broadcast_to(visible(spec, seq_q, seq_k), scores.shape)
    if bias is not None:
        scores += bias.astype(scores.dtype)
        seen &= bias > -jnp.inf
    if mask is not None:
        seen &= mask
    if query_lengths is not None:
        seen &= jnp.arange(seq_q, dtype=jnp.int32)[:, None] < query_lengths[:, None, None, None]
    if key_value_lengths is not None:
        seen &= jnp.arange(seq_k, dtype=jnp.int32) < key_value_lengths[:, None, None, None]
    # Derivatives meet no infinity: empty rows and unseen keys are cut out before exp and log.
    empty = ~jnp.any(seen, axis=-1, keepdims=True)
    finite = jnp.where(seen, scores, 0)
    row_max = jax.lax.stop_gradient(
        jnp.max(finite, axis=-1, keepdims=True, initial=-1e4, where=seen)
    )
    p = jnp.where(seen, jnp.exp(finite - row_max), 0)
    row_sum = jnp.where(empty, 1, jnp.sum(p, axis=-1, keepdims=True))
    out = jnp.einsum("bnts,bsnh->btnh", p / row_sum, v)
    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))
    return out, lse[..., 0]


def assert_as_accurate(ours, plain, exact, *, factor=2.0):
    """FlashAttention's rule: `ours` is off `exact` by at most `factor` times what `plain`, the
    plain formula in the same low precision, is off, plus the rounding of the result."""
    eps = float(jnp.finfo(ours.dtype).eps)
    ours, plain, exact = (np.asarray(x, np.float64) for x in (ours, plain, exact))
    error, allowed = (np.abs(x - exact).max(initial=0) for x in (ours, plain))
    rounding = eps * np.abs(exact).max(initial=0)
    assert error <= factor * allowed + rounding, f"off by {error}, the plain formula by {allowed}"


def markdown_table(corner: str, cells: dict[tuple[str, str], str]) -> str:
    """`cells[row, column]`, rows and columns in the order in which they come."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [
        [corner, *columns],
        *([row, *(cells.get((row, x), "") for x in columns)] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |\n"
        for line in lines
    )
