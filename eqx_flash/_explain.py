# SPDX-License-Identifier: Apache-2.0
"""Which implementation a call uses, and why."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from . import _canonical, _ffi
from ._spec import CHECKPOINT_NAMES, CausalAlignment


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What [`eqx_flash.explain`][] returns. `print` it."""

    implementation: Literal["flash", "xla"]
    """`"flash"` is the Hopper kernel, `"xla"` the reference in plain JAX."""
    reason: str
    tile: tuple[int, int] | None = None
    """Queries and keys that a thread block of the kernel works on at a time."""

    def __str__(self) -> str:
        tile = "" if self.tile is None else f" (tiles of {self.tile[0]} x {self.tile[1]})"
        return f"{self.implementation}{tile}: {self.reason}"


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: Any = None,
    implementation: Any = None,
    return_residual: bool = False,
    causal_alignment: CausalAlignment = "top_left",
    deterministic: bool = False,
    checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES,
) -> Explanation:
    """Says how [`eqx_flash.dot_product_attention`][] would serve a call on this machine.

    ```python
    qkv = jax.ShapeDtypeStruct((2, 4096, 16, 128), jnp.bfloat16)
    print(eqx_flash.explain(qkv, qkv, qkv, is_causal=True))
    ```

    **Arguments:**

    The same. Arrays may be `jax.ShapeDtypeStruct`s, since nothing is computed.

    **Returns:**

    The implementation and the reason for it, by the code that decides in a call.

    **Raises:**

    What the call would raise.
    """
    del return_residual  # either implementation computes it anyway
    operands = _canonical.Operands.of(
        query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths
    )
    plan = _canonical.plan(
        operands,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        implementation=implementation,
        causal_alignment=causal_alignment,
        deterministic=deterministic,
        checkpoint_names=checkpoint_names,
    )
    choice = plan.choice
    on_kernel = choice.implementation == "flash"
    tile = _tile(operands.query, plan.spec.causal) if on_kernel else None
    return Explanation(choice.implementation, choice.reason, tile)


def _tile(query: Any, causal: bool) -> tuple[int, int] | None:
    """The tile of the kernel that serves `query`: the one with the next larger head dim."""
    mask = "causal" if causal else "full"
    fitting = [
        kernel
        for kernel in _ffi.tile_config()
        if (kernel["dtype"], kernel["mask"]) == (str(query.dtype), mask)
        and query.shape[-1] <= kernel["head_dim"] in _ffi.built_head_dims()
    ]
    if not fitting:
        return None
    kernel = min(fitting, key=lambda kernel: kernel["head_dim"])
    return kernel["block_m"], kernel["block_n"]
