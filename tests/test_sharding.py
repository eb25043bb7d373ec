# SPDX-License-Identifier: Apache-2.0
"""Attention on eight devices: right values, and communication only where it cannot be avoided.

The plain cases are in test_transformation_matrix.py.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import Shape, quick_compilation, random_qkv
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import collectives

import eqx_flash
from eqx_flash._primitive import attend, gradients
from eqx_flash._spec import AttentionSpec

SHAPE = Shape(batch=4, seq_q=6, seq_k=8, heads=8, heads_k=4, head_dim=8)
ATTENTION = {
    dispatch: functools.partial(attend, AttentionSpec(0.3, True, "bottom_right", dispatch=dispatch))
    for dispatch in ("auto", "xla")
}
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BOTH = P("data", None, "model", None)

each_dispatch = pytest.mark.parametrize("dispatch", ATTENTION)
each_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=str)


@pytest.fixture(autouse=True)
def quick():
    with quick_compilation():
        yield


def make_mesh(*kinds):
    """Two by four devices; the kinds of the axes "data" and "model"."""
    return jax.make_mesh((2, 4), ("data", "model"), kinds, devices=jax.devices("cpu")[:8])


def weight_like(x):
    return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(attention, weight, q, k, v):
    def loss(*qkv):
        out, lse = attention(*qkv)
        return jnp.sum(out * weight) + jnp.sum(jnp.sin(lse)), (out, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return outputs, gradients


def check(attention, mesh, arrays, specs, expected=None, ambient=False):
    """Compares `attention` of sharded arrays with that (or `expected`) of arrays on one device.

    Returns the communication, and the shardings of out, lse, dq, dk, dv.
    """
    weight = weight_like(arrays[0])
    with jax.default_device(jax.devices("cpu")[0]):
        expected = outputs_and_gradients(expected or attention, weight, *arrays)
    weight, *arrays = place(mesh, [weight, *arrays], [specs[0], *specs])
    with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
        compiled = outputs_and_gradients.lower(attention, weight, *arrays).compile()
    results = compiled(weight, *arrays)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6), results, expected
    )
    return collectives(compiled), [x.sharding for x in jax.tree.leaves(results)]


def place(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def has_spec(sharding, spec):
    return sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec), 4)


# ---- Batch and heads: no communication -----------------------------------------------------------


@each_kind
@pytest.mark.parametrize(
    "dispatch, spec",
    [
        ("auto", P("data")),
        ("auto", P(None, None, "model")),
        ("auto", P(("data", "model"))),
        ("xla", BOTH),
    ],
    ids=str,
)
def test_batch_and_heads_need_no_communication(getkey, kind, dispatch, spec):
    qkv = random_qkv(getkey(), SHAPE._replace(batch=8))
    mesh = make_mesh(kind, kind)
    communication, shardings = check(ATTENTION[dispatch], mesh, qkv, [spec] * 3)
    assert not communication
    assert all(has_spec(shardings[i], spec) for i in (0, 2, 3, 4))


@each_kind
@pytest.mark.parametrize("heads_k", [1, 2])
def test_more_shards_than_key_heads(getkey, kind, heads_k):
    """Each device takes the key/value head that it needs. The gradients are summed, no more."""
    qkv = random_qkv(getkey(), SHAPE._replace(heads_k=heads_k))
    specs = [BOTH, P("data"), P("data")]
    communication, shardings = check(ATTENTION["auto"], make_mesh(kind, kind), qkv, specs)
    assert set(communication) == {"all-reduce"}
    assert has_spec(shardings[0], BOTH)


@each_kind
def test_replicated_keys(getkey, kind):
    """The forward pass needs no communication; gradients of replicated arrays do."""
    qkv = random_qkv(getkey(), SHAPE)
    mesh = make_mesh(kind, kind)
    specs = [BOTH, P(), P()]
    check(ATTENTION["auto"], mesh, qkv, specs)
    forward = jax.jit(ATTENTION["auto"])
    assert not collectives(forward.lower(*place(mesh, qkv, specs)).compile())


@each_kind
def test_cotangents_sharded_unlike_the_output(getkey, kind):
    mesh = make_mesh(kind, kind)
    attention = ATTENTION["auto"]

    def resharded(*qkv):
        out, lse = attention(*qkv)
        sharding = NamedSharding(jax.typeof(out).sharding.mesh, P(None, None, "model"))
        move = jax.reshard if kind == EXPLICIT else jax.lax.with_sharding_constraint
        return move(out, sharding), lse

    qkv = random_qkv(getkey(), SHAPE)
    check(resharded, mesh, qkv, [P("data")] * 3, expected=attention)


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("heads_k", [1, 4])
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT, AxisType.Manual], ids=str)
def test_gradient_of_one_result_alone(getkey, kind, heads_k, stopped):
    """The cotangent of the other is a symbolic zero."""
    attention = ATTENTION["auto"]
    manual = kind == AxisType.Manual
    mesh = make_mesh(*[AUTO if manual else kind] * 2)
    keys = P("data") if heads_k == 1 else BOTH
    specs = (BOTH, keys, keys)
    sharded = attention
    if manual:
        results = (BOTH, P("data", "model"))
        sharded = jax.shard_map(attention, mesh=mesh, in_specs=specs, out_specs=results)

    def stopping(attention):
        def stopped_attention(*qkv):
            results = list(attention(*qkv))
            results[stopped] = jax.lax.stop_gradient(results[stopped])
            return results

        return stopped_attention

    qkv = random_qkv(getkey(), SHAPE._replace(heads_k=heads_k))
    communication, _ = check(stopping(sharded), mesh, qkv, specs, stopping(attention))
    assert set(communication) == ({"all-reduce"} if heads_k == 1 else set())


# ---- Sequences and head dims, and axes that do not fit -------------------------------------------


@pytest.mark.parametrize(
    "specs",
    [
        [P("data", "model")] * 3,
        [P("data", None, None, "model")] * 3,
        [P(None, "data"), P(None, None, "model"), P()],
        [P("data"), P(None, None, "model"), P()],
        [P("data"), P("model"), P()],
    ],
    ids=str,
)
def test_auto_axes_are_gathered_where_they_must_be(getkey, specs):
    qkv = random_qkv(getkey(), SHAPE._replace(seq_q=8))
    check(ATTENTION["auto"], make_mesh(AUTO, AUTO), qkv, specs)


def test_auto_heads_that_do_not_fit(getkey):
    qkv = random_qkv(getkey(), SHAPE._replace(heads=6, heads_k=3))  # two shards cut a group
    specs = [P(None, None, "data"), P(), P()]
    check(ATTENTION["auto"], make_mesh(AUTO, AUTO), qkv, specs)


@pytest.mark.parametrize(
    "specs, shape, message",
    [
        ([P("data", "model")] * 3, {}, r"query: its sequence \(axis 1\) is .*'model'.*reshard"),
        ([P(), P(None, None, None, "data"), P()], {}, r"key: its head_dim \(axis 3\) .*'data'"),
        ([P("data"), P(), P("model")], {}, r"value: its batch .*'model'.* another .*'data'"),
        (
            [P(None, None, "data"), P(), P()],
            {"heads": 6, "heads_k": 3},
            r"query: 6 heads over 3 key/value heads cannot be sharded 2 ways",
        ),
    ],
    ids=["sequence", "head_dim", "conflict", "groups"],
)
def test_explicit_axes_that_do_not_fit_are_refused(getkey, specs, shape, message):
    shape = {"seq_q": 8, **shape}
    qkv = random_qkv(getkey(), SHAPE._replace(**shape))
    with pytest.raises(ValueError, match=message):
        ATTENTION["auto"](*place(make_mesh(EXPLICIT, EXPLICIT), qkv, specs))


# ---- The extra operands of the reference ---------------------------------------------------------


@each_kind
@pytest.mark.parametrize("full", [True, False])
def test_bias_mask_and_lengths(getkey, kind, full):
    qkv = random_qkv(getkey(), SHAPE)
    size = SHAPE.scores if full else (1, SHAPE.heads, 1, SHAPE.seq_k)
    bias = jax.random.normal(getkey(), size)
    mask = jax.random.bernoulli(getkey(), 0.7, (SHAPE.batch, 1, 1, SHAPE.seq_k))
    lengths = jnp.array([6, 2, 5, 0], jnp.int32)
    mesh = make_mesh(kind, kind)
    extras = [bias, mask, lengths, lengths]
    specs = [P("data", "model") if full else P(None, "model"), P("data"), P(), P("data")]
    sharded = place(mesh, extras, specs)
    communication, _ = check(
        lambda *qkv: ATTENTION["xla"](*qkv, *sharded),
        mesh,
        qkv,
        [BOTH] * 3,
        expected=lambda *qkv: ATTENTION["xla"](*qkv, *extras),
    )
    assert not communication


# ---- jax.shard_map, partly and fully Manual ------------------------------------------------------


@pytest.mark.parametrize(
    "dispatch, check_vma", [("auto", True), ("auto", False), ("xla", True)], ids=str
)
def test_shared_keys_inside_shard_map(getkey, dispatch, check_vma):
    q, k, v = random_qkv(getkey(), SHAPE._replace(batch=2))
    keys = P(None, None, "model")
    mesh = make_mesh(AUTO, AUTO)
    attention = ATTENTION[dispatch]
    manual = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=(BOTH, keys, keys),
        out_specs=(BOTH, P("data", "model")),
        check_vma=check_vma,
    )

    def expected(q, k, v):  # q has two batch entries for each one of k and v
        halves = [attention(half, k, v) for half in jnp.split(q, 2)]
        return [jnp.concatenate(x) for x in zip(*halves, strict=True)]

    q = jnp.concatenate([q, -q])
    communication, _ = check(manual, mesh, [q, k, v], [BOTH, keys, keys], expected)
    assert set(communication) == {"all-reduce"}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spec", [P("data", "model"), P("data", None, None, "model")], ids=str)
def test_partly_manual_shard_map_gathers_where_it_must(getkey, check_vma, spec):
    qkv = random_qkv(getkey(), SHAPE._replace(seq_q=8))
    mesh = make_mesh(AUTO, AUTO)
    attention = ATTENTION["auto"]
    manual = jax.shard_map(
        attention,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=check_vma,
    )
    communication, _ = check(manual, mesh, qkv, [spec] * 3, expected=attention)
    assert communication


# ---- vmap ----------------------------------------------------------------------------------------


@each_kind
@each_dispatch
@pytest.mark.parametrize("shared", [False, True])
def test_vmap_over_a_sharded_axis(getkey, kind, dispatch, shared):
    in_axes = (0, None, None) if shared else (0, 0, 0)
    attention = jax.vmap(ATTENTION[dispatch], in_axes)
    many = [random_qkv(getkey(), SHAPE) for _ in range(2)]
    qkv = [jnp.stack(x) for x in zip(*many, strict=True)]
    qkv = [x[0] if axis is None else x for x, axis in zip(qkv, in_axes, strict=True)]
    mapped, unmapped = P("data", None, None, "model"), P(None, None, "model")
    specs = [mapped if axis == 0 else unmapped for axis in in_axes]
    mesh = make_mesh(kind, kind)
    communication, _ = check(attention, mesh, qkv, specs)
    if jax.__version_info__ >= (0, 11):  # before, JAX gathers in `vmap` over an Explicit axis
        assert set(communication) <= ({"all-reduce"} if shared else set())


@each_kind
def test_vmap_of_sharded_batches(getkey, kind):
    attention = jax.vmap(ATTENTION["auto"])
    many = [random_qkv(getkey(), SHAPE) for _ in range(3)]
    qkv = [jnp.stack(x) for x in zip(*many, strict=True)]
    check(attention, make_mesh(kind, kind), qkv, [P(None, "data", None, "model")] * 3)


def test_mesh_with_an_auto_and_an_explicit_axis(getkey):
    qkv = random_qkv(getkey(), SHAPE)
    communication, _ = check(ATTENTION["auto"], make_mesh(AUTO, EXPLICIT), qkv, [BOTH] * 3)
    assert communication  # the Auto axis is gathered: known, and in docs/transformations.md


@each_kind
def test_inside_jit_with_an_ambient_mesh(getkey, kind):
    qkv = random_qkv(getkey(), SHAPE)
    attention = ATTENTION["auto"]
    communication, _ = check(attention, make_mesh(kind, kind), qkv, [BOTH] * 3, ambient=True)
    assert not communication


# ---- Export, and the backward kernels by themselves ----------------------------------------------


def export(fn, mesh, arrays):
    arrays = place(mesh, arrays, [P("data")] * 3)
    options = {"platforms": ("cpu",), "disabled_checks": eqx_flash.export_checks()}
    with jax.set_mesh(mesh):
        exported = jax.export.export(jax.jit(fn), **options)(*arrays)
        restored = jax.export.deserialize(exported.serialize())
        jax.tree.map(np.testing.assert_array_equal, restored.call(*arrays), fn(*arrays))


def test_export_for_several_devices(getkey):
    """In `jax.shard_map` and on Explicit meshes. JAX cannot write out how an Auto one is shared."""
    qkv = random_qkv(getkey(), SHAPE)
    auto, explicit = make_mesh(AUTO, AUTO), make_mesh(EXPLICIT, EXPLICIT)
    attention = ATTENTION["auto"]
    export(attention, explicit, qkv)
    export(jax.shard_map(attention, mesh=auto, in_specs=P("data"), out_specs=P("data")), auto, qkv)
    with pytest.raises(NotImplementedError, match="host_callbacks"):
        export(attention, auto, qkv)


def test_backward_kernels_by_themselves_refuse_explicit_axes(getkey):
    q, k, v = place(make_mesh(EXPLICIT, EXPLICIT), random_qkv(getkey(), SHAPE), [BOTH] * 3)
    lse = jnp.zeros((SHAPE.batch, SHAPE.heads, SHAPE.seq_q))
    with pytest.raises(NotImplementedError, match=r"Explicit mesh axes .* jax.grad"):
        gradients(AttentionSpec(0.3), q, k, v, q, lse, q, lse)
