# SPDX-License-Identifier: Apache-2.0
"""Training steps of a transformer: our attention against cuDNN's, and two GPUs against one.

The model is that of examples/train_char_lm.py, in the size of GPT-2 medium's layers. Each variant,
an attention on a mesh, makes the same steps from the same parameters: the losses must agree. Then
all are timed in turns, in one process. What the compiled steps call and send is counted in them.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import bench
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import report
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eqx_flash

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))
import train_char_lm

DTYPE = jnp.bfloat16
TOLERANCE = float(jnp.finfo(DTYPE).eps) / 2  # relative: the rounding error of one number
LEARNING_RATE = 3e-4

Row = dict[str, Any]


# ---- Attention -----------------------------------------------------------------------------------


class JaxAttention(eqx.Module):
    """The projections of `layer`, around JAX's own attention."""

    layer: eqx_flash.nn.MultiheadAttention
    implementation: str = eqx.field(static=True)

    def __call__(self, *inputs):
        layer = self.layer
        projections = layer.query_proj, layer.key_proj, layer.value_proj
        heads = [
            jax.vmap(projection)(x).reshape(len(x), layer.num_heads, -1)
            for projection, x in zip(projections, inputs, strict=True)
        ]
        attended = jax.nn.dot_product_attention(
            *heads, is_causal=True, implementation=self.implementation
        )
        return jax.vmap(layer.output_proj)(attended.reshape(len(attended), -1))


ATTENTION = (report.OURS, "cudnn", "xla")


def use_attention(model: train_char_lm.GPT, name: str) -> train_char_lm.GPT:
    if name == report.OURS:
        return model
    layers = [JaxAttention(block.attention, name) for block in model.blocks]
    return eqx.tree_at(lambda model: [block.attention for block in model.blocks], model, layers)


# ---- Meshes --------------------------------------------------------------------------------------


MESHES = {"single": (1, 1), "data": (2, 1), "heads": (1, 2)}

# Heads and hidden channels, by the parameters that make them and by those that use them up.
SPLIT = {
    r"\.(query|key|value)_proj\.weight$|\.mlp\.layers\[0\]\.(weight|bias)$": P("heads"),
    r"\.output_proj\.weight$|\.mlp\.layers\[1\]\.weight$": P(None, "heads"),
}


def make_mesh(name: str) -> Mesh:
    shape = MESHES[name]
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "heads"), (AxisType.Auto,) * 2, devices=devices)


def shardings(mesh: Mesh, state):
    """Of parameters, and of what the optimizer keeps for each: the paths end alike."""

    def of(path, _):
        name = jax.tree_util.keystr(path)
        specs = (spec for pattern, spec in SPLIT.items() if re.search(pattern, name))
        return NamedSharding(mesh, next(specs, P()))

    return jax.tree_util.tree_map_with_path(of, state)


# ---- Training ------------------------------------------------------------------------------------


class Trainer:
    """A model in training on a mesh. A call makes a step and returns the loss before it."""

    def __init__(self, attention: str, mesh: str, model: train_char_lm.GPT, batches: np.ndarray):
        self.attention, self.mesh = attention, mesh
        params, static = eqx.partition(use_attention(model, attention), eqx.is_array)
        optimizer = optax.adamw(LEARNING_RATE)
        state = params, optimizer.init(params)
        devices = make_mesh(mesh)
        places = shardings(devices, state)
        # From the host: each variant has arrays of its own, for its steps to donate.
        self.state = jax.device_put(jax.device_get(state), places)
        self.batches = jax.device_put(batches, NamedSharding(devices, P(None, "data")))

        def loss_fn(params, windows):
            return train_char_lm.loss_fn(eqx.combine(params, static), windows, DTYPE)

        def step(state, windows):
            params, opt_state = state
            loss, grads = jax.value_and_grad(loss_fn)(params, windows)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        jitted = jax.jit(
            step, donate_argnums=0, out_shardings=(places, NamedSharding(devices, P()))
        )
        self.lowered = jitted.lower(self.state, self.batches[0])

    def compile(self) -> None:
        self.compiled = self.lowered.compile()

    def __call__(self, windows: jax.Array) -> jax.Array:
        self.state, loss = self.compiled(self.state, windows)
        return loss

    def losses(self) -> list[float]:
        """Of one step for each batch."""
        return [float(self(windows)) for windows in self.batches]


# ---- What was compiled ---------------------------------------------------------------------------


KERNELS = r"eqx_flash_\w+|__cudnn\$fmha\w+"
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


def kernel_calls(compiled: jax.stages.Compiled) -> dict[str, int]:
    """How often the program calls each attention kernel, by name and a device's first result."""
    call = rf' = \(?(\w+\[[\d,]*\]).*custom_call_target="({KERNELS})"'
    found = re.findall(call, compiled.as_text() or "")
    return dict(sorted(Counter(f"{name} {result}" for result, name in found).items()))


def collectives(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The communication in the program."""
    return dict(Counter(re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled.as_text() or "")))


def expected_calls(args: argparse.Namespace, mesh: str, count: int) -> dict[str, int]:
    """Of ours: `count` in each pass, on a device's own batch entries and heads."""
    if jax.default_backend() != "gpu":
        return {}
    batches, shards = MESHES[mesh]
    shape = args.batch // batches, args.seq, args.heads // shards, args.width // args.heads
    result = f"bf16[{','.join(map(str, shape))}]"
    return {f"eqx_flash_{pass_} {result}": count for pass_ in ("backward", "forward")}


def both_passes(attention: Callable) -> Callable:
    """`(q, k, v, dout) -> (dq, dk, dv)`, forward pass included."""

    def run(q, k, v, dout):
        return jax.vjp(attention, q, k, v)[1](dout)

    return run


def attention_alone(args: argparse.Namespace, mesh: str) -> Row:
    """Both passes of one attention whose operands are sharded as in the training step."""
    shape = args.batch, args.seq, args.heads, args.width // args.heads
    sharding = NamedSharding(make_mesh(mesh), P("data", None, "heads"))
    operand = jax.ShapeDtypeStruct(shape, DTYPE, sharding=sharding)
    attention = functools.partial(eqx_flash.dot_product_attention, is_causal=True)
    compiled = jax.jit(both_passes(attention)).lower(*[operand] * 4).compile()
    return {"kernel_calls": kernel_calls(compiled), "collectives": collectives(compiled)}


# ---- Measurements --------------------------------------------------------------------------------


def measure(args: argparse.Namespace, trainers: list[Trainer]) -> list[Row]:
    losses = [trainer.losses() for trainer in trainers]
    with bench.Sampler.running() as sampler:
        begin = time.monotonic()
        runs = {i: (trainer, (trainer.batches[0],)) for i, trainer in enumerate(trainers)}
        timed = bench.time_in_turns(runs, args.rounds, args.seconds)
        state = sampler.state(begin)
    first = statistics.median(timed[0][0])
    rows: list[Row] = []
    for i, trainer in enumerate(trainers):
        lower, median, upper = statistics.quantiles(timed[i][0], n=4)
        rows.append({
            "attention": trainer.attention, "mesh": trainer.mesh,
            "devices": len(trainer.batches.devices()),
            "median_ms": 1e3 * median, "lower_quartile_ms": 1e3 * lower,
            "upper_quartile_ms": 1e3 * upper,
            "tokens_per_second": args.batch * args.seq / median,
            "speed_to_first": first / median,
            "rounds": args.rounds, "steps_per_round": timed[i][1],
            "losses": losses[i],
            "loss_difference_to_first": max(
                abs(x / y - 1) for x, y in zip(losses[i], losses[0], strict=True)
            ),
            "kernel_calls": kernel_calls(trainer.compiled),
            "collectives": collectives(trainer.compiled),
            **state,
        })  # fmt: skip
    return rows


def failures(args: argparse.Namespace, rows: list[Row], alone: dict[str, Row]) -> list[str]:
    """What is not as it must be."""
    found = []
    for row in rows:
        name = f"{row['attention']} on {row['mesh']}"
        if not row["loss_difference_to_first"] <= TOLERANCE:  # nor NaN
            found.append(f"{name}: the losses differ from the first variant's")
        calls = expected_calls(args, row["mesh"], args.depth)
        if row["attention"] == report.OURS and row["kernel_calls"] != calls:
            found.append(f"{name}: expected the kernel calls {calls}, got {row['kernel_calls']}")
    for mesh, row in alone.items():
        calls = expected_calls(args, mesh, 1)
        if row != {"kernel_calls": calls, "collectives": {}}:
            found.append(f"attention alone on {mesh}: expected {calls}, no collectives; got {row}")
    return found


def table(rows: list[Row], alone: dict[str, Row]) -> str:
    lines = [
        f"{'attention':12s}{'mesh':8s}{'ms/step':>10s}{'quartiles':>18s}{'tokens/s':>11s}{'speed':>8s}"
        f"{'first loss':>12s}{'last loss':>11s}{'difference':>12s}{'MHz':>7s}{'W':>6s}"
    ]
    for row in rows:
        quartiles = f"{row['lower_quartile_ms']:.2f}-{row['upper_quartile_ms']:.2f}"
        lines.append(
            f"{row['attention']:12s}{row['mesh']:8s}{row['median_ms']:10.2f}{quartiles:>18s}"
            f"{row['tokens_per_second']:11.0f}{row['speed_to_first']:8.3f}"
            f"{row['losses'][0]:12.4f}{row['losses'][-1]:11.4f}"
            f"{row['loss_difference_to_first']:12.2e}"
            + "".join(
                f"{row[key]:{width}.0f}" if row[key] is not None else f"{'-':>{width}s}"
                for key, width in (("clock_mhz", 7), ("power_w", 6))
            )
        )
    programs = {f"step, {row['attention']} on {row['mesh']}": row for row in rows}
    programs |= {f"attention alone on {mesh}": row for mesh, row in alone.items()}
    for name, row in programs.items():
        for what in ("kernel_calls", "collectives"):
            counts = ", ".join(f"{n} x {x}" for x, n in row[what].items())
            lines.append(f"{name}: {what.replace('_', ' ')}: {counts or 'none'}")
    return "\n".join(lines)


# ---- Command line --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    here = pathlib.Path(__file__).parent
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=here / "results")
    parser.add_argument("--attention", default=f"{report.OURS},{'cudnn' if on_gpu else 'xla'}",
                        help=f"some of {','.join(ATTENTION)}")  # fmt: skip
    parser.add_argument("--mesh", default="single", help=f"some of {','.join(MESHES)}; "
                        "the first variant is what the others are compared with")  # fmt: skip
    parser.add_argument("--seq", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=2, help="sequences, over all devices")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="whose losses are compared")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of work in a round")
    parser.add_argument("--commit", default=os.environ.get("EQX_FLASH_COMMIT"))
    args = parser.parse_args()
    args.attention, args.mesh = args.attention.split(","), args.mesh.split(",")
    for option, names, known in (("attention", args.attention, ATTENTION),
                                 ("mesh", args.mesh, tuple(MESHES))):  # fmt: skip
        if not set(names) <= set(known):
            parser.error(f"argument --{option}: expected some of {','.join(known)}")
    if args.width % args.heads:
        parser.error(f"argument --heads: expected a divisor of the width, {args.width}")
    for mesh in args.mesh:
        batches, shards = MESHES[mesh]
        if args.batch % batches or args.heads % shards:
            parser.error(f"argument --mesh: {mesh} divides batch by {batches}, heads by {shards}")
        if batches * shards > jax.device_count():
            parser.error(f"argument --mesh: {mesh} needs {batches * shards} devices")
    return args


def main() -> None:
    args = arguments()
    about = bench.environment(args.commit)
    print(json.dumps(about), flush=True)

    begin = time.monotonic()
    head_size = args.width // args.heads
    model = train_char_lm.GPT(args.seq, args.width, args.depth, head_size, key=jax.random.key(0))
    codes, rng = train_char_lm.load_text()[0], np.random.default_rng(0)
    windows = train_char_lm.random_windows(rng, codes, args.steps * args.batch, args.seq + 1)
    batches = windows.reshape(args.steps, args.batch, args.seq + 1)
    trainers = [
        Trainer(attention, mesh, model, batches)
        for attention, mesh in itertools.product(args.attention, args.mesh)
    ]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Trainer.compile, trainers))
        alone = dict(zip(args.mesh, pool.map(functools.partial(attention_alone, args), args.mesh),
                         strict=True))  # fmt: skip
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)

    rows = measure(args, trainers)
    found = failures(args, rows, alone)
    sizes = {name: getattr(args, name) for name in ("seq", "batch", "width", "heads", "depth")}
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"environment": about, "model": sizes, "rows": rows, "attention_alone": alone,
               "tolerance": TOLERANCE, "failures": found}  # fmt: skip
    (args.out / "train_step.json").write_text(json.dumps(content, indent=1) + "\n")
    print(table(rows, alone))
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
