# SPDX-License-Identifier: Apache-2.0
"""Every transformation of JAX with every feature of attention, through the public function.

The table is printed at the end of the run, and docs/transformations.md has it as well. What a
transformation promises beyond that is in test_transforms.py, test_sharding.py, test_lowering.py.
"""

import contextlib
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    Shape,
    generator,
    markdown_table,
    plain_attention,
    quick_compilation,
    random_qkv,
)
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowered import KERNEL, collectives, cuda_text, kernel_calls

import eqx_flash
from eqx_flash import _platform
from eqx_flash._spec import AttentionSpec

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "transformations.md"

SHAPE = Shape(batch=4, seq_q=5, seq_k=7, heads=2, heads_k=2, head_dim=8)
MAPPED = 3  # unlike every axis of the above: a swap must show
EXTRAS = ("bias", "mask", "query_seq_lengths", "key_value_seq_lengths")
NAMES = ("eqx_flash_out", "eqx_flash_lse")
BATCH_AND_HEADS = P("data", None, "model")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """The same on every machine: a process without CUDA devices."""
    machine = _platform.Machine(devices=(), built=False, head_dims=())
    monkeypatch.setattr(_platform, "machine", lambda: machine)
    with jax.default_device(jax.devices("cpu")[0]), quick_compilation():
        yield


# ---- Features: the columns -----------------------------------------------------------------------


class Feature(NamedTuple):
    heads: int = SHAPE.heads
    causal: bool = False
    alignment: str = "top_left"
    extras: tuple[str, ...] = ()

    @property
    def on_kernel(self) -> bool:
        return not self.extras


FEATURES = {
    "full": Feature(),
    "causal, top left": Feature(causal=True),
    "causal, bottom right": Feature(causal=True, alignment="bottom_right"),
    "GQA": Feature(heads=2 * SHAPE.heads_k),
    "bias and mask": Feature(extras=EXTRAS[:2]),
    "lengths": Feature(extras=EXTRAS[2:]),
}


class Case:
    """Attention with one feature: a function `(*operands) -> (out, lse)`, and what it gives."""

    def __init__(self, feature: Feature):
        self.feature = feature
        self.shape = SHAPE._replace(heads=feature.heads)
        # In float32, not even a program for CUDA would call the kernel.
        self.dtype = jnp.float16 if feature.on_kernel else jnp.float32
        self.examples = [self.random_operands(seed) for seed in range(MAPPED)]
        self.operands = self.examples[0]
        # Those that have a gradient.
        floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in self.operands]
        self.floats = tuple(np.flatnonzero(floats).tolist())
        # Compiled once for all rows of the table.
        self.run = jax.jit(self.__call__)
        self.run_gradients = jax.jit(self.gradients)

    def random_operands(self, seed):
        rng = generator(jax.random.key(seed))
        batch, seq_q, seq_k, *_ = self.shape
        extras = {
            "bias": rng.standard_normal(self.shape.scores).astype(np.float32),
            "mask": rng.random((batch, 1, 1, seq_k)) < 0.7,
            "query_seq_lengths": rng.integers(seq_q + 1, size=batch, dtype=np.int32),
            "key_value_seq_lengths": rng.integers(seq_k + 1, size=batch, dtype=np.int32),
        }
        qkv = random_qkv(jax.random.key(seed), self.shape, self.dtype)
        return [*qkv, *(jnp.asarray(extras[name]) for name in self.feature.extras)]

    def __call__(self, query, key, value, *extras):
        return eqx_flash.dot_product_attention(
            query,
            key,
            value,
            **dict(zip(self.feature.extras, extras, strict=True)),
            is_causal=self.feature.causal,
            causal_alignment=self.feature.alignment,
            return_residual=True,
        )

    def plain(self, *operands):
        """The formula, in float32."""
        feature = self.feature
        spec = AttentionSpec(self.shape.head_dim**-0.5, feature.causal, feature.alignment)
        qkv = (x.astype(jnp.float32) for x in operands[:3])
        extras = dict(zip(feature.extras, operands[3:], strict=True))
        renamed = {name.replace("_seq_", "_"): x for name, x in extras.items()}
        out, lse = plain_attention(spec, *qkv, **renamed)
        return out, jnp.swapaxes(lse, 1, 2)

    def loss(self, *operands):
        return total(*self(*operands))

    def gradients(self, *operands):
        return jax.grad(self.loss, self.floats)(*operands)

    @functools.cached_property
    def expected(self):
        return self(*self.operands)

    @functools.cached_property
    def expected_gradients(self):
        return self.run_gradients(*self.operands)

    def mapped(self, in_axes):
        """Operands that have a new axis where `in_axes` says so, and the examples along it."""
        arrays = [
            self.operands[i] if axis is None else jnp.stack([x[i] for x in self.examples], axis)
            for i, axis in enumerate(in_axes)
        ]
        examples = [
            [self.operands[i] if axis is None else x[i] for i, axis in enumerate(in_axes)]
            for x in self.examples
        ]
        return arrays, examples

    def some_in_axes(self):
        """Only the query mapped, and all operands, each along its last axis."""
        shared = (None,) * len(self.operands)
        return (0, *shared[1:]), tuple(x.ndim for x in self.operands)


@functools.cache
def case_of(feature):
    return Case(FEATURES[feature])


def total(out, lse):
    """Depends on every entry of out and lse, and has a finite gradient where lse is infinite."""
    return jnp.sum(jnp.sin(out.astype(jnp.float32))) + jnp.sum(jnp.exp(lse / 2))


def assert_close(ours, expected):
    """To a few roundings of the largest number."""

    def check(ours, expected):
        eps = float(jnp.finfo(ours.dtype).eps)
        ours, expected = (np.asarray(x, np.float64) for x in (ours, expected))
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=8 * eps * largest)

    jax.tree.map(check, ours, expected)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


# ---- Transformations: the rows -------------------------------------------------------------------

TRANSFORMATIONS: dict[str, Callable[[Case], None]] = {}


def row(name):
    """Puts a function into the table: it transforms `case` and compares with the call as it is."""
    return lambda check: TRANSFORMATIONS.setdefault(name, check)


@row("jit")
def jit(case):
    assert_close(case.run(*case.operands), case.expected)


@row("grad")
def grad(case):
    expected = jax.jit(jax.grad(lambda *x: total(*case.plain(*x)), case.floats))(*case.operands)
    assert_close(case.gradients(*case.operands), expected)


@row("value_and_grad with the residual as aux")
def value_and_grad(case):
    def with_residual(*operands):
        out, lse = case(*operands)
        return total(out, lse), lse

    transformed = jax.jit(jax.value_and_grad(with_residual, case.floats, has_aux=True))
    (value, lse), gradients = transformed(*case.operands)
    assert_close(value, total(*case.expected))
    assert_close((lse, gradients), (case.expected[1], case.expected_gradients))


@row("vmap over any operands and axes")
def vmap(case):
    subsets = itertools.product((True, False), repeat=len(case.operands))
    every_in_axes = [
        # The axes differ from operand to operand, and from subset to subset.
        tuple(
            (i + j) % (x.ndim + 1) if mapped else None
            for j, (mapped, x) in enumerate(zip(subset, case.operands, strict=True))
        )
        for i, subset in enumerate(subsets)
        if any(subset)
    ]
    mapped = [case.mapped(in_axes) for in_axes in every_in_axes]

    def each(*many):
        return [jax.vmap(case, axes)(*x) for axes, x in zip(every_in_axes, many, strict=True)]

    many = [arrays for arrays, _ in mapped]
    for ours, (_, examples) in zip(jax.jit(each)(*many), mapped, strict=True):
        assert_close(ours, stack([case.run(*x) for x in examples]))
    assert kernel_calls(cuda_text(each, *many)) == len(many) * case.feature.on_kernel


@row("vmap(grad)")
def vmap_of_grad(case):
    for in_axes in case.some_in_axes():
        arrays, examples = case.mapped(in_axes)
        gradients = jax.jit(jax.vmap(case.gradients, in_axes))(*arrays)
        assert_close(gradients, stack([case.run_gradients(*x) for x in examples]))


@row("grad(vmap)")
def grad_of_vmap(case):
    for in_axes in case.some_in_axes():
        arrays, examples = case.mapped(in_axes)
        mapped = jax.vmap(case.loss, in_axes)
        gradients = jax.jit(jax.grad(lambda *x, f=mapped: jnp.sum(f(*x)), case.floats))(*arrays)
        each = stack([case.run_gradients(*x) for x in examples])
        axes = [in_axes[i] for i in case.floats]
        assert_close(
            gradients,
            tuple(
                jnp.sum(dx, 0) if axis is None else jnp.moveaxis(dx, 0, axis)
                for dx, axis in zip(each, axes, strict=True)
            ),
        )


@row("vmap(vmap(grad))")
def vmap_of_vmap(case):
    query, key, value, *extras = case.operands
    factors = jnp.array([[1, 2, -1], [0.5, -2, 0]], query.dtype)
    queries = jnp.einsum("ij,btnh->ibtjnh", factors, query)
    keys = jnp.einsum("j,bsnh->jbsnh", factors[0], key)
    shared = (None,) * (1 + len(extras))
    inner = jax.vmap(case.gradients, (2, 0, *shared))
    nested = jax.jit(jax.vmap(inner, (0, None, *shared)))
    expected = [
        stack([case.run_gradients(queries[i, :, :, j], keys[j], value, *extras) for j in range(3)])
        for i in range(2)
    ]
    assert_close(nested(queries, keys, value, *extras), stack(expected))


@row("checkpoint with named results")
def checkpoint(case):
    policy = jax.checkpoint_policies.save_only_these_names(*NAMES)
    transformed = jax.value_and_grad(jax.checkpoint(case.loss, policy=policy), case.floats)
    value, gradients = jax.jit(transformed)(*case.operands)
    assert_close((value, gradients), (total(*case.expected), case.expected_gradients))
    assert kernel_calls(cuda_text(transformed, *case.operands)) == case.feature.on_kernel


@row("scan")
def scan(case):
    query, *others = case.operands
    factors = jnp.array([0.5, 1, 2], query.dtype)

    def layer(query, factor):
        return case(factor * query, *others)[0]

    def scanned(query):
        body = jax.checkpoint(lambda query, factor: (layer(query, factor), None))
        return total(jax.lax.scan(body, query, factors)[0], 0.0)

    def unrolled(query):
        return total(functools.reduce(jax.jit(layer), factors, query), 0.0)

    transformed = jax.value_and_grad(scanned)
    assert_close(jax.jit(transformed)(query), jax.value_and_grad(unrolled)(query))
    # A call in the loop forwards, and another in the one back, which computes each layer again.
    assert kernel_calls(cuda_text(transformed, query)) == 2 * case.feature.on_kernel


@row("map")
def map_(case):
    @jax.jit
    def mapped(*examples):  # a loop over pairs and a single one
        return jax.lax.map(lambda x: case(*x), examples, batch_size=MAPPED - 1)

    assert_close(mapped(*stack(case.examples)), stack([case.run(*x) for x in case.examples]))


@row("shard_map, check_vma=True")
def shard_map(case, check_vma=True, axis_names=("data", "model")):
    mesh = make_mesh(AxisType.Auto)
    check_sharded(
        case,
        jax.shard_map(
            case,
            mesh=mesh,
            in_specs=tuple(only(axis_names, spec) for spec in specs(case.operands)),
            out_specs=only(axis_names, BATCH_AND_HEADS),
            axis_names=set(axis_names),
            check_vma=check_vma,
        ),
        mesh,
    )


@row("shard_map, check_vma=False")
def shard_map_without_vma(case):
    shard_map(case, check_vma=False)


@row("shard_map over a part of the mesh")
def partial_shard_map(case):
    for check_vma in (True, False):
        shard_map(case, check_vma, axis_names=("data",))


@row("Auto mesh")
def auto_mesh(case):
    check_sharded(case, case, make_mesh(AxisType.Auto))


@row("Explicit mesh")
def explicit_mesh(case):
    check_sharded(case, case, make_mesh(AxisType.Explicit))


def make_mesh(kind):
    devices = jax.devices("cpu")[:8]
    return jax.make_mesh((4, 2), ("data", "model"), (kind, kind), devices=devices)


def specs(operands):
    """The batch over "data", the heads over "model"."""
    for i, x in enumerate(operands):
        if i < 3:
            yield BATCH_AND_HEADS
        else:
            yield P("data", "model") if x.ndim == 4 and x.shape[1] > 1 else P("data")


def only(axis_names, spec):
    return P(*(axis if axis in axis_names else None for axis in spec))


def check_sharded(case, attention, mesh):
    """Right values, placed like the operands, and no communication: forward and gradient."""

    def everything(*operands):
        results = attention(*operands)
        gradients = jax.grad(lambda *x: total(*attention(*x)), case.floats)(*operands)
        return results, gradients

    shardings = [NamedSharding(mesh, spec) for spec in specs(case.operands)]
    operands = jax.device_put(case.operands, shardings)
    compiled = jax.jit(everything).lower(*operands).compile()
    assert not collectives(compiled)
    results, gradients = compiled(*operands)
    assert_close((results, gradients), (case.expected, case.expected_gradients))
    expected = [shardings[i] for i in (0, 0, *case.floats)]
    for x, sharding in zip([*results, *gradients], expected, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@row("export")
def export(case, platforms=("cpu",)):
    def everything(*operands):
        return case(*operands), case.gradients(*operands)

    exported = jax.export.export(
        jax.jit(everything), platforms=platforms, disabled_checks=eqx_flash.export_checks()
    )(*case.operands)
    restored = jax.export.deserialize(exported.serialize())
    assert_close(restored.call(*case.operands), (case.expected, case.expected_gradients))
    return exported.mlir_module()


@row("export for CPU and CUDA")
def export_for_two_platforms(case):
    module = export(case, ("cpu", "cuda"))
    assert (KERNEL in module) == case.feature.on_kernel


@row("persistent compilation cache")
def persistent_cache(case):
    events = Counter()

    def count(event, **_):
        events[event.removeprefix("/jax/compilation_cache/")] += 1

    jax.monitoring.register_event_listener(count)
    try:
        with compilation_cache_in_a_new_folder():
            for hits in (0, 1):
                events.clear()
                function = jax.jit(lambda *x: case.gradients(*x))  # new to JAX's cache in memory
                assert_close(function(*case.operands), case.expected_gradients)
                assert (events["cache_hits"], events["cache_misses"]) == (hits, 1 - hits)
    finally:
        jax.monitoring.unregister_event_listener(count)


@contextlib.contextmanager
def compilation_cache_in_a_new_folder():
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # JAX looks at the settings once
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


@row("donation")
def donation(case):
    query = jnp.copy(case.operands[0])
    out, lse = jax.jit(case, donate_argnums=0)(query, *case.operands[1:])
    assert query.is_deleted()
    assert_close((out, lse), case.expected)


@row("second derivative")
def second_derivative(case):
    query, *others = case.operands

    def of(attention, query):
        def loss(query):
            return total(*attention(query, *others))

        return jax.grad(lambda query: total(jax.grad(loss)(query), 0.0))(query)

    ours, expected = (jax.jit(functools.partial(of, f))(query) for f in (case, case.plain))
    assert_close(ours, expected)


@row("jvp")
def jvp(case):
    query, *others = case.operands
    jax.jvp(lambda query: case(query, *others), (query,), (query,))


# ---- The table -----------------------------------------------------------------------------------

CELLS = list(itertools.product(TRANSFORMATIONS, FEATURES))
NO_SECOND = (NotImplementedError, 'implementation="xla"')
NO_FORWARD = (NotImplementedError, "forward-mode")
RAISES = {
    **{("second derivative", name): NO_SECOND for name, x in FEATURES.items() if x.on_kernel},
    **{("jvp", name): NO_FORWARD for name in FEATURES},
}
OUTCOMES = {cell: "raises" if cell in RAISES else "ok" for cell in CELLS}


@pytest.mark.parametrize("transformation, feature", CELLS)
def test_cell(transformation, feature, record_property):
    cell = transformation, feature
    # For conftest.py, which prints the table.
    record_property("transformation_matrix", (CELLS.index(cell), *cell, OUTCOMES[cell]))
    error, message = RAISES.get(cell, (None, None))
    with pytest.raises(error, match=message) if error else contextlib.nullcontext():
        TRANSFORMATIONS[transformation](case_of(feature))


def test_the_docs_have_this_table():
    assert markdown_table("", OUTCOMES) in DOCS.read_text()


def test_snippets_in_the_docs_run():
    snippets = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(snippets)],
        env=os.environ | settings,
        check=True,
        timeout=120,
    )
