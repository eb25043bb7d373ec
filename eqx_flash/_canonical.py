# SPDX-License-Identifier: Apache-2.0
"""From what a user may write to what `_primitive.attend` takes, and the choice of implementation.

`plan` needs shapes and dtypes only, so that `explain` decides by the same code as a call.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _checks, _platform
from ._spec import AttentionSpec, Dispatch


class Operands(NamedTuple):
    """The arrays of a call as given: rank 3 or 4, None if absent."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    query_seq_lengths: Any = None
    key_value_seq_lengths: Any = None

    @classmethod
    def of(cls, *given: Any) -> Operands:
        named = zip(cls._fields, given, strict=False)
        optional = cls._field_defaults
        return cls(
            *[
                None if x is None and name in optional else _checks.array(name, x)
                for name, x in named
            ]
        )


class Choice(NamedTuple):
    """Which implementation serves a call, and why."""

    dispatch: Dispatch
    implementation: Literal["flash", "xla"]
    """What that means in this process."""
    reason: str
    warn: bool = False
    """Whether a user would expect the kernel."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is served."""

    spec: AttentionSpec
    q_factor: float | jax.Array | None
    """Multiplies q beforehand: what of the scale the spec cannot hold."""
    choice: Choice


def plan(
    operands: Operands,
    *,
    scale: Any,
    is_causal: Any,
    local_window_size: Any,
    implementation: Any,
    causal_alignment: Any,
    deterministic: Any,
    checkpoint_names: Any,
) -> Plan:
    """Checks a call and decides how to serve it."""
    query, key = operands.query, operands.key
    _checks.operands(query, key, operands.value)
    batch, seq_q, heads, head_dim = _checks.rank4(query.shape)
    seq_k = _checks.rank4(key.shape)[1]
    _checks.bias_and_mask(operands.bias, operands.mask, (batch, heads, seq_q, seq_k))
    _checks.lengths("query_seq_lengths", operands.query_seq_lengths, batch)
    _checks.lengths("key_value_seq_lengths", operands.key_value_seq_lengths, batch)
    causal, window = _simplify(
        _checks.flag("is_causal", is_causal),
        _checks.window(local_window_size),
        seq_q,
        seq_k,
        0 if _checks.alignment(causal_alignment) == "top_left" else seq_k - seq_q,
    )
    scale = _checks.scale("scale", scale, head_dim)
    features = {
        "bias": operands.bias is not None,
        "mask": operands.mask is not None,
        "query_seq_lengths": operands.query_seq_lengths is not None,
        "key_value_seq_lengths": operands.key_value_seq_lengths is not None,
        "local_window_size": window is not None,
    }
    deterministic = _checks.flag("deterministic", deterministic)
    choice = choose(
        _checks.implementation(implementation),
        head_dim,
        _checks.unsupported(query, key, [name for name, used in features.items() if used]),
    )
    spec = AttentionSpec(
        scale=1.0,
        causal=causal,
        causal_alignment=causal_alignment,
        window=window,
        dispatch=choice.dispatch,
        deterministic=deterministic,
        checkpoint_names=_checks.checkpoint_names(checkpoint_names),
    )
    return _with_scale(spec, scale, choice)


def plan_kernel(
    operands: Operands,
    softmax_scale: Any,
    causal: Any,
    alignment: Any,
    deterministic: Any = False,
) -> Plan:
    """The same for the functions of `_hopper`: the kernel or an error."""
    query, key, value, *_ = operands
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name}: expected [batch, seq, heads, head_dim], got {x.shape}")
    _checks.operands(query, key, value)
    head_dim = query.shape[-1]
    scale = _checks.scale("softmax_scale", softmax_scale, head_dim)
    spec = AttentionSpec(
        scale=1.0,
        causal=_checks.flag("causal", causal),
        causal_alignment=_checks.alignment(alignment),
        dispatch="flash",
        deterministic=_checks.flag("deterministic", deterministic),
    )
    choice = choose("flash", head_dim, _checks.unsupported(query, key, []))
    return _with_scale(spec, scale, choice)


def choose(implementation: str | None, head_dim, unsupported: list[str]) -> Choice:
    """Chooses for a call that has `unsupported` reasons why the kernel cannot serve it."""
    if implementation == "xla":
        return Choice("xla", "xla", 'implementation="xla" was asked for')
    machine = _platform.machine()
    obstacle = machine.obstacle(head_dim)
    reason = "; ".join(unsupported if obstacle is None else [*unsupported, obstacle])
    if not reason:
        # `auto` and not `flash`: the program may also be lowered for another platform.
        dispatch = "auto" if implementation is None else "flash"
        return Choice(dispatch, "flash", "the Hopper kernel supports the call")
    if implementation == "flash":
        raise NotImplementedError(
            f"the flash kernel cannot serve this call: {reason}. The reference can: "
            f'eqx_flash.dot_product_attention with implementation=None or "xla"'
        )
    if not unsupported and not machine.devices:
        return Choice("auto", "xla", f"{reason}; lowered for CUDA the call uses the kernel")
    return Choice("xla", "xla", reason, warn=bool(machine.devices))


def _with_scale(spec: AttentionSpec, scale: Any, choice: Choice) -> Plan:
    """Divides the scale into what the spec can hold, static and for the kernel positive, and a
    factor of q."""
    q_factor = None
    if isinstance(scale, jax.Array):
        scale, q_factor = 1.0, scale
    elif choice.dispatch != "xla" and not np.float32(scale) > 0:
        scale, q_factor = (-scale, -1.0) if np.float32(scale) < 0 else (1.0, 0.0)
    return Plan(dataclasses.replace(spec, scale=scale), q_factor, choice)


def arrays(operands: Operands, q_factor: float | jax.Array | None) -> tuple[Any, ...]:
    """The operands of `_primitive.attend`."""

    def with_batch(x: Any) -> Any:
        return x if x is None or x.ndim == 4 else x.reshape(_checks.rank4(x.shape))

    query, *others = map(with_batch, operands[:5])
    if q_factor is not None:
        query *= jnp.asarray(q_factor, query.dtype)
    return query, *others, operands.query_seq_lengths, operands.key_value_seq_lengths


_warned: set[str] = set()


def new_warning(choice: Choice) -> str | None:
    """What to tell the user, once for each reason: there is a GPU, but the kernel is not used."""
    if not choice.warn or choice.reason in _warned:
        return None
    _warned.add(choice.reason)
    return (
        f"attention runs on the XLA reference, not on the flash kernel: {choice.reason}. "
        f'Pass implementation="xla" to accept this, "flash" to make it an error.'
    )


def _simplify(
    causal: bool,
    window: tuple[int | None, int | None] | None,
    seq_q,
    seq_k,
    diagonal,
) -> tuple[bool, tuple[int | None, int | None] | None]:
    """Drops the sides of a window that hide no key; a right side of 0 is a causal mask."""
    if window is None:
        return causal, None
    left, right = window
    if left is not None and left >= seq_q - 1 + diagonal:
        left = None
    if causal or right == 0:
        causal, right = True, None
    elif right is not None and right >= seq_k - 1 - diagonal:
        right = None
    return causal, None if left is None and right is None else (left, right)
