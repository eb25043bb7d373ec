# SPDX-License-Identifier: Apache-2.0
"""Small calls that reach every kind of tile, for compute-sanitizer; test_sanitizer.py runs this.

Operands come from the host and results go back there, so that no kernel but ours touches them: the
sanitizer instruments ours alone, and would take what others write for uninitialised.
"""

import itertools
import sys

import gradient_oracle as gradients
import jax
import numpy as np
import oracle

# One head dim for each size of kernel, and one that leaves part of its tile empty.
HEAD_DIMS = (64, 128, 256, 72)
# Ragged ends on both sides, several key blocks, grouped heads; and rows that see nothing.
SIZES = [(2, 130, 300, 2, 1), (1, 193, 65, 3, 3)]


def formula(q, k, v, mask):
    """In numpy: `oracle.formula` would run kernels."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    (_, seq_q, heads, head_dim), (_, seq_k, heads_k, _) = q.shape, k.shape
    k, v = (np.repeat(x, heads // heads_k, axis=2) for x in (k, v))
    scores = np.einsum("btnd,bsnd->bnts", q, k) * head_dim**-0.5
    diagonal = seq_k - seq_q if mask == "bottom_right" else 0
    if mask != "full":
        hidden = np.arange(seq_k) > np.arange(seq_q)[:, None] + diagonal
        scores = np.where(hidden, -np.inf, scores)
    row_max = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isinf(row_max), 0, row_max))
    row_sum = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnd->btnd", weights / np.where(row_sum == 0, 1, row_sum), v)


def main() -> None:
    wrong = 0
    cases = list(itertools.product(oracle.DTYPES, HEAD_DIMS, SIZES, oracle.MASKS))
    if "--quick" in sys.argv:  # racecheck is slow: one type, both masks
        cases = [c for c in cases if c[0] == "bfloat16" and c[3] != "top_left"]
    for dtype, head_dim, sizes, mask in cases:
        operands = oracle.random_qkv(dtype, *sizes, head_dim=head_dim)
        arrays = [jax.device_put(x) for x in operands]
        out, lse = oracle.flash(*arrays, mask=mask)
        error = np.abs(np.asarray(out, np.float64) - formula(*operands, mask=mask)).max()
        wrong += not (error < 0.02 and not np.isnan(np.asarray(lse)).any())
        batch, seq_q, _, heads, _ = sizes
        cotangents = gradients.random_cotangents(dtype, batch, seq_q, heads, head_dim)
        cotangents = [jax.device_put(x) for x in cotangents]
        residuals = [jax.device_put(np.asarray(x)) for x in (out, lse)]
        both = [
            gradients.flash_backward(*arrays, *residuals, *cotangents, mask, deterministic)
            for deterministic in (False, True)
        ]
        for fused, split in zip(*both, strict=True):
            error = np.abs(np.asarray(fused, np.float64) - np.asarray(split, np.float64)).max()
            wrong += not error < 0.1
    print(f"{len(cases)} cases, {wrong} wrong", flush=True)


if __name__ == "__main__":
    main()
