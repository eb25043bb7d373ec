# SPDX-License-Identifier: Apache-2.0
"""`python -m eqx_flash`: what is installed, what a call would use, and a self-test of ten seconds.

The exit code is 0 if the self-test passes.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from . import _ffi, _platform, dot_product_attention, explain

HEAD_DIMS = (64, 128, 256)
# Rounding to bfloat16 alone gives about 0.003; a wrong mask or a lost tile gives over 0.1.
TOLERANCE = 0.02


def main() -> int:
    for line in report():
        print(line)
    print("self-test, relative errors against a plain formula in float32:")
    passed = [self_test(head_dim) for head_dim in HEAD_DIMS]
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


def report() -> list[str]:
    packages = ("eqx-flash", "jax", "jaxlib", "equinox")
    build = _ffi.build_info()
    if not build:
        built = "no compiled module: this is a source tree that was not installed"
    elif not _ffi.built_head_dims():
        built = "without CUDA: every call uses the reference"
    else:
        built = f"CUDA {build['cuda']}, {build['architectures']}, head dims {build['head_dims']}"
    devices = [
        f"{name}, compute capability {capability}"
        for name, capability in _platform.machine().devices
    ]
    call = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.bfloat16)
    return [
        ", ".join(f"{name} {_version(name)}" for name in packages),
        f"Python {platform.python_version()} on {platform.platform()}",
        f"built: {built}",
        f"JAX runs on {jax.default_backend()}; CUDA devices: {'; '.join(devices) or 'none'}",
        f"a plain call uses {explain(call, call, call)}",
    ]


def self_test(head_dim: int) -> bool:
    """Forward and gradients of a causal call with grouped heads and odd lengths."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((2, 333, 4, head_dim), (2, 333, 2, head_dim), (2, 333, 2, head_dim))
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=False)
    )
    dout = jax.random.normal(keys[3], q.shape, jnp.bfloat16)

    @jax.jit
    def ours(q, k, v):
        attention = functools.partial(dot_product_attention, is_causal=True)
        out, gradients = jax.vjp(attention, q, k, v)
        return out, *gradients(dout)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has said which implementation runs
        results = ours(q, k, v)
    plain = _plain(*(np.asarray(x, np.float32) for x in (q, k, v, dout)))
    errors = {
        name: float(np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y))
        for name, x, y in zip(("out", "dq", "dk", "dv"), results, plain, strict=True)
    }
    ok = all(error < TOLERANCE for error in errors.values())  # False for a NaN
    shown = "  ".join(f"{name} {error:.4f}" for name, error in errors.items())
    print(f"  head_dim {head_dim:3}  {shown}  {'ok' if ok else 'WRONG'}")
    return ok


def _plain(q, k, v, dout):
    """Causal attention and its gradients, written out: FlashAttention-2, section 2.2.

    In NumPy, since XLA would spend most of a minute on choosing algorithms for products on a GPU.
    """
    heads_k, scale = k.shape[2], q.shape[-1] ** -0.5
    k, v = (np.repeat(x, q.shape[2] // heads_k, axis=2) for x in (k, v))
    product = functools.partial(np.einsum, optimize=True)
    scores = scale * product("btnh,bsnh->bnts", q, k)
    weights = np.tril(np.exp(scores - scores.max(axis=-1, keepdims=True)))
    weights /= weights.sum(axis=-1, keepdims=True)
    dweights = product("btnh,bsnh->bnts", dout, v)
    dscores = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    dq = scale * product("bnts,bsnh->btnh", dscores, k)
    dk = scale * product("bnts,btnh->bsnh", dscores, q)
    dv = product("bnts,btnh->bsnh", weights, dout)
    # A key head collects from the query heads that share it.
    dk, dv = (x.reshape(*x.shape[:2], heads_k, -1, x.shape[3]).sum(axis=3) for x in (dk, dv))
    return product("bnts,bsnh->btnh", weights, v), dq, dk, dv


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
