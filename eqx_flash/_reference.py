# SPDX-License-Identifier: Apache-2.0
"""Attention in plain JAX, in memory linear in both sequence lengths.

The path of every platform without a kernel, and what the kernel is tested against. Scores exist one
tile at a time: some queries by some keys (Rabe & Staats 2021). `forward` is the online softmax of
FlashAttention-2 (Dao 2023, section 3.1); `backward` recomputes a tile's probabilities from the
log-sum-exp (section 3.2). Both are plain JAX code that can be differentiated once more, which then
takes memory for all tiles.

Inside, arrays are head-major and query heads are split by the key/value head they share:
q, out [batch, heads_k, group, seq_q, head_dim], k, v [batch, heads_k, seq_k, head_dim], lse and
delta [batch, heads_k, group, seq_q, 1], scores [batch, heads_k, group, seq_q, seq_k].
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ._spec import AttentionSpec
from ._types import Bias, KeyValue, Lengths, LogSumExp, Mask, Query

# The longest side of a tile. Large tiles cost memory, small ones a GPU many launches. On a CPU the
# backward pass is a fifth faster with 256 and a third slower with 1024; forward, 256 equals 512.
_MAX_BLOCK = 512

# Of the axes batch, heads_k and group, which are never cut. All indices must have one dtype.
_ORIGIN = (np.int32(0),) * 3


def forward(
    spec: AttentionSpec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    bias: Bias | None = None,
    mask: Mask | None = None,
    query_lengths: Lengths | None = None,
    key_value_lengths: Lengths | None = None,
) -> tuple[Query, LogSumExp]:
    """Attention, and the log-sum-exp of each row of scores.

    **Arguments:**

    - `spec`: What to compute; `spec.dispatch` plays no part here.
    - `bias`: Added to the scaled scores.
    - `mask`: True where a query may see a key.
    - `query_lengths`, `key_value_lengths`: What lies beyond may be anything, even NaN.

    Under `jax.shard_map` all arrays must vary over the same mesh axes.

    **Returns:**

    `(out, lse)`. A query that may see no key gets 0 and minus infinity.
    """
    dtype = _accumulator(q)
    heads_k = k.shape[2]
    q, k, v = _group_heads(q, heads_k), _heads_first(k), _heads_first(v)
    v = _zero_beyond(key_value_lengths, v)
    tiles = _Tiles.covering(spec, q, k)
    scores = tiles.scores(bias, mask, query_lengths, key_value_lengths)

    def step(state, start):
        row_max, row_sum, acc = (tiles.rows(x, start) for x in state)
        s = scores(start, tiles.rows(q, start), tiles.cols(k, start))
        # The result does not depend on what is subtracted, hence neither do derivatives.
        new_max = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True, initial=-jnp.inf))
        new_max = jnp.maximum(row_max, new_max)
        # Nothing seen so far: -inf - (-inf) would be NaN.
        anchor = jnp.where(new_max == -jnp.inf, 0, new_max)
        p = jnp.exp(s - anchor)
        rescale = jnp.exp(row_max - anchor)
        row_sum = rescale * row_sum + jnp.sum(p, axis=-1, keepdims=True)
        pv = _einsum("bkgts,bksh->bkgth", p.astype(v.dtype), tiles.cols(v, start))
        update = (new_max, row_sum, rescale * acc + pv)
        return tuple(tiles.set_rows(x, start, y) for x, y in zip(state, update, strict=True)), None

    row = (*q.shape[:-1], 1)
    state = (
        lax.full_like(q, -jnp.inf, dtype, row),
        lax.full_like(q, 0, dtype, row),
        lax.full_like(q, 0, dtype),
    )
    (row_max, row_sum, acc), _ = lax.scan(step, state, tiles.starts())
    # Where nothing was seen, 0 / 1 and not 0 / 0, also in the derivatives.
    empty = row_sum == 0
    row_sum = jnp.where(empty, 1, row_sum)
    lse = jnp.where(empty, -jnp.inf, row_max + jnp.log(row_sum))
    return _ungroup_heads(acc / row_sum).astype(q.dtype), _ungroup_lse(lse)


def backward(
    spec: AttentionSpec,
    q: Query,
    k: KeyValue,
    v: KeyValue,
    out: Query,
    lse: LogSumExp,
    dout: Query,
    dlse: LogSumExp | None = None,
    bias: Bias | None = None,
    mask: Mask | None = None,
    query_lengths: Lengths | None = None,
    key_value_lengths: Lengths | None = None,
) -> tuple[Query, KeyValue, KeyValue, Bias | None]:
    """The gradients of `forward`.

    **Arguments:**

    - `out`, `lse`: What `forward` returned.
    - `dout`, `dlse`: Their cotangents. Of a query that sees no key, they may be anything, even NaN.
        `dlse=None` stands for zeros.
    - The others: As in `forward`.

    **Returns:**

    `(dq, dk, dv, dbias)`, the last with the shape of `bias`, not of the scores.
    """
    dtype = lse.dtype
    heads_k = k.shape[2]
    q, out, dout = (_group_heads(x, heads_k) for x in (q, out, dout))
    k, v = (_zero_beyond(key_value_lengths, _heads_first(x)) for x in (k, v))
    lse = _group_lse(lse, heads_k)
    # A query that sees no key takes no part: its probabilities become exp(-inf - 0).
    alive = lse > -jnp.inf
    q, out, dout, lse = (jnp.where(alive, x, 0) for x in (q, out, dout, lse))
    # With P = exp(S - lse): dS = P * (dP - rowsum(P * dP)) + P * dlse, and rowsum(P * dP) = dO . O.
    delta = jnp.sum(dout.astype(dtype) * out.astype(dtype), axis=-1, keepdims=True)
    if dlse is not None:
        delta -= jnp.where(alive, _group_lse(dlse, heads_k), 0)
    tiles = _Tiles.covering(spec, q, k)
    scores = tiles.scores(bias, mask, query_lengths, key_value_lengths)

    def step(grads, start):
        dq, dk, dv, dbias = grads
        q_tile, dout_tile = tiles.rows(q, start), tiles.rows(dout, start)
        k_tile, v_tile = tiles.cols(k, start), tiles.cols(v, start)
        p = jnp.exp(scores(start, q_tile, k_tile) - tiles.rows(lse, start))
        dp = _einsum("bkgth,bksh->bkgts", dout_tile, v_tile)
        ds = p * (dp - tiles.rows(delta, start))
        dv = tiles.add_cols(dv, start, _einsum("bkgts,bkgth->bksh", p.astype(v.dtype), dout_tile))
        if dbias is not None:
            dbias = tiles.add_tile(dbias, start, ds)
        ds = ds.astype(q.dtype)
        dk = tiles.add_cols(dk, start, _einsum("bkgts,bkgth->bksh", ds, q_tile))
        dq = tiles.add_rows(dq, start, _einsum("bkgts,bksh->bkgth", ds, k_tile))
        return (dq, dk, dv, dbias), None

    grads = (
        lax.full_like(q, 0, dtype),
        lax.full_like(k, 0, dtype),
        lax.full_like(v, 0, dtype),
        None if bias is None else lax.full_like(q, 0, dtype, _group_scores(bias, heads_k).shape),
    )
    (dq, dk, dv, dbias), _ = lax.scan(step, grads, tiles.starts())
    if bias is not None and dbias is not None:
        dbias = dbias.reshape(bias.shape).astype(bias.dtype)
    return (
        _ungroup_heads(spec.scale * dq).astype(q.dtype),
        _heads_first(spec.scale * dk).astype(k.dtype),
        _heads_first(dv).astype(v.dtype),
        dbias,
    )


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How the scores are cut, and what of them causality and window let through.

    A `start` is the first query and the first key of a tile. The last tiles may reach beyond the
    end: `lax.dynamic_slice` then moves them back to where they fit, and the queries and keys that
    they have in common with the tiles before are masked. So nothing is padded, nothing copied.
    """

    spec: AttentionSpec
    seq_q: int
    seq_k: int
    block_q: int
    block_k: int
    lowest: int
    """Query t may see key s if lowest <= s - t <= highest."""
    highest: int

    @classmethod
    def covering(cls, spec: AttentionSpec, q: Array, k: Array) -> _Tiles:
        seq_q, seq_k = q.shape[-2], k.shape[-2]
        lowest, highest = -seq_q, seq_k  # no bounds
        diagonal = spec.diagonal(seq_q, seq_k)
        left, right = spec.window or (None, None)
        if left is not None:
            lowest = max(lowest, diagonal - left)
        if right is not None:
            highest = min(highest, diagonal + right)
        if spec.causal:
            highest = min(highest, diagonal)
        return cls(spec, seq_q, seq_k, _even_block(seq_q), _even_block(seq_k), lowest, highest)

    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """The tiles in which some query may see some key. Known at trace time, so that the scan
        over them can be differentiated, as a loop with traced bounds cannot."""
        t = np.arange(0, max(self.seq_q, 1), max(self.block_q, 1), dtype=np.int32)[:, None]
        s = np.arange(0, max(self.seq_k, 1), max(self.block_k, 1), dtype=np.int32)[None, :]
        i, j = np.nonzero(
            (s + self.block_k - 1 - t >= self.lowest) & (s - (t + self.block_q - 1) <= self.highest)
        )
        return t[i, 0], s[0, j]

    def scores(self, bias, mask, query_lengths, key_value_lengths):
        """The function `(start, q_tile, k_tile) -> scores`, minus infinity where invisible."""

        def scores(start, q_tile, k_tile):
            s = self.spec.scale * _einsum("bkgth,bksh->bkgts", q_tile, k_tile)
            heads_k = k_tile.shape[1]
            if bias is not None:
                s += self.tile(_group_scores(bias, heads_k), start).astype(s.dtype)
            for visible in self._visible(start, query_lengths, key_value_lengths):
                s = jnp.where(visible, s, -jnp.inf)
            if mask is not None:
                s = jnp.where(self.tile(_group_scores(mask, heads_k), start), s, -jnp.inf)
            return s

        return scores

    def _visible(self, start, query_lengths, key_value_lengths):
        first_t, first_s = start
        t = jnp.minimum(first_t, self.seq_q - self.block_q) + _iota(self.block_q)[:, None]
        s = jnp.minimum(first_s, self.seq_k - self.block_k) + _iota(self.block_k)
        if self.block_q and self.seq_q % self.block_q:
            yield t >= first_t
        if self.block_k and self.seq_k % self.block_k:
            yield s >= first_s
        if self.lowest > 1 - self.seq_q:
            yield s - t >= self.lowest
        if self.highest < self.seq_k - 1:
            yield s - t <= self.highest
        if query_lengths is not None:
            yield t < query_lengths[:, None, None, None, None]
        if key_value_lengths is not None:
            yield s < key_value_lengths[:, None, None, None, None]

    def rows(self, x: Array, start) -> Array:
        return lax.dynamic_slice_in_dim(x, start[0], self.block_q, axis=-2)

    def cols(self, x: Array, start) -> Array:
        return lax.dynamic_slice_in_dim(x, start[1], self.block_k, axis=-2)

    def set_rows(self, x: Array, start, update: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, update, start[0], axis=-2)

    def add_rows(self, x: Array, start, update: Array) -> Array:
        return self.set_rows(x, start, self.rows(x, start) + update)

    def add_cols(self, x: Array, start, update: Array) -> Array:
        update += self.cols(x, start)
        return lax.dynamic_update_slice_in_dim(x, update, start[1], axis=-2)

    def tile(self, x: Array, start) -> Array:
        """From `x`, broadcastable to the scores. A start is moved to 0 along an axis of size 1."""
        *outer, seq_q, seq_k = x.shape
        sizes = (*outer, min(self.block_q, seq_q), min(self.block_k, seq_k))
        return lax.dynamic_slice(x, (*_ORIGIN, *start), sizes)

    def add_tile(self, x: Array, start, update: Array) -> Array:
        broadcast = tuple(axis for axis, size in enumerate(x.shape) if size == 1)
        update = self.tile(x, start) + jnp.sum(update, axis=broadcast, keepdims=True)
        return lax.dynamic_update_slice(x, update, (*_ORIGIN, *start))


def _even_block(length: int) -> int:
    """The size of the fewest blocks up to `_MAX_BLOCK` that share `length` evenly."""
    blocks = max(1, -(-length // _MAX_BLOCK))
    return -(-length // blocks)


def _einsum(subscripts: str, x: Array, y: Array) -> Array:
    """Multiplies in the inputs' dtype and sums in at least float32, like the tensor cores."""
    return jnp.einsum(subscripts, x, y, preferred_element_type=_accumulator(x))


def _accumulator(x: Array) -> np.dtype:
    return np.dtype("float64" if x.dtype == np.float64 else "float32")


def _iota(size: int) -> Array:
    return jnp.arange(size, dtype=jnp.int32)


def _heads_first(x: Array) -> Array:
    """[batch, seq, heads, head_dim] <-> [batch, heads, seq, head_dim]"""
    return jnp.swapaxes(x, 1, 2)


def _group_heads(x: Array, heads_k: int) -> Array:
    """[batch, seq, heads, head_dim] -> [batch, heads_k, group, seq, head_dim]"""
    batch, seq, heads, head_dim = x.shape
    return _heads_first(x).reshape(batch, heads_k, heads // heads_k, seq, head_dim)


def _ungroup_heads(x: Array) -> Array:
    batch, heads_k, group, seq, head_dim = x.shape
    return _heads_first(x.reshape(batch, heads_k * group, seq, head_dim))


def _group_lse(x: Array, heads_k: int) -> Array:
    """[batch, heads, seq] -> [batch, heads_k, group, seq, 1]"""
    batch, heads, seq = x.shape
    return x.reshape(batch, heads_k, heads // heads_k, seq, 1)


def _ungroup_lse(x: Array) -> Array:
    batch, heads_k, group, seq, _ = x.shape
    return x.reshape(batch, heads_k * group, seq)


def _group_scores(x: Array, heads_k: int) -> Array:
    """[batch, heads, seq_q, seq_k] -> [batch, heads_k, group, seq_q, seq_k]; each may be 1"""
    batch, heads, seq_q, seq_k = x.shape
    heads_k = min(heads_k, heads)
    return x.reshape(batch, heads_k, heads // heads_k, seq_q, seq_k)


def _zero_beyond(lengths: Array | None, x: Array) -> Array:
    """Clears keys or values past their length, as 0 * NaN is not 0."""
    if lengths is None:
        return x
    return jnp.where(_iota(x.shape[2])[:, None] < lengths[:, None, None, None], x, 0)
