# SPDX-License-Identifier: Apache-2.0
"""Rotary position embeddings."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class RotaryEmbedding(eqx.Module):
    r"""Rotary position embeddings: turns each query and key by angles that grow with its position,
    so that attention scores depend on positions only through their differences.

    In an embedding of size $d$ at position $t$, channels $i$ and $i + d/2$ form a pair that is
    turned by the angle $t \theta_i$:

    $$\begin{pmatrix} x_i \\ x_{i + d/2} \end{pmatrix} \mapsto
      \begin{pmatrix} \cos t\theta_i & -\sin t\theta_i \\ \sin t\theta_i & \cos t\theta_i
      \end{pmatrix} \begin{pmatrix} x_i \\ x_{i + d/2} \end{pmatrix},
      \qquad \theta_i = \theta^{-2i/d}, \quad 0 \le i < d/2.$$

    !!! example

        ```python
        rotary = eqx_flash.nn.RotaryEmbedding(embedding_size=64)
        out = attention(
            x, x, x, process_heads=lambda query, key, value: (rotary(query), rotary(key), value)
        )
        ```

    !!! info

        Channels pair up across the two halves, as in Llama, GPT-NeoX and
        [`equinox.nn.RotaryPositionalEmbedding`][]. The paper and GPT-J pair neighbours $2i$ and
        $2i + 1$; permuting the rows of the query and key projections converts between the two.

    ??? cite

        [RoFormer: Enhanced Transformer with Rotary Position
        Embedding](https://arxiv.org/abs/2104.09864), section 3.4, Su et al., 2021.
    """

    embedding_size: int = eqx.field(static=True)
    theta: float = eqx.field(static=True)

    def __init__(self, embedding_size: int, theta: float = 10_000.0):
        r"""**Arguments:**

        - `embedding_size`: Channels of each head. Must be even.
        - `theta`: $\theta$ above. The slowest pair takes about `2 * pi * theta` positions for one
            turn, so that longer contexts need a larger one.
        """
        if embedding_size < 2 or embedding_size % 2 != 0:
            raise ValueError(
                f"embedding_size: expected an even number of at least 2, got {embedding_size}"
            )
        if not theta > 0:
            raise ValueError(f"theta: expected a number above 0, got {theta}")
        self.embedding_size = embedding_size
        self.theta = theta

    @jax.named_scope("eqx_flash.nn.RotaryEmbedding")
    def __call__(
        self,
        x: Float[Array, "seq *heads embedding_size"],
        positions: Int[Array, " seq"] | None = None,
    ) -> Float[Array, "seq *heads embedding_size"]:
        """**Arguments:**

        - `x`: One sequence of queries or keys, `[seq, embedding_size]` or `[seq, heads,
            embedding_size]`.
        - `positions`: Where each of them stands in its text. Defaults to `0, 1, 2, ...`; give it
            for packed texts, left padding, or when decoding token by token.

        **Returns:**

        `x`, turned. Computed in float32 at least, and returned in the dtype of `x`.
        """
        if x.ndim < 2 or x.shape[-1] != self.embedding_size:
            raise ValueError(
                f"x: expected shape [seq, heads, embedding_size={self.embedding_size}] or "
                f"[seq, embedding_size={self.embedding_size}], got {x.shape}; "
                f"map over a batch with jax.vmap"
            )
        if positions is None:
            positions = jnp.arange(x.shape[0])
        if positions.shape != x.shape[:1] or not jnp.issubdtype(positions.dtype, jnp.integer):
            raise ValueError(
                f"positions: expected one integer for each of the {x.shape[0]} places of x, "
                f"got {positions.dtype} of shape {positions.shape}"
            )

        # bfloat16 cannot tell position 257 from 256.
        dtype = np.promote_types(x.dtype, np.float32)
        # Constants, hence worked out in float64 and rounded once. No cache outlives the call.
        exponents = np.arange(0, self.embedding_size, 2) / self.embedding_size
        frequencies = jnp.asarray(self.theta**-exponents, dtype)
        angles = jnp.outer(positions.astype(dtype), frequencies)
        angles = jnp.expand_dims(angles, tuple(range(1, x.ndim - 1)))  # the same for all heads
        cos, sin = jnp.cos(angles), jnp.sin(angles)

        first, second = jnp.split(x.astype(dtype), 2, axis=-1)
        turned = (first * cos - second * sin, first * sin + second * cos)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
