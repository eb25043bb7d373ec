# SPDX-License-Identifier: Apache-2.0
"""Which implementation is chosen, that nobody is left in the dark, and `python -m eqx_flash`."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eqx_flash
from eqx_flash import __main__, _canonical, _ffi, _platform, _primitive

H100, A100 = ("NVIDIA H100", "9.0"), ("NVIDIA A100", "8.0")
QKV = jax.ShapeDtypeStruct((2, 64, 4, 64), jnp.bfloat16)

CPU = _platform.Machine(devices=(), built=False, head_dims=())
HOPPER = _platform.Machine(devices=(H100, H100), built=True, head_dims=(64, 128, 256))
ONLY_64 = _platform.Machine(devices=(H100,), built=True, head_dims=(64,))
NO_KERNELS = _platform.Machine(devices=(H100,), built=True, head_dims=())
NOT_BUILT = _platform.Machine(devices=(H100,), built=False, head_dims=())
AMPERE = _platform.Machine(devices=(A100,), built=True, head_dims=(64, 128, 256))
MIXED = _platform.Machine(devices=(H100, A100), built=True, head_dims=(64, 128, 256))


@pytest.fixture
def on(monkeypatch):
    """`on(machine)` makes this process believe that it runs there."""
    monkeypatch.setattr(_canonical, "_warned", set())
    return lambda machine: monkeypatch.setattr(_platform, "machine", lambda: machine)


def explain(*, head_dim=64, dtype=jnp.bfloat16, **options):
    qkv = jax.ShapeDtypeStruct((2, 64, 4, head_dim), dtype)
    return eqx_flash.explain(qkv, qkv, qkv, **options)


def test_hopper_uses_the_kernel(on):
    on(HOPPER)
    explanation = explain(is_causal=True)
    assert explanation.implementation == "flash"
    assert str(explanation).startswith("flash")
    assert explain(implementation="xla").implementation == "xla"
    assert explain(implementation="flash").implementation == "flash"


@pytest.mark.parametrize(
    "machine, options, reason",
    [
        (HOPPER, {"bias": jnp.zeros((64, 64))}, "bias is not supported by the kernel"),
        (HOPPER, {"mask": np.ones((64, 64), bool)}, "mask is not supported"),
        (HOPPER, {"query_seq_lengths": np.ones(2, np.int32)}, "query_seq_lengths is not supported"),
        (HOPPER, {"local_window_size": 8}, "local_window_size is not supported"),
        (HOPPER, {"dtype": jnp.float32}, "the inputs are float32, and the kernel takes bfloat16"),
        (HOPPER, {"head_dim": 36}, "head_dim is 36, and the kernel takes multiples of 8"),
        (HOPPER, {"head_dim": 320}, "head_dim is 320, and the kernel takes .* up to 256"),
        (ONLY_64, {"head_dim": 72}, "head_dim is 72, and this build has kernels up to 64 only"),
        (NO_KERNELS, {}, "built without CUDA .*EQX_FLASH_CUDA"),
        (NOT_BUILT, {}, "extension module was not built"),
        (AMPERE, {}, r"A100 has compute capability 8.0, and the kernel needs 9.0 \(Hopper\)"),
        (MIXED, {}, "NVIDIA A100 has compute capability 8.0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_reference_on_a_gpu(on, machine, options, reason):
    on(machine)
    explanation = explain(**options)
    assert explanation.implementation == "xla" and explanation.tile is None
    assert re.search(reason, str(explanation))
    with pytest.raises(NotImplementedError, match=reason):
        explain(implementation="flash", **options)


def test_cpu(on):
    on(CPU)
    explanation = explain()
    assert explanation.implementation == "xla"
    assert "no CUDA device" in explanation.reason and "lowered for CUDA" in explanation.reason
    # All reasons at once, and an error that says what to do instead.
    both = r"float32.*no CUDA device.*implementation=None"
    with pytest.raises(NotImplementedError, match=both):
        explain(dtype=jnp.float32, implementation="flash")
    with pytest.raises(NotImplementedError, match=r"no CUDA device.*implementation=None"):
        eqx_flash.flash_attention_hopper_fwd(*[jnp.zeros((1, 8, 1, 64), jnp.bfloat16)] * 3)


def test_tile(on, monkeypatch):
    def kernel(head_dim, mask, block_m, block_n):
        rest = {"k_stages": 2, "v_stages": 2, "consumer_warpgroups": 2, "shared_memory_bytes": 0}
        tile = {"dtype": "bfloat16", "head_dim": head_dim, "mask": mask, **rest}
        return tile | {"block_m": block_m, "block_n": block_n}

    kernels = [
        kernel(256, "full", 128, 80),
        kernel(128, "full", 128, 176),
        kernel(128, "causal", 128, 128),
        kernel(64, "full", 192, 128),
    ]
    on(HOPPER)
    monkeypatch.setattr(_ffi, "tile_config", lambda: kernels)
    monkeypatch.setattr(_ffi, "built_head_dims", lambda: (128, 256))
    assert explain(head_dim=96).tile == (128, 176)
    assert explain(head_dim=96, is_causal=True).tile == (128, 128)
    assert explain(head_dim=64).tile == (128, 176)  # head dim 64 itself was not built
    assert explain(head_dim=64, dtype=jnp.float16).tile is None
    assert "tiles of 128 x 80" in str(explain(head_dim=256))


def test_explain_says_what_a_call_does(on, monkeypatch):
    """Both go through the same plan: here a call is stopped where it has decided."""
    on(HOPPER)
    specs = []

    def attend(spec, q, *_):
        specs.append(spec)
        return q, jnp.zeros((2, 4, 64))

    monkeypatch.setattr(_primitive, "attend", attend)
    q = jnp.zeros(QKV.shape, QKV.dtype)
    eqx_flash.dot_product_attention(q, q, q)
    eqx_flash.dot_product_attention(q, q, q, implementation="flash")
    eqx_flash.dot_product_attention(q, q, q, implementation="xla")
    eqx_flash.flash_attention_hopper_fwd(q, q, q, 0.2, True)
    assert [spec.dispatch for spec in specs] == ["auto", "flash", "xla", "flash"]
    assert specs[-1].scale == 0.2 and specs[-1].causal
    assert specs[-1].causal_alignment == "bottom_right"


def test_one_warning_for_each_reason_where_there_is_a_gpu(on):
    on(AMPERE)
    q = jnp.zeros((1, 4, 1, 8), jnp.bfloat16)
    with pytest.warns(UserWarning, match="XLA reference.*A100.*implementation=") as caught:
        eqx_flash.dot_product_attention(q, q, q)
    assert [warning.filename for warning in caught] == [__file__]
    eqx_flash.dot_product_attention(q, q, q)  # any warning is an error here
    eqx_flash.dot_product_attention(q, q, q, is_causal=True, implementation="xla")
    with pytest.warns(UserWarning, match="mask is not supported"):
        eqx_flash.dot_product_attention(q, q, q, mask=jnp.ones((4, 4), bool))


def test_no_warning_without_a_gpu(on):
    on(CPU)
    q = jnp.zeros((1, 4, 1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eqx_flash.dot_product_attention(q, q, q, mask=jnp.ones((4, 4), bool))


# ---- python -m eqx_flash -------------------------------------------------------------------------


def test_report_and_self_test(capsys, monkeypatch):
    monkeypatch.setattr(__main__, "HEAD_DIMS", (64,))
    assert __main__.main() == 0
    printed = capsys.readouterr().out
    for expected in (
        f"jax {jax.__version__}",
        "equinox",
        "Python 3.",
        "built: ",
        f"JAX runs on {jax.default_backend()}",
        "a plain call uses",
        "head_dim  64",
        "passed",
    ):
        assert expected in printed


@pytest.mark.parametrize("wrong", [lambda q, k, v, **_: q, lambda q, k, v, **_: q * jnp.nan])
def test_self_test_fails(capsys, monkeypatch, wrong):
    monkeypatch.setattr(__main__, "HEAD_DIMS", (64,))
    monkeypatch.setattr(__main__, "dot_product_attention", wrong)
    assert __main__.main() == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "info, expected",
    [
        ({}, "no compiled module"),
        ({"cuda": "off", "architectures": "", "head_dims": ""}, "without CUDA"),
        (
            {"cuda": "13.0", "architectures": "sm_90a", "head_dims": "64,128"},
            "CUDA 13.0, sm_90a, head dims 64,128",
        ),
    ],
)
def test_report_of_the_build(on, monkeypatch, info, expected):
    on(HOPPER)
    monkeypatch.setattr(_ffi, "build_info", lambda: info)
    report = "\n".join(__main__.report())
    assert expected in report
    assert "NVIDIA H100, compute capability 9.0; NVIDIA H100" in report
