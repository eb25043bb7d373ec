# SPDX-License-Identifier: Apache-2.0
"""What the kernel is handed: read from programs lowered for CUDA, on any machine."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import SHAPES, Shape, plain_attention, random_qkv
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from lowered import BACKWARD, KERNEL, cuda_text, kernel_calls

import eqx_flash
from eqx_flash import _ffi, _platform, _primitive
from eqx_flash._spec import AttentionSpec

SHAPE = Shape(batch=2, seq_q=5, seq_k=7, heads=6, heads_k=2, head_dim=24)
DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The same on every machine: a process without CUDA devices, and a tree without kernels."""
    machine = _platform.Machine(devices=(), built=False, head_dims=())
    monkeypatch.setattr(_platform, "machine", lambda: machine)
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def types(shape, dtype=jnp.bfloat16):
    sizes = (shape.query, shape.key_value, shape.key_value)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def tensor(*size, dtype):
    return f"tensor<{'x'.join(map(str, size))}x{dtype}>"


def attributes(text, target=KERNEL):
    """The attributes of the only call of a kernel."""
    (found,) = re.findall(rf"@{target}\(.*?mhlo.backend_config = {{(.*?)}}", text)
    return dict(item.split(" = ") for item in found.split(", "))


def call(**options):
    return functools.partial(eqx_flash.dot_product_attention, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_operands_and_results(shape, dtype):
    text = cuda_text(call(), *types(shape, DTYPES[dtype]))
    operands = [tensor(*x, dtype=dtype) for x in (shape.query, shape.key_value, shape.key_value)]
    batch, seq_q, heads, _ = shape.query
    results = (operands[0], tensor(batch, heads, seq_q, dtype="f32"), "tensor<1xi32>")
    assert f": ({', '.join(operands)}) -> ({', '.join(results)})" in text
    assert kernel_calls(text) == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {}),
        ({"is_causal": True}, {"causal": "true"}),
        (
            {"is_causal": True, "causal_alignment": "bottom_right"},
            {"causal": "true", "bottom_right": "true"},
        ),
        ({"scale": 0.5}, {"softmax_scale": "5.000000e-01 : f32"}),
        ({"scale": np.float64(2)}, {"softmax_scale": "2.000000e+00 : f32"}),
        ({"scale": -0.5}, {"softmax_scale": "5.000000e-01 : f32"}),
        ({"scale": 0}, {"softmax_scale": "1.000000e+00 : f32"}),
        ({"local_window_size": (None, 0)}, {"causal": "true"}),
        ({"local_window_size": (4, 6)}, {}),  # hides no key from any query
        ({"local_window_size": (4, 9), "is_causal": True}, {"causal": "true"}),
    ],
    ids=str,
)
def test_attributes(options, expected):
    usual = {
        "softmax_scale": f"{SHAPE.head_dim**-0.5:e} : f32",
        "causal": "false",
        "bottom_right": "false",
    }
    found = attributes(cuda_text(call(**options), *types(SHAPE)))
    scale = found.pop("softmax_scale")
    expected = usual | expected
    assert float(scale.split()[0]) == pytest.approx(float(expected.pop("softmax_scale").split()[0]))
    assert scale.endswith(": f32")
    assert found == expected


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0, -1e-60])
def test_sign_of_the_scale_is_folded_into_the_query_exactly(getkey, scale):
    qkv = random_qkv(getkey(), SHAPE, jnp.bfloat16)
    ours, expected = (
        call(scale=scale, implementation=implementation)(*qkv) for implementation in (None, "xla")
    )
    np.testing.assert_array_equal(ours, expected)


def test_traced_scale(getkey):
    text = cuda_text(lambda scale, *qkv: call(scale=scale)(*qkv), jnp.float32(0.5), *types(SHAPE))
    assert attributes(text)["softmax_scale"].startswith("1.0")

    qkv = random_qkv(getkey(), SHAPE)

    def total(attention, scale):
        return jnp.sum(jnp.cos(attention(scale)))

    ours, expected = (
        jax.jit(jax.value_and_grad(functools.partial(total, attention)))(jnp.float32(0.5))
        for attention in (
            lambda scale: call(scale=scale)(*qkv),
            lambda scale: plain_attention(AttentionSpec(1.0), scale * qkv[0], *qkv[1:])[0],
        )
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options, shape, dtype",
    [
        ({"implementation": "xla"}, {}, "bf16"),
        ({"bias": jnp.zeros((1, 1, 1, 1), jnp.bfloat16)}, {}, "bf16"),
        ({"mask": np.ones((5, 7), bool)}, {}, "bf16"),
        ({"query_seq_lengths": np.array([1, 2], np.int32)}, {}, "bf16"),
        ({"key_value_seq_lengths": np.array([1, 2], np.int32)}, {}, "bf16"),
        ({"local_window_size": 1}, {}, "bf16"),
        ({}, {"head_dim": 12}, "bf16"),
        ({}, {"head_dim": 264}, "bf16"),
        ({}, {"seq_k": 0}, "bf16"),
        ({}, {"batch": 0}, "bf16"),
        ({}, {}, "f32"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_support_goes_to_the_reference(options, shape, dtype):
    dtype = {"f32": jnp.float32, **DTYPES}[dtype]
    text = cuda_text(call(**options), *types(SHAPE._replace(**shape), dtype))
    assert KERNEL not in text


@pytest.mark.parametrize("dispatch", ["auto", "flash"])
def test_forced_kernel_is_there_on_every_platform(dispatch):
    spec = AttentionSpec(0.3, dispatch=dispatch)
    cpu_text = jax.jit(functools.partial(_primitive.attend, spec)).lower(*types(SHAPE)).as_text()
    assert (KERNEL in cpu_text) == (dispatch == "flash")
    assert kernel_calls(cuda_text(functools.partial(_primitive.attend, spec), *types(SHAPE))) == 1


def gradient_text(shape, dtype=jnp.bfloat16, **options):
    def total(*qkv):
        out, lse = call(return_residual=True, **options)(*qkv)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return cuda_text(jax.grad(total, (0, 1, 2)), *types(shape, dtype))


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradient(deterministic):
    text = gradient_text(SHAPE, is_causal=True, scale=-0.5, deterministic=deterministic)
    assert (kernel_calls(text), kernel_calls(text, BACKWARD)) == (1, 1)
    assert attributes(text, BACKWARD) == {
        "softmax_scale": "5.000000e-01 : f32",
        "causal": "true",
        "bottom_right": "false",
        "deterministic": str(deterministic).lower(),
    }


def test_operands_and_results_of_the_backward_kernel():
    text = gradient_text(SHAPE)
    q, kv = tensor(*SHAPE.query, dtype="bf16"), tensor(*SHAPE.key_value, dtype="bf16")
    lse = tensor(SHAPE.batch, SHAPE.heads, SHAPE.seq_q, dtype="f32")
    assert f": ({q}, {kv}, {kv}, {q}, {lse}, {q}, {lse}) -> ({q}, {kv}, {kv}, " in text


def weighted(out):
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))


def with_unused_residual(*qkv):
    return weighted(jax.jit(call(return_residual=True))(*qkv)[0])


def with_residual_as_aux(*qkv):
    out, lse = call(return_residual=True)(*qkv)
    return weighted(out), lse


def in_a_loop(q, k, v):
    body = jax.checkpoint(lambda q, _: (call(return_residual=True)(q, k, v)[0], None))
    return weighted(jax.lax.scan(body, q, length=3)[0])


def in_shard_map(*qkv):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices("cpu")[:2])
    sharded = jax.shard_map(call(), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    return weighted(sharded(*qkv))


def explicit_gradients(*qkv):
    out, lse = _primitive.attend(AttentionSpec(0.3), *qkv)
    return _primitive.gradients(AttentionSpec(0.3), *qkv, out, lse, out, None)


WITHOUT_DLSE = {
    "grad": (jax.grad(lambda *qkv: weighted(call()(*qkv)), (0, 1, 2)), 1),
    "deterministic": (jax.grad(lambda *qkv: weighted(call(deterministic=True)(*qkv))), 1),
    "unused residual": (jax.grad(with_unused_residual), 1),
    "residual as aux": (jax.grad(with_residual_as_aux, has_aux=True), 1),
    "checkpoint": (jax.grad(jax.checkpoint(with_unused_residual)), 1),
    "scan": (jax.grad(in_a_loop), 1),
    "shard_map": (jax.grad(in_shard_map), 2),
    "by itself": (explicit_gradients, 1),
}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("gradient, shards", WITHOUT_DLSE.values(), ids=WITHOUT_DLSE)
def test_no_zeros_are_made_for_a_log_sum_exp_that_is_not_differentiated(gradient, shards, mapped):
    qkv = types(SHAPE)
    batch = SHAPE.batch // shards
    if mapped:
        gradient = jax.vmap(gradient)
        qkv = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in qkv]
        batch *= 3
    text = cuda_text(gradient, *qkv)
    assert kernel_calls(text, BACKWARD) == 1
    q, kv = (tensor(batch, *size[1:], dtype="bf16") for size in (SHAPE.query, SHAPE.key_value))
    rows = (batch, SHAPE.heads, SHAPE.seq_q)
    lse = tensor(*rows, dtype="f32")
    assert f": ({q}, {kv}, {kv}, {q}, {lse}, {q}) -> ({q}, {kv}, {kv}, " in text
    unfolded = tensor(3, SHAPE.batch // shards, *rows[1:], dtype="f32")
    zeros = re.findall(r"(?:constant|broadcast_in_dim).* (tensor<\S*>)\n", text)
    assert not {lse, unfolded} & set(zeros)


def test_gradient_lowers_in_a_build_without_its_head_dim(monkeypatch):
    """A development build has a few kernels, but a program may be meant for another machine."""
    monkeypatch.setattr(_ffi, "built_head_dims", lambda: (64,))
    large = [jax.ShapeDtypeStruct((1, 5, 2, 128), jnp.bfloat16)] * 3

    def loss(q, k, v):
        return jnp.sum(eqx_flash.dot_product_attention(q, k, v).astype(jnp.float32))

    assert kernel_calls(cuda_text(jax.grad(loss), *large), BACKWARD) == 1


def test_sizes_of_scratch_are_those_of_the_kernels():
    """Python computes them, as a program may be lowered where no kernels were built."""
    csrc = pathlib.Path(__file__).parents[1] / "csrc"
    assert f"kQueryPadding = {_ffi._QUERY_PADDING};" in (csrc / "params.h").read_text()
    fused = (
        f"has_fused_backward(int head_dim) {{ return head_dim <= {_ffi._LARGEST_FUSED_HEAD_DIM};"
    )
    assert fused in (csrc / "tile_config.h").read_text()


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, None)])
def test_vmap_of_the_gradient_is_one_call_of_each_kernel(in_axes):
    def total(*qkv):
        return jnp.sum(call()(*qkv).astype(jnp.float32))

    operands = [
        x if axis is None else jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
        for x, axis in zip(types(SHAPE), in_axes, strict=True)
    ]
    text = cuda_text(jax.vmap(jax.grad(total, (0, 1, 2)), in_axes), *operands)
    assert (kernel_calls(text), kernel_calls(text, BACKWARD)) == (1, 1)


def test_names_for_checkpoint_policies_can_be_chosen():
    def loss(*qkv):
        out = call(checkpoint_names=("context", "context"))(*qkv)
        return jnp.sum(jnp.tanh(out.astype(jnp.float32)))

    for names, calls in ((("context",), 1), (("eqx_flash_out", "eqx_flash_lse"), 2)):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        saved = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
        assert kernel_calls(cuda_text(saved, *types(SHAPE))) == calls


def test_unbatched_call_is_a_batch_of_one():
    text = cuda_text(call(), *types(SHAPE, jnp.float16))
    q, k, v = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in types(SHAPE, jnp.float16))
    unbatched = cuda_text(call(), q, k, v)
    assert tensor(1, *SHAPE.query[1:], dtype="f16") in unbatched
    vmapped = cuda_text(jax.vmap(call()), *types(SHAPE, jnp.float16))
    assert kernel_calls(vmapped) == 1
    assert attributes(vmapped) == attributes(text) == attributes(unbatched)
    assert tensor(*SHAPE.query, dtype="f16") in vmapped
