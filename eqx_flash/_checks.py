# SPDX-License-Identifier: Apache-2.0
"""Every error a user can make, before anything is traced. Looks at shapes and dtypes only.

`TypeError` for an argument of the wrong Python type, `ValueError` for all else. Each message names
the argument, what came, what is allowed, and the likely fix.
"""

from __future__ import annotations

import math
import operator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ._spec import CausalAlignment

FLOAT32_MAX = float(np.finfo(np.float32).max)
IMPLEMENTATIONS = (None, "flash", "xla")
KERNEL_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(np.float16))
DTYPES = (*KERNEL_DTYPES, np.dtype(np.float32), np.dtype(np.float64))


def array(name: str, x: Any):
    """`x` as an array. Leaves a `jax.ShapeDtypeStruct`, which `explain` takes, as it is."""
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return x
    try:
        if not isinstance(x, str):  # JAX would read a number from it
            return jnp.asarray(x)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"{name}: expected an array, got {type(x).__name__}")


# Sizes are not annotated as int: `jax.export` may have symbols for them.
def rank4(shape: tuple) -> tuple:
    """`shape` with leading axes of size 1."""
    return (1,) * (4 - len(shape)) + tuple(shape)


def operands(query, key, value) -> None:
    """Checks the shapes and dtypes of query, key and value, of rank 3 or 4."""
    for name, x, axes in (
        ("query", query, "seq_q, heads"),
        ("key", key, "seq_k, heads_k"),
        ("value", value, "seq_k, heads_k"),
    ):
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name}: expected shape [batch, {axes}, head_dim] or [{axes}, head_dim], "
                f"got {x.shape}"
            )
        if x.dtype not in DTYPES:
            raise ValueError(
                f"{name}: expected one of the dtypes {', '.join(map(str, DTYPES))}, got {x.dtype}; "
                f"convert it with {name}.astype(...)"
            )
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name}: its dtype {x.dtype} differs from query's {query.dtype}; convert one of "
                f"them with .astype(...)"
            )
    batch, _, heads, head_dim = rank4(query.shape)
    batch_k, _, heads_k, head_dim_k = rank4(key.shape)
    if rank4(value.shape) != rank4(key.shape):
        raise ValueError(f"value: expected key's shape {key.shape}, got {value.shape}")
    if batch_k != batch:
        raise ValueError(
            f"key: its batch {batch_k} differs from query's {batch} "
            f"(key {key.shape}, query {query.shape})"
        )
    if head_dim_k != head_dim:
        raise ValueError(
            f"key: its head_dim {head_dim_k} differs from query's {head_dim} "
            f"(key {key.shape}, query {query.shape})"
        )
    if head_dim == 0:
        raise ValueError(f"query: head_dim must be at least 1, got shape {query.shape}")
    if heads_k == 0 or heads % heads_k:
        raise ValueError(
            f"query: its {heads} heads are not a multiple of key's {heads_k} "
            f"(query {query.shape}, key {key.shape}); heads are the last axis but one"
        )


def bias_and_mask(bias, mask, scores: tuple) -> None:
    """Checks `bias` and `mask` against the shape [batch, heads, seq_q, seq_k] of the scores."""
    if bias is not None and not jnp.issubdtype(bias.dtype, np.number):
        raise ValueError(f"bias: expected numbers, got {bias.dtype}; pass a boolean array as mask")
    if bias is not None and jnp.issubdtype(bias.dtype, np.complexfloating):
        raise ValueError(f"bias: expected real numbers, got {bias.dtype}")
    if mask is not None and mask.dtype != bool:
        raise ValueError(
            f"mask: expected booleans (True takes part), got {mask.dtype}; pass an additive mask "
            f"as bias, or use mask.astype(bool)"
        )
    for name, x in (("bias", bias), ("mask", mask)):
        if x is None:
            continue
        shape = rank4(x.shape)
        if x.ndim > 4 or any(n not in (1, full) for n, full in zip(shape, scores, strict=True)):
            raise ValueError(
                f"{name}: shape {x.shape} does not broadcast to [batch, heads, seq_q, seq_k] = "
                f"{scores}; every axis must have that size or 1"
            )


def lengths(name: str, x, batch) -> None:
    """Checks an array of sequence lengths."""
    if x is None:
        return
    if x.dtype != np.int32:
        raise ValueError(f"{name}: expected int32, got {x.dtype}; use .astype(jnp.int32)")
    if x.shape != (batch,):
        raise ValueError(
            f"{name}: expected shape [batch] = ({batch},), got {x.shape}; it holds one length for "
            f"each batch entry"
        )


def residuals(query, *, out, lse, dout, dlse) -> tuple:
    """What a backward pass gets from the forward pass and from the loss, checked, as arrays.

    `dlse` may be `None`, and stays so.
    """
    batch, seq_q, heads, _ = query.shape
    rows = (batch, heads, seq_q)
    checked = []
    for name, x, axes, shape, dtype in (
        ("out", out, "like query", query.shape, query.dtype),
        ("lse", lse, "[batch, heads, seq_q]", rows, np.dtype(np.float32)),
        ("dout", dout, "like query", query.shape, query.dtype),
        ("dlse", dlse, "[batch, heads, seq_q]", rows, np.dtype(np.float32)),
    ):
        if name == "dlse" and x is None:
            checked.append(None)
            continue
        x = array(name, x)
        if (x.shape, x.dtype) != (shape, dtype):
            raise ValueError(
                f"{name}: expected {axes}, {dtype} {shape}, got {x.dtype} {x.shape}; pass what "
                f"flash_attention_hopper_fwd returned, and gradients of the same shape and dtype"
            )
        checked.append(x)
    return tuple(checked)


def checkpoint_names(x: Any) -> tuple[str, str]:
    if not isinstance(x, tuple | list) or [type(name) for name in x] != [str, str]:
        raise TypeError(
            f"checkpoint_names: expected two names, of the output and of the log-sum-exp, got {x!r}"
        )
    out, lse = x
    return out, lse


def flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name}: expected a static bool, got {_kind(x)}")
    return bool(x)


def alignment(x: Any) -> Any:
    if not isinstance(x, str):
        raise TypeError(f"causal_alignment: expected a str, got {_kind(x)}")
    if x not in get_args(CausalAlignment):
        raise ValueError(
            f'causal_alignment: expected "top_left" (positions count from the start of both '
            f'sequences) or "bottom_right" (from their ends), got {x!r}'
        )
    return x


def implementation(x: Any) -> Any:
    if not isinstance(x, str | None):
        raise TypeError(f"implementation: expected None or a str, got {_kind(x)}")
    if x == "cudnn":
        raise ValueError(
            'implementation: "cudnn" is an implementation of jax.nn.dot_product_attention; '
            'eqx_flash has None (choose), "flash" (the Hopper kernel or an error) and "xla"'
        )
    if x not in IMPLEMENTATIONS:
        raise ValueError(f'implementation: expected None, "flash" or "xla", got {x!r}')
    return x


def window(x: Any) -> tuple[int | None, int | None] | None:
    """`local_window_size` as (left, right)."""
    if x is None:
        return None
    sides = x if isinstance(x, tuple | list) else (x, x)
    if len(sides) != 2:
        raise ValueError(f"local_window_size: expected an int or (left, right), got {x!r}")
    return _window_side(x, sides[0]), _window_side(x, sides[1])


def _window_side(given, side) -> int | None:
    if side is None:
        return None
    try:
        size = operator.index(side)
    except TypeError:
        size = None
    if size is None or isinstance(side, bool):
        raise TypeError(f"local_window_size: expected a static int or (left, right), got {given!r}")
    if size < 0:
        raise ValueError(
            f"local_window_size: {given!r} has a negative side; use None for an unbounded side, "
            f"as in (128, None)"
        )
    return size


def scale(name: str, x: Any, head_dim) -> float | jax.Array:
    """The factor of the scores: a float if it is static, else a scalar array."""
    if x is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(x, jax.Array):
        if x.shape != () or not jnp.issubdtype(x.dtype, np.floating):
            raise ValueError(f"{name}: expected a float scalar, got {x.dtype} of shape {x.shape}")
        return x
    if isinstance(x, bool) or not isinstance(x, int | float | np.number | np.ndarray):
        raise TypeError(f"{name}: expected a number, got {_kind(x)}")
    if np.shape(x) != ():
        raise ValueError(f"{name}: expected a scalar, got an array of shape {np.shape(x)}")
    if not abs(x) <= FLOAT32_MAX:  # a NaN is not
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def unsupported(query, key, features: list[str]) -> list[str]:
    """Why the kernel cannot serve a valid call that uses `features`, the names of arguments."""
    reasons = [f"{name} is not supported by the kernel" for name in features]
    if query.dtype not in KERNEL_DTYPES:
        reasons.append(f"the inputs are {query.dtype}, and the kernel takes bfloat16 and float16")
    head_dim = query.shape[-1]
    if head_dim % 8 or head_dim > 256:
        reasons.append(f"head_dim is {head_dim}, and the kernel takes multiples of 8 up to 256")
    if 0 in (*query.shape, *key.shape):
        reasons.append(f"an array is empty (query {query.shape}, key {key.shape})")
    return reasons


def _kind(x: Any) -> str:
    if isinstance(x, Tracer):
        return "a traced array; close over it, or mark it static"
    return f"{type(x).__name__}"
