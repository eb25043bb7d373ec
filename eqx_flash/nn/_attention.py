# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention as an Equinox module."""

import math
import warnings
from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from .. import _checks
from .._dot_product_attention import Window, dot_product_attention
from .._spec import CHECKPOINT_NAMES

Mask = Bool[Array, "q_seq kv_seq"] | Bool[Array, "num_heads q_seq kv_seq"]
Heads = tuple[Array, Array, Array]
Sides = tuple[int | None, int | None]
ProcessHeads = Callable[
    [
        Float[Array, "q_seq num_heads qk_size"],
        Float[Array, "kv_seq num_kv_heads qk_size"],
        Float[Array, "kv_seq num_kv_heads vo_size"],
    ],
    tuple[
        Float[Array, "q_seq num_heads qk_size"],
        Float[Array, "kv_seq num_kv_heads qk_size"],
        Float[Array, "kv_seq num_kv_heads vo_size"],
    ],
]

COMPUTE_DTYPES = tuple(map(np.dtype, (jnp.bfloat16, np.float16, np.float32, np.float64)))


class MultiheadAttention(eqx.Module):
    r"""Multi-head attention that never stores the attention weights: a drop-in replacement for
    [`equinox.nn.MultiheadAttention`][], with grouped-query attention, a causal flag, a window,
    normalised queries and keys, and a dtype to compute in.

    $$\text{MultiheadAttention}(Q, K, V)
      = \sum_i \text{softmax}\left(\frac{QW^Q_i (KW^K_{g(i)})^\intercal}{\sqrt{d_\text{qk}}}\right)
        VW^V_{g(i)} W^O_i$$

    where $i$ runs over the query heads, and $g(i) = \lfloor i\, h_\text{kv} / h \rfloor$ is the
    key/value head that query head $i$ shares with its neighbours; $h$ is `num_heads` and
    $h_\text{kv}$ is `num_kv_heads`. If they are equal, $g(i) = i$: the same function as Equinox's
    layer, with the same parameters, bit by bit, for the same `key`.

    !!! example

        ```python
        attention = eqx_flash.nn.MultiheadAttention(num_heads=8, query_size=512, key=key)
        out = jax.vmap(attention)(x, x, x)  # x: [batch, sequence, 512]
        ```

        The layer takes one sequence. `jax.vmap` over a batch is one kernel call, not a loop.

    !!! info

        Two things to know when coming from Equinox's layer.

        - A query that may see no key gets zeros from the attention; Equinox's gets the mean of all
            values.
        - While dropout is active the attention weights *are* stored, because they are what is
            dropped. A warning says so, and `implementation="flash"` refuses.

    ??? cite

        [Attention is All You Need](https://arxiv.org/abs/1706.03762),
        [FlashAttention-3](https://arxiv.org/abs/2407.08608),
        [GQA: Training Generalized Multi-Query Transformer Models](https://arxiv.org/abs/2305.13245)
    """

    # Names and order are Equinox's, so that `tree_at` paths and serialised leaves carry over.
    query_proj: eqx.nn.Linear
    key_proj: eqx.nn.Linear
    value_proj: eqx.nn.Linear
    output_proj: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    # None has no leaves, and what has some comes last.
    query_norm: eqx.nn.RMSNorm | None
    key_norm: eqx.nn.RMSNorm | None

    num_heads: int = eqx.field(static=True)
    query_size: int = eqx.field(static=True)
    key_size: int = eqx.field(static=True)
    value_size: int = eqx.field(static=True)
    output_size: int = eqx.field(static=True)
    qk_size: int = eqx.field(static=True)
    vo_size: int = eqx.field(static=True)
    use_query_bias: bool = eqx.field(static=True)
    use_key_bias: bool = eqx.field(static=True)
    use_value_bias: bool = eqx.field(static=True)
    use_output_bias: bool = eqx.field(static=True)
    num_kv_heads: int = eqx.field(static=True)
    is_causal: bool = eqx.field(static=True)
    local_window_size: Sides | None = eqx.field(static=True)
    compute_dtype: np.dtype | None = eqx.field(static=True)
    implementation: Literal["flash", "xla"] | None = eqx.field(static=True)
    checkpoint_names: tuple[str, str] = eqx.field(static=True)

    def __init__(
        self,
        num_heads: int,
        query_size: int,
        key_size: int | None = None,
        value_size: int | None = None,
        output_size: int | None = None,
        qk_size: int | None = None,
        vo_size: int | None = None,
        use_query_bias: bool = False,
        use_key_bias: bool = False,
        use_value_bias: bool = False,
        use_output_bias: bool = False,
        dropout_p: float = 0.0,
        inference: bool = False,
        dtype: DTypeLike | None = None,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        local_window_size: Window | None = None,
        use_qk_norm: bool = False,
        compute_dtype: DTypeLike | None = None,
        implementation: Literal["flash", "xla"] | None = None,
        checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `num_heads`: Number of query heads.
        - `query_size`, `key_size`, `value_size`: Channels of the three inputs. The last two default
            to `query_size`.
        - `output_size`: Channels of the output. Defaults to `query_size`.
        - `qk_size`, `vo_size`: Channels of each query and key head, and of each value head. Both
            default to `query_size // num_heads`.
        - `use_query_bias`, `use_key_bias`, `use_value_bias`, `use_output_bias`: Whether that
            projection adds a bias.
        - `dropout_p`: Probability with which an attention weight is dropped.
        - `inference`: If `True`, nothing is dropped. [`equinox.nn.inference_mode`][] toggles it.
        - `dtype`: Of the parameters. Defaults to JAX's default float.
        - `num_kv_heads`: Number of key and value heads, a divisor of `num_heads` (grouped-query
            attention; 1 is multi-query attention). Defaults to `num_heads`.
        - `is_causal`: Whether a query sees only keys at or before its own position, counted from
            the start of both sequences.
        - `local_window_size`: How many positions to the `(left, right)` of its own, inclusive, a
            query may see; `None` for an unbounded side. A single integer stands for both sides.
        - `use_qk_norm`: Whether to divide each query head and each key head by its root mean
            square, and to multiply it by a learned weight `[qk_size]`, before `process_heads`, as
            in Qwen3. These are `query_norm` and `key_norm`, [`equinox.nn.RMSNorm`][]s that compute
            in float32 at least; to change their `eps=1e-6`, replace them by
            [`equinox.tree_at`][].
        - `compute_dtype`: What inputs and projections are cast to inside the call, and the dtype of
            the output: with `jnp.bfloat16` the kernel serves float32 parameters, and their
            gradients stay float32. Defaults to the dtype of inputs and parameters.
        - `implementation`: `"flash"` (the Hopper kernel, or an error), `"xla"` (plain JAX), or
            `None` (the kernel where it can serve the call), as in
            [`eqx_flash.dot_product_attention`][].
        - `checkpoint_names`: What policies of `jax.checkpoint` call the attended values of all
            heads and their log-sum-exp, as there. Active dropout names nothing.
        - `key`: Random key for the initialisation of the parameters.

        **Raises:**

        `ValueError` for a value that does not fit, `TypeError` for a `local_window_size` that is
        not made of integers, a `compute_dtype` that is not a dtype, or `checkpoint_names` that are
        not two names.
        """
        if num_heads < 1:
            raise ValueError(f"num_heads: expected at least 1, got {num_heads}")
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}; "
                f"each key/value head serves the same number of query heads"
            )
        key_size = query_size if key_size is None else key_size
        value_size = query_size if value_size is None else value_size
        output_size = query_size if output_size is None else output_size
        qk_size = query_size // num_heads if qk_size is None else qk_size
        vo_size = query_size // num_heads if vo_size is None else vo_size
        for name, size in (("qk_size", qk_size), ("vo_size", vo_size)):
            if size < 1:
                raise ValueError(
                    f"{name}: expected at least 1, got {size}; "
                    f"the default is query_size // num_heads = {query_size} // {num_heads}"
                )
        if not 0 <= dropout_p <= 1:
            raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p}")
        local_window_size = _checks.window(local_window_size)
        compute_dtype = _check_compute_dtype(compute_dtype)
        checkpoint_names = _checks.checkpoint_names(checkpoint_names)

        def linear(in_size: int, out_size: int, use_bias: bool, key: PRNGKeyArray) -> eqx.nn.Linear:
            return eqx.nn.Linear(in_size, out_size, use_bias=use_bias, dtype=dtype, key=key)

        def norm() -> eqx.nn.RMSNorm:
            return eqx.nn.RMSNorm(qk_size, eps=1e-6, use_bias=False, dtype=dtype)

        qkey, kkey, vkey, okey = jax.random.split(key, 4)
        self.query_proj = linear(query_size, num_heads * qk_size, use_query_bias, qkey)
        self.key_proj = linear(key_size, num_kv_heads * qk_size, use_key_bias, kkey)
        self.value_proj = linear(value_size, num_kv_heads * vo_size, use_value_bias, vkey)
        self.output_proj = linear(num_heads * vo_size, output_size, use_output_bias, okey)
        self.dropout = eqx.nn.Dropout(dropout_p, inference=inference)
        self.query_norm = norm() if use_qk_norm else None
        self.key_norm = norm() if use_qk_norm else None

        self.num_heads = num_heads
        self.query_size = query_size
        self.key_size = key_size
        self.value_size = value_size
        self.output_size = output_size
        self.qk_size = qk_size
        self.vo_size = vo_size
        self.use_query_bias = use_query_bias
        self.use_key_bias = use_key_bias
        self.use_value_bias = use_value_bias
        self.use_output_bias = use_output_bias
        self.num_kv_heads = num_kv_heads
        self.is_causal = is_causal
        self.local_window_size = local_window_size
        self.compute_dtype = compute_dtype
        self.implementation = _checks.implementation(implementation)
        self.checkpoint_names = checkpoint_names

    @jax.named_scope("eqx_flash.nn.MultiheadAttention")
    def __call__(
        self,
        query: Float[Array, "q_seq query_size"],
        key_: Float[Array, "kv_seq key_size"],
        value: Float[Array, "kv_seq value_size"],
        mask: Mask | None = None,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: ProcessHeads | None = None,
    ) -> Float[Array, "q_seq output_size"]:
        """**Arguments:**

        - `query`, `key_`, `value`: One sequence each; map over a batch with `jax.vmap`.
        - `mask`: `True` where a query may see a key; one for all heads or one for each. Combined
            with `is_causal` and `local_window_size`.
        - `key`: Random key for dropout. Unused unless dropout is active.
        - `inference`: Overrides the `inference` flag of the layer.
        - `deterministic`: Deprecated name of `inference`.
        - `process_heads`: Takes the query, key and value heads, returns new ones of the same
            shapes; for example rotary position embeddings. With `compute_dtype`, it gets heads of
            that dtype, and what it returns is cast back to it.

        **Returns:**

        The attended values of all heads, through the output projection; in `compute_dtype` if that
        is given.

        **Raises:**

        `ValueError` for a shape or dtype that does not fit, `NotImplementedError` if
        `implementation="flash"` cannot serve the call, `RuntimeError` for active dropout without a
        `key`.
        """
        if deterministic is not None:
            warnings.warn(
                "MultiheadAttention()(deterministic=...) is deprecated; use inference=...",
                DeprecationWarning,
                stacklevel=2,
            )
            inference = deterministic
        self._check_inputs(query, key_, value, mask)

        query = self._project(self.query_proj, query, self.num_heads, self.qk_size)
        key_ = self._project(self.key_proj, key_, self.num_kv_heads, self.qk_size)
        value = self._project(self.value_proj, value, self.num_kv_heads, self.vo_size)
        heads: Heads = _normalise(self.query_norm, query), _normalise(self.key_norm, key_), value
        if process_heads is not None:
            heads = self._cast(_process(process_heads, heads))

        if self._drops_weights(inference):
            attended = self._attend_with_dropout(*heads, mask, key)
        else:
            attended = self._attend(*heads, mask)
        q_seq, num_heads, vo_size = attended.shape
        attended = attended.reshape(q_seq, num_heads * vo_size)
        return jax.vmap(self._cast(self.output_proj))(attended)

    @classmethod
    def from_equinox(
        cls,
        module: eqx.nn.MultiheadAttention,
        *,
        is_causal: bool = False,
        local_window_size: Window | None = None,
        compute_dtype: DTypeLike | None = None,
        implementation: Literal["flash", "xla"] | None = None,
        checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
    ) -> "MultiheadAttention":
        """The same layer on flash attention, sharing the parameters of `module`.

        **Arguments:**

        - `module`: An [`equinox.nn.MultiheadAttention`][].
        - `is_causal`, `local_window_size`, `compute_dtype`, `implementation`,
            `checkpoint_names`: As for the constructor. The causal mask or window that `module` was
            called with is then no longer needed.

        **Returns:**

        A layer with the parameters, dropout and sizes of `module`, hence without `use_qk_norm`.

        **Raises:**

        `TypeError` for another kind of module, and what the constructor raises.
        """
        if not isinstance(module, eqx.nn.MultiheadAttention):
            raise TypeError(
                f"module: expected an equinox.nn.MultiheadAttention, got {type(module).__name__}"
            )
        return _rebuild(
            cls,
            module,
            is_causal=is_causal,
            local_window_size=local_window_size,
            compute_dtype=compute_dtype,
            implementation=implementation,
            checkpoint_names=checkpoint_names,
        )

    def to_equinox(self, *, drop_is_causal: bool = False) -> eqx.nn.MultiheadAttention:
        """The same layer as an [`equinox.nn.MultiheadAttention`][], sharing the parameters.

        **Arguments:**

        - `drop_is_causal`: Equinox's layer has no causal flag. Say `True` to convert a causal layer
            nevertheless, and pass it `mask=jnp.tril(...)` at every call.

        **Returns:**

        A layer with the parameters, dropout and sizes of this one. It computes in the dtype of its
        inputs and parameters, whatever the `compute_dtype` here.

        **Raises:**

        `ValueError` for what Equinox's layer cannot do: `num_kv_heads` other than `num_heads`,
        `is_causal`, `local_window_size`, `use_qk_norm`.
        """
        if self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"num_kv_heads: expected num_heads={self.num_heads}, got {self.num_kv_heads}; "
                f"equinox.nn.MultiheadAttention has no grouped-query attention"
            )
        if self.is_causal and not drop_is_causal:
            raise ValueError(
                "is_causal: expected False, got True; equinox.nn.MultiheadAttention has no causal "
                "flag. Convert with drop_is_causal=True, and call it with mask=jnp.tril(...)"
            )
        if self.local_window_size is not None:
            raise ValueError(
                f"local_window_size: expected None, got {self.local_window_size}; "
                f"equinox.nn.MultiheadAttention has no window. Convert a layer without one, and "
                f"pass the window as the mask of each call"
            )
        if self.query_norm is not None or self.key_norm is not None:
            raise ValueError(
                "use_qk_norm: expected False, got True; equinox.nn.MultiheadAttention has no norms "
                "of queries and keys. Convert a layer without them, and normalise in process_heads"
            )
        return _rebuild(eqx.nn.MultiheadAttention, self)

    def _check_inputs(self, query: Array, key_: Array, value: Array, mask: Array | None):
        for name, x, channels, size in (
            ("query", query, "query_size", self.query_size),
            ("key_", key_, "key_size", self.key_size),
            ("value", value, "value_size", self.value_size),
        ):
            if x.ndim != 2 or x.shape[1] != size:
                raise ValueError(
                    f"{name}: expected shape [sequence, {channels}={size}], got {x.shape}; "
                    f"map over a batch with jax.vmap"
                )
        q_seq, kv_seq = query.shape[0], key_.shape[0]
        if value.shape[0] != kv_seq:
            raise ValueError(f"value: expected key_'s length {kv_seq}, got {value.shape[0]}")
        if mask is None:
            return
        if mask.dtype != bool:
            raise ValueError(f"mask: expected booleans (True takes part), got {mask.dtype}")
        if mask.shape not in ((q_seq, kv_seq), (self.num_heads, q_seq, kv_seq)):
            raise ValueError(
                f"mask: expected shape [q_seq, kv_seq] = {q_seq, kv_seq} or "
                f"[num_heads, q_seq, kv_seq] = {self.num_heads, q_seq, kv_seq}, got {mask.shape}"
            )

    def _cast(self, tree):
        """`tree` with its arrays in `compute_dtype`. Their gradients keep the dtypes of `tree`."""
        dtype = self.compute_dtype
        if dtype is None:
            return tree
        return jax.tree.map(lambda x: jnp.asarray(x, dtype) if _is_float_array(x) else x, tree)

    def _project(self, proj: eqx.nn.Linear, x: Array, num_heads: int, size: int) -> Array:
        return jax.vmap(self._cast(proj))(self._cast(x)).reshape(x.shape[0], num_heads, size)

    def _drops_weights(self, inference: bool | None) -> bool:
        """Whether [`equinox.nn.Dropout`][] would drop anything."""
        p = self.dropout.p
        if isinstance(p, int | float) and p == 0:
            return False
        return not (self.dropout.inference if inference is None else inference)

    def _attend(self, query: Array, key: Array, value: Array, mask: Array | None) -> Array:
        # The kernel has one head size. Zero channels change neither scores nor values.
        head_size = max(self.qk_size, self.vo_size)
        query, key, value = (_pad_channels(x, head_size) for x in (query, key, value))
        attended = dot_product_attention(
            query,
            key,
            value,
            mask=mask if mask is None or mask.ndim == 3 else mask[None],
            scale=1 / math.sqrt(self.qk_size),
            is_causal=self.is_causal,
            local_window_size=self.local_window_size,
            implementation=self.implementation,
            checkpoint_names=self.checkpoint_names,
        )
        return attended[..., : self.vo_size]

    def _attend_with_dropout(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None,
        dropout_key: PRNGKeyArray | None,
    ) -> Array:
        """Equinox's formula, random numbers included, on stored attention weights."""
        active = f"dropout (dropout_p={self.dropout.p}) is active"
        if self.implementation == "flash":
            raise NotImplementedError(
                f'implementation: "flash" cannot serve this call: {active}, and the kernel cannot '
                f"drop attention weights. Pass inference=True, build the layer with dropout_p=0, "
                f'or with implementation=None or "xla"'
            )
        if dropout_key is None:
            raise RuntimeError(f"key: expected a random key, got None; {active}. Or inference=True")
        if self.implementation is None:
            warnings.warn(
                f"MultiheadAttention stores the attention weights, and does not use the flash "
                f"kernel: {active}. Build the layer with dropout_p=0 to use the kernel, or with "
                f'implementation="xla" to accept this.',
                stacklevel=2,
            )

        key, value = (jnp.repeat(x, self.num_heads // self.num_kv_heads, 1) for x in (key, value))
        logits = jnp.einsum("qhd,khd->hqk", query / math.sqrt(self.qk_size), key)
        visible = jnp.ones_like(logits, bool) if mask is None else mask
        visible = visible & self._band(*logits.shape[1:])
        logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min)
        weights = jax.nn.softmax(logits.astype(np.promote_types(logits.dtype, np.float32)))
        # A row without a visible key comes out of the softmax uniform, and must be zero.
        weights = jnp.where(visible, weights, 0).astype(logits.dtype)
        keys = jax.random.split(dropout_key, self.num_heads)
        weights = jax.vmap(lambda w, k: self.dropout(w, key=k, inference=False))(weights, keys)
        return jnp.einsum("hqk,khd->qhd", weights, value)

    def _band(self, q_seq: int, kv_seq: int) -> Bool[Array, "q_seq kv_seq"]:
        """Which keys causality and the window let each query see."""
        left, right = self.local_window_size or (None, None)
        if self.is_causal:
            right = 0
        # Farther apart than this are no two positions; a larger number may not fit an int32.
        farthest = max(q_seq, kv_seq)
        left, right = (farthest if side is None else min(side, farthest) for side in (left, right))
        distance = jnp.arange(kv_seq) - jnp.arange(q_seq)[:, None]
        return (-left <= distance) & (distance <= right)


def _check_compute_dtype(compute_dtype: DTypeLike | None) -> np.dtype | None:
    if compute_dtype is None:
        return None
    try:
        dtype = jnp.dtype(compute_dtype)
    except TypeError:
        raise TypeError(f"compute_dtype: expected a dtype, got {compute_dtype!r}") from None
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype: expected one of the dtypes {', '.join(map(str, COMPUTE_DTYPES))}, got "
            f"{dtype}; None computes in the dtype of inputs and parameters"
        )
    return dtype


def _is_float_array(x) -> bool:
    # Not `equinox.is_inexact_array_like`, which fails on the tracers of jax 0.11.
    return isinstance(x, jax.Array | np.ndarray) and jnp.issubdtype(x.dtype, np.floating)


def _normalise(norm: eqx.nn.RMSNorm | None, heads: Array) -> Array:
    return heads if norm is None else jax.vmap(jax.vmap(norm))(heads)


def _process(process_heads: ProcessHeads, heads: Heads) -> Heads:
    query, key, value = process_heads(*heads)
    for name, old, new in zip(("query", "key", "value"), heads, (query, key, value), strict=True):
        if new.shape != old.shape:
            raise ValueError(
                f"process_heads: expected {name} heads of the same shape {old.shape}, "
                f"got {new.shape}"
            )
    return query, key, value


def _pad_channels(heads: Array, size: int) -> Array:
    missing = size - heads.shape[-1]
    return jnp.pad(heads, ((0, 0), (0, 0), (0, missing))) if missing else heads


def _rebuild(cls, module, **options):
    """A `cls` with the sizes, projections and dropout of `module`, an attention layer."""
    skeleton = eqx.filter_eval_shape(
        cls,
        module.num_heads,
        module.query_size,
        module.key_size,
        module.value_size,
        module.output_size,
        module.qk_size,
        module.vo_size,
        module.use_query_bias,
        module.use_key_bias,
        module.use_value_bias,
        module.use_output_bias,
        key=jax.random.key(0),
        **options,
    )

    def arrays(layer):
        return layer.query_proj, layer.key_proj, layer.value_proj, layer.output_proj, layer.dropout

    return eqx.tree_at(arrays, skeleton, arrays(module))
