# SPDX-License-Identifier: Apache-2.0
"""Attention under JAX's transformations: what test_transformation_matrix.py leaves out."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import Shape, plain_attention, quick_compilation, random_qkv
from lowered import cuda_text, kernel_calls

import eqx_flash
from eqx_flash._primitive import attend, gradients
from eqx_flash._spec import CHECKPOINT_NAMES, AttentionSpec

SHAPE = Shape(batch=3, seq_q=5, seq_k=7, heads=4, heads_k=2, head_dim=8)
MAPPED = 2  # not the batch: a swap of the two must show

SPECS = {
    "full": AttentionSpec(0.3),
    "top_left": AttentionSpec(0.3, causal=True),
    "bottom_right": AttentionSpec(0.3, causal=True, causal_alignment="bottom_right"),
    "xla": AttentionSpec(0.3, causal=True, window=(2, None), dispatch="xla"),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
SUBSETS = [s for s in itertools.product((True, False), repeat=3) if any(s)]


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]), quick_compilation():
        yield


def loss(spec, q, k, v, attention: Callable = attend):
    """Depends on every output, differently on each."""
    out, lse = attention(spec, q, k, v)
    weight = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
    return jnp.sum(out * weight) + jnp.sum(jnp.sin(lse))


# Compiled once for each spec; a call of each is what transformations are compared with.
run = jax.jit(attend, static_argnums=0)
grads = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)


run_plain = jax.jit(plain_attention, static_argnums=0)
grads_plain = jax.jit(
    jax.grad(functools.partial(loss, attention=plain_attention), (1, 2, 3)), static_argnums=0
)


def assert_close(ours, expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), ours, expected
    )


def mapped_qkv(key, subset, axes=(0, 0, 0)):
    """q, k, v, with a mapped axis at `axes` where `subset` says so, and the `in_axes`."""
    in_axes = [axis if is_mapped else None for is_mapped, axis in zip(subset, axes, strict=True)]
    many = [random_qkv(k, SHAPE) for k in jax.random.split(key, MAPPED)]
    arrays = [
        x[0] if axis is None else jnp.stack(x, axis)
        for x, axis in zip(zip(*many, strict=True), in_axes, strict=True)
    ]
    return arrays, tuple(in_axes)


def each_example(arrays, in_axes):
    for i in range(MAPPED):
        yield [
            x if axis is None else jnp.take(x, i, axis)
            for x, axis in zip(arrays, in_axes, strict=True)
        ]


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


# ---- Values and gradients ------------------------------------------------------------------------


@each_spec
def test_values_and_gradients(getkey, spec):
    qkv = random_qkv(getkey(), SHAPE)
    assert_close(run(spec, *qkv), run_plain(spec, *qkv))
    assert_close(attend(spec, *qkv), run(spec, *qkv))
    assert_close(grads(spec, *qkv), grads_plain(spec, *qkv))


@each_spec
def test_forward_is_the_same_under_differentiation(getkey, spec):
    qkv = random_qkv(getkey(), SHAPE)
    outs, _ = jax.vjp(functools.partial(attend, spec), *qkv)
    jax.tree.map(np.testing.assert_array_equal, outs, run(spec, *qkv))


@pytest.mark.parametrize("result", [0, 1])
@pytest.mark.parametrize("name", ["top_left", "xla"])
def test_gradient_of_one_result_alone(getkey, name, result):
    """The cotangent of the other is a symbolic zero."""
    qkv, in_axes = mapped_qkv(getkey(), (True, False, True))

    @functools.partial(jax.jit, static_argnums=0)
    def everything(attention, *qkv):
        def of_one(*qkv):
            return jnp.sum(jnp.sin(attention(SPECS[name], *qkv)[result]))

        one = jax.grad(of_one, (0, 1, 2))
        each = jax.vmap(one, in_axes)
        total = jax.grad(lambda *qkv: jnp.sum(jax.vmap(of_one, in_axes)(*qkv)), (0, 1, 2))
        return one(*next(each_example(qkv, in_axes))), each(*qkv), total(*qkv)

    ours, expected = (everything(attention, *qkv) for attention in (attend, plain_attention))
    assert_close(ours, expected)
    for _, _, dv in ours:  # the log-sum-exp does not depend on the values
        assert np.any(dv) == (result == 0)


def test_gradients_without_dlse_are_those_for_zeros(getkey):
    spec = SPECS["bottom_right"]
    q, k, v = random_qkv(getkey(), SHAPE)
    out, lse = run(spec, q, k, v)
    absent, zeros = (
        gradients(spec, q, k, v, out, lse, jnp.cos(out), dlse) for dlse in (None, 0 * lse)
    )
    jax.tree.map(np.testing.assert_array_equal, absent, zeros)


def test_jacobian(getkey):
    spec = SPECS["bottom_right"]
    shape = Shape(batch=1, seq_q=2, seq_k=3, heads=2, heads_k=1, head_dim=8)
    qkv = random_qkv(getkey(), shape)
    ours, expected = (
        jax.jit(jax.jacrev(functools.partial(attention, spec), (0, 1, 2)))(*qkv)
        for attention in (attend, plain_attention)
    )
    assert_close(ours, expected)


def test_gradients_of_bias(getkey):
    spec = SPECS["xla"]
    qkv = random_qkv(getkey(), SHAPE)
    mask = jax.random.bernoulli(getkey(), 0.8, (1, 1, SHAPE.seq_q, SHAPE.seq_k))
    lengths = jnp.array([5, 3, 4], jnp.int32)
    bias = jax.random.normal(getkey(), (SHAPE.batch, 1, 1, SHAPE.seq_k))

    def total(attention, q, bias):
        out, _ = attention(spec, q, *qkv[1:], bias, mask, lengths, lengths)
        return jnp.sum(jnp.cos(out))

    ours, expected = (
        jax.jit(jax.grad(functools.partial(total, attention), (0, 1)))(qkv[0], bias)
        for attention in (attend, plain_attention)
    )
    assert_close(ours, expected)


# ---- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bottom_right", "xla"])
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_vmap_over_every_subset(getkey, name, subset):
    spec = SPECS[name]
    arrays, in_axes = mapped_qkv(getkey(), subset, axes=(0, 2, 4))
    examples = list(each_example(arrays, in_axes))

    @jax.jit
    def everything(*qkv):
        values = jax.vmap(functools.partial(attend, spec), in_axes)(*qkv)
        # Gradients of each example on its own: a shared operand has one for each of them.
        own = jax.vmap(jax.grad(loss, (1, 2, 3)), (None, *in_axes))
        # The gradient of the sum: a shared operand has one, the sum over the examples.
        total = jax.grad(
            lambda *qkv: jnp.sum(jax.vmap(functools.partial(loss, spec), in_axes)(*qkv)), (0, 1, 2)
        )
        return values, own(spec, *qkv), total(*qkv)

    values, own, total = everything(*arrays)
    assert_close(values, stack([run(spec, *x) for x in examples]))
    expected = stack([grads(spec, *x) for x in examples])
    assert_close(own, expected)
    assert_close(
        total,
        tuple(
            jnp.sum(dx, 0) if axis is None else jnp.moveaxis(dx, 0, axis)
            for dx, axis in zip(expected, in_axes, strict=True)
        ),
    )


def test_vmap_over_an_empty_axis():
    q = jnp.zeros((0, *SHAPE.query))
    kv = jnp.zeros(SHAPE.key_value)
    out, lse = jax.vmap(functools.partial(attend, SPECS["full"]), (0, None, None))(q, kv, kv)
    assert (out.shape, lse.shape) == (q.shape, (0, SHAPE.batch, SHAPE.heads, SHAPE.seq_q))


def test_vmap_is_one_kernel_call_and_does_not_copy_shared_keys(getkey):
    spec = SPECS["bottom_right"]
    arrays, in_axes = mapped_qkv(getkey(), (True, False, False))
    half = [x.astype(jnp.bfloat16) for x in arrays]
    text = cuda_text(jax.vmap(functools.partial(attend, spec), in_axes), *half)
    assert kernel_calls(text) == 1
    batch, seq_q, heads, head_dim = SHAPE.query
    operands = (
        f"tensor<{batch}x{seq_q}x{MAPPED * heads}x{head_dim}xbf16>",
        *["tensor<{}x{}x{}x{}xbf16>".format(*SHAPE.key_value)] * 2,
    )
    assert f"({', '.join(operands)}) ->" in text


# ---- Rematerialisation, loops --------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, calls",
    [((), 2), (CHECKPOINT_NAMES[:1], 2), (CHECKPOINT_NAMES[1:], 2), (CHECKPOINT_NAMES, 1)],
)
@pytest.mark.parametrize("dispatch", ["auto", "flash"])
def test_checkpoint_reruns_the_kernel_unless_its_results_are_saved(getkey, dispatch, names, calls):
    spec = AttentionSpec(0.3, causal=True, dispatch=dispatch)
    qkv = random_qkv(getkey(), SHAPE, jnp.bfloat16)
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def block(*qkv):
        return jnp.sum(jnp.tanh(attend(spec, *qkv)[0]).astype(jnp.float32))

    saved = jax.checkpoint(block, policy=policy)
    text = cuda_text(jax.value_and_grad(saved, (0, 1, 2)), *qkv)
    assert kernel_calls(text) == calls


def test_in_a_while_loop(getkey):
    spec = SPECS["full"]
    q, k, v = random_qkv(getkey(), SHAPE)
    looped = jax.lax.fori_loop(0, 3, lambda _, q: attend(spec, q, k, v)[0], q)
    unrolled = functools.reduce(lambda q, _: run(spec, q, k, v)[0], range(3), q)
    assert_close(looped, unrolled)


# ---- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("dispatch", ["auto", "flash"])
def test_second_derivatives_of_the_kernel_are_refused(getkey, dispatch):
    spec = AttentionSpec(0.3, dispatch=dispatch)
    q, k, v = random_qkv(getkey(), SHAPE, jnp.bfloat16)

    def first(q, power):
        dq = jax.grad(lambda q: jnp.sum(attend(spec, q, k, v)[0].astype(jnp.float32) ** power))(q)
        return jnp.sum(dq.astype(jnp.float32))

    for power in (1, 2):  # with 1, the gradient depends on the forward pass through lse alone
        with pytest.raises(NotImplementedError, match='implementation="xla"'):
            jax.eval_shape(jax.grad(lambda q, power=power: first(q, power)), q)


def test_a_stopped_gradient_needs_no_second_derivative(getkey):
    spec = SPECS["top_left"]
    q, k, v = random_qkv(getkey(), SHAPE)

    def stopped(q):
        dq = jax.grad(lambda q: jnp.sum(attend(spec, q, k, v)[0] ** 2))(q)
        return jnp.sum(q * jax.lax.stop_gradient(dq))

    expected = jax.grad(lambda q: jnp.sum(attend(spec, q, k, v)[0] ** 2))(q)
    assert_close(jax.grad(stopped)(q), expected)


@pytest.mark.parametrize("of_lse", [True, False])
def test_second_derivatives_of_the_reference(getkey, of_lse):
    spec = SPECS["xla"]
    q, k, v = random_qkv(getkey(), SHAPE)
    tangent = jax.random.normal(getkey(), q.shape)

    def directional(attention, q):
        def results(*args):
            out, lse = attention(*args)
            return out, lse if of_lse else jax.lax.stop_gradient(lse)

        dq = jax.grad(lambda q: loss(spec, q, k, v, results))(q)
        return jnp.sum(dq * tangent)

    ours, expected = (
        jax.jit(jax.grad(functools.partial(directional, attention)))(q)
        for attention in (attend, plain_attention)
    )
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


def test_forward_over_reverse_of_the_reference(getkey):
    spec = SPECS["xla"]
    q, k, v = random_qkv(getkey(), SHAPE)
    tangent = jax.random.normal(getkey(), q.shape)

    @functools.partial(jax.jit, static_argnums=0)
    def hessian_product(attention, q, tangent):
        return jax.jvp(jax.grad(lambda q: loss(spec, q, k, v, attention)), (q,), (tangent,))[1]

    ours, expected = (hessian_product(f, q, tangent) for f in (attend, plain_attention))
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5)


FORWARD_MODE = {
    "jvp": lambda fn, q: jax.jvp(fn, (q,), (q,)),
    "jvp(jit)": lambda fn, q: jax.jvp(jax.jit(fn), (q,), (q,)),
    "jit(jvp)": lambda fn, q: jax.jit(lambda q: jax.jvp(fn, (q,), (q,)))(q),
    "jvp(vmap)": lambda fn, q: jax.jvp(jax.vmap(fn), (q[None],), (q[None],)),
    "jvp(checkpoint)": lambda fn, q: jax.jvp(jax.checkpoint(fn), (q,), (q,)),
    "jacfwd": lambda fn, q: jax.jacfwd(fn)(q),
    "linearize": lambda fn, q: jax.linearize(fn, q)[1](q),
}


@pytest.mark.parametrize("transform", FORWARD_MODE.values(), ids=FORWARD_MODE)
@pytest.mark.parametrize("dispatch", ["auto", "xla"])
def test_forward_mode_is_refused(getkey, transform, dispatch):
    spec = AttentionSpec(0.3, dispatch=dispatch)
    q, k, v = random_qkv(getkey(), SHAPE, jnp.float16)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        transform(lambda q: attend(spec, q, k, v)[0], q)


def test_forward_over_reverse_of_the_kernel_is_refused(getkey):
    spec = AttentionSpec(0.3)
    q, k, v = random_qkv(getkey(), Shape(1, 2, 3, 2, 1, 8), jnp.float16)
    hessian = jax.hessian(lambda q: jnp.sum(attend(spec, q, k, v)[0].astype(jnp.float32) ** 2))
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        hessian(q)


# ---- Export --------------------------------------------------------------------------------------


def test_export_of_any_batch_with_its_gradient(getkey):
    qkv = random_qkv(getkey(), SHAPE, jnp.float16)
    (batch,) = jax.export.symbolic_shape("batch")
    types = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in qkv]

    @jax.jit
    def causal(q, k, v):
        return eqx_flash.dot_product_attention(q, k, v, is_causal=True)

    exported = jax.export.export(
        causal, platforms=("cpu", "cuda"), disabled_checks=eqx_flash.export_checks()
    )(*types)
    assert "eqx_flash_forward" in exported.mlir_module()
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(restored.call(*qkv), causal(*qkv))

    def total(attention, *qkv):
        return jnp.sum(attention(*qkv).astype(jnp.float32))

    ours, expected = (
        jax.grad(functools.partial(total, f), (0, 1, 2))(*qkv) for f in (restored.call, causal)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
