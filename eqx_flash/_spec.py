# SPDX-License-Identifier: Apache-2.0
"""The one static argument of everything below the public functions."""

from __future__ import annotations

import dataclasses
from typing import Literal

CausalAlignment = Literal["top_left", "bottom_right"]
Dispatch = Literal["auto", "flash", "xla"]

CHECKPOINT_NAMES = ("eqx_flash_out", "eqx_flash_lse")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What an attention call computes, apart from its arrays. Frozen and hashable."""

    scale: float
    """Multiplies the scores. The kernel wants it positive: canonicalisation folds a sign into q."""
    causal: bool = False
    causal_alignment: CausalAlignment = "top_left"
    """Where the diagonal, and with it a window, is anchored when seq_q != seq_k."""
    window: tuple[int | None, int | None] | None = None
    """Keys a query sees to the (left, right) of its own position, inclusive; None is unbounded."""
    dispatch: Dispatch = "auto"
    """`auto` lowers to the kernel for CUDA and to the reference elsewhere; the others force one."""
    deterministic: bool = False
    """Whether the backward kernels must give the same bits every time."""
    checkpoint_names: tuple[str, str] = CHECKPOINT_NAMES
    """What policies of `jax.checkpoint` call out and lse."""

    def diagonal(self, seq_q: int, seq_k: int) -> int:
        """The key position that query 0 is aligned with."""
        return 0 if self.causal_alignment == "top_left" else seq_k - seq_q
