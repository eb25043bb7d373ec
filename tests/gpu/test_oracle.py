# SPDX-License-Identifier: Apache-2.0
"""The judge of the GPU tests, judged on the CPU: plain JAX attention passes, mistakes do not."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_forward

import eqx_flash


@pytest.mark.parametrize("mask", oracle.MASKS)
@pytest.mark.parametrize("seq_q, seq_k, heads_k", [(5, 9, 2), (9, 5, 1), (7, 7, 4)])
def test_formula_of_padded_arrays(mask, seq_q, seq_k, heads_k):
    q, k, v = (x.astype(np.float32) for x in oracle.random_qkv("float16", 2, 16, 12, 4, 4, 8))
    variant = oracle.Variant.of(4, heads_k, mask, seq_q, seq_k)
    out, lse = oracle.formula(q, k, v, np.float32(0.3), variant, seq_q, seq_k)
    expected, expected_lse = eqx_flash.dot_product_attention(
        q[:, :seq_q],
        k[:, :seq_k, :heads_k],
        v[:, :seq_k, :heads_k],
        scale=0.3,
        is_causal=mask != "full",
        causal_alignment="bottom_right" if mask == "bottom_right" else "top_left",
        implementation="xla",
        return_residual=True,
    )
    np.testing.assert_allclose(out[:, :seq_q], expected, atol=1e-5)
    np.testing.assert_allclose(lse[..., :seq_q].swapaxes(1, 2), expected_lse, atol=1e-5)
    assert not out[:, seq_q:].any()


def right(q, k, v, mask):
    """In place of the kernel."""
    seq_q, heads, head_dim = q.shape[1:]
    seq_k, heads_k = k.shape[1:3]
    variant = oracle.Variant.of(heads, heads_k, mask, seq_q, seq_k)
    out, lse = oracle.formula(q, k, v, head_dim**-0.5, variant, seq_q, seq_k)
    return out.astype(q.dtype), lse


@pytest.mark.parametrize("shape", [(1, 1), (48, 64), (61, 1), (33, 57)])
@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 40), ("float16", 64)])
def test_sweep_passes_a_right_kernel(monkeypatch, dtype, head_dim, shape):
    use(monkeypatch, right)
    test_forward.check(dtype, head_dim, [shape])


def wrong_diagonal(q, k, v, mask):
    return right(q, k, v, "bottom_right" if mask == "top_left" else mask)


def wrong_tail(q, k, v, mask):
    out, lse = right(q, k, v, mask)
    return out.at[-1, -1, -1, -1].add(jnp.asarray(0.1, out.dtype)), lse


def unwritten(q, k, v, mask):
    out, lse = right(q, k, v, mask)
    return out.at[0, 3].set(jnp.nan), lse


def wrong_lse(q, k, v, mask):
    out, lse = right(q, k, v, mask)
    return out, lse.at[-1, -1, -1].add(1e-3)


def finite_empty_rows(q, k, v, mask):
    out, lse = right(q, k, v, mask)
    return out, jnp.maximum(lse, -1e30)


@pytest.mark.parametrize(
    "mistake", [wrong_diagonal, wrong_tail, unwritten, wrong_lse, finite_empty_rows]
)
def test_sweep_fails_a_wrong_kernel(monkeypatch, mistake):
    use(monkeypatch, mistake)
    with pytest.raises(AssertionError, match="cases failed"):
        test_forward.check("bfloat16", 64, [(64, 53)])


def test_record(monkeypatch, tmp_path):
    use(monkeypatch, right)
    monkeypatch.setenv("EQX_FLASH_RECORD", str(tmp_path))
    test_forward.check("bfloat16", 40, [(48, 64)], record="cases.csv")
    header, *lines = (tmp_path / "cases.csv").read_text().splitlines()
    assert header == ",".join(test_forward.COLUMNS)
    assert len(lines) == 9 and all(line.endswith("True") for line in lines)


def use(monkeypatch, kernel) -> None:
    monkeypatch.setattr(oracle, "flash", kernel)
    monkeypatch.setattr(test_forward, "PADDINGS", (64,))
    monkeypatch.setattr(test_forward, "HEAD_DIM_PADDING", 64)
