# SPDX-License-Identifier: Apache-2.0
"""FlashAttention-3's sweep of shapes, by its criterion, through the public function.

Compilation would dominate: one program runs the nine variants of a shape, and the formula takes
padded arrays with the lengths as operands, so that it compiles once for each size of padding.
With EQX_FLASH_RECORD=folder every case leaves a line in a CSV file there.
"""

import csv
import os
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

pytestmark = pytest.mark.gpu

BATCH, HEADS = 2, 6
HEADS_K = (6, 2, 1)  # multi-head, grouped, multi-query
VARIANTS = [(heads_k, mask) for heads_k in HEADS_K for mask in oracle.MASKS]
HEAD_DIMS = (40, 64, 72, 96, 128, 192, 256)
SHAPES = [
    (1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128),
    (128, 217), (113, 211), (108, 256), (256, 512), (384, 256), (640, 128), (512, 256),
    (1024, 1024), (1023, 1024), (1024, 1023), (4096, 4096), (4224, 4224),
]  # fmt: skip
PADDINGS = (256, 1024, 4224)  # sequences are padded to the next
HEAD_DIM_PADDING = 256

COLUMNS = (
    "dtype", "head_dim", "seq_q", "seq_k", "heads", "heads_k", "mask",
    "max_error", "bound", "lse_error", "passed",
)  # fmt: skip

each_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
each_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES)


@each_dtype
@each_head_dim
def test_sample(dtype, head_dim):
    shapes = random.Random(f"{dtype} {head_dim}").sample(SHAPES, 4)
    check(dtype, head_dim, shapes)


@pytest.mark.slow
@each_dtype
@each_head_dim
def test_whole_sweep(dtype, head_dim):
    check(dtype, head_dim, SHAPES, record=f"sweep_{dtype}_{head_dim}.csv")


@each_dtype
@pytest.mark.parametrize("head_dim", [8, 24, 56, 88, 104, 120, 136, 168, 200, 248])
def test_odd_multiples_of_eight(dtype, head_dim):
    check(dtype, head_dim, [(113, 203), (256, 512)], record=f"odd_dims_{dtype}_{head_dim}.csv")


@pytest.mark.parametrize("batch, heads, heads_k", [(3, 5, 5), (7, 3, 1), (1, 7, 7), (5, 9, 3)])
@pytest.mark.parametrize("mask", ["full", "bottom_right"])
def test_odd_batch_times_heads(batch, heads, heads_k, mask):
    q, k, v = oracle.random_qkv("bfloat16", batch, 333, 444, heads, heads_k, 64)
    oracle.assert_close(q, k, v, *oracle.flash(q, k, v, mask), mask=mask)


def check(dtype: str, head_dim: int, shapes, record: str | None = None) -> None:
    """Runs all variants of the shapes; reports every failing case, not the first."""
    lines = [case for shape in shapes for case in run_shape(dtype, head_dim, *shape)]
    report(COLUMNS, lines, record)


def report(columns: tuple, lines: list[tuple], record: str | None) -> None:
    """Writes the record and fails if a line does not end in True."""
    if record and (folder := os.environ.get("EQX_FLASH_RECORD")):
        with open(pathlib.Path(folder, record), "w", newline="") as file:
            csv.writer(file).writerows([columns, *lines])
    failed = [line for line in lines if not line[-1]]
    text = "\n".join(", ".join(map(str, line)) for line in [columns, *failed[:40]])
    assert not failed, f"{len(failed)} of {len(lines)} cases failed\n{text}"


def run_shape(dtype: str, head_dim: int, seq_q: int, seq_k: int) -> list[tuple]:
    """The nine variants of one shape, as lines of the record."""
    seed = hash((head_dim, seq_q, seq_k)) % 2**32
    q, k, v = oracle.random_qkv(dtype, BATCH, seq_q, seq_k, HEADS, HEADS, head_dim, seed)
    padding = next(n for n in PADDINGS if n >= max(seq_q, seq_k))
    grouped = [(k[:, :, :n].copy(), v[:, :, :n].copy()) for n in HEADS_K]
    outs, lses = run_variants(oracle.flash, q, grouped, padding)
    variants = [oracle.Variant.of(HEADS, heads_k, mask, seq_q, seq_k) for heads_k, mask in VARIANTS]
    errors = oracle.measure(
        *(pad(x, padding, np) for x in (q, k, v)),
        outs,
        lses,
        jax.tree.map(lambda *leaves: np.stack(leaves), *variants),
        np.float32(head_dim**-0.5),
        seq_q,
        seq_k,
    )
    errors = jax.tree.map(np.asarray, errors)
    return [
        (dtype, head_dim, seq_q, seq_k, HEADS, *variant, *(f"{x[i]:.3g}" for x in errors),
         bool(errors.passed[i]))
        for i, variant in enumerate(VARIANTS)
    ]  # fmt: skip


@jax.jit(static_argnums=(0, 3))
def run_variants(kernel, q, grouped, padding: int):
    """`(outs, lses)` of VARIANTS, padded for the formula."""
    results = [kernel(q, *grouped[HEADS_K.index(n)], mask=mask) for n, mask in VARIANTS]
    outs, lses = (jnp.stack(x) for x in zip(*results, strict=True))
    lses = jnp.pad(lses, ((0, 0),) * 3 + ((0, padding - q.shape[1]),))
    return jax.vmap(lambda out: pad(out, padding, jnp))(outs), lses


def pad(x, length: int, xp):
    """[batch, seq, heads, head_dim] with zeros up to the given length and HEAD_DIM_PADDING."""
    widths = (0, length - x.shape[1]), (0, 0), (0, HEAD_DIM_PADDING - x.shape[3])
    return xp.pad(x, ((0, 0), *widths))
