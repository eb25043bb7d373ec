# SPDX-License-Identifier: Apache-2.0
"""Three attention calls in one jitted function, or their gradient, replayed; test_command_buffer.py
runs this.

Its own process, because XLA reads XLA_FLAGS (for --xla_dump_to) once. Prints a JSON object, and a
fuller one where the profiler works.
"""

import collections
import gzip
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import eqx_flash

REPLAYS = 20


def three_layers(x, k, v):
    lses = []
    for causal, deterministic in ((True, False), (False, True), (True, False)):
        x, lse = eqx_flash.flash_attention_hopper_fwd(
            x, k, v, causal=causal, deterministic=deterministic
        )
        x = -x  # something of XLA's own between the calls, and exact however it is compiled
        lses.append(lse)
    return x, jnp.stack(lses)


def gradient(x, k, v):
    """Of both backward implementations."""

    def total(x, k, v):
        out, lses = three_layers(x, k, v)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(lses)

    return jax.grad(total, (0, 1, 2))(x, k, v)


# With the largest relative difference from the same calls one by one. The fused kernel sums dQ in
# any order, and what later layers make of its rounding is rounded again.
FUNCTIONS = {"three_layers": (three_layers, 0.0), "gradient": (gradient, 2**-6)}


def operands(seed: int):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, 300, 4, 128), (2, 333, 2, 128), (2, 333, 2, 128)
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


def same(actual, expected, tolerance: float) -> bool:
    def close(x, y) -> bool:
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        if tolerance == 0:
            return np.array_equal(x, y, equal_nan=True)
        return bool(np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y))

    return all(close(x, y) for x, y in zip(actual, expected, strict=True))


def traced_events(folder: pathlib.Path) -> dict[str, int]:
    """How often the profiler saw our kernel run, and a graph launched."""
    counts: collections.Counter[str] = collections.Counter()
    for path in folder.rglob("*.trace.json.gz"):
        for event in json.loads(gzip.decompress(path.read_bytes())).get("traceEvents", []):
            name = event.get("name", "")
            for part in ("GraphLaunch", "forward_kernel", "LaunchKernel"):
                counts[part] += part in name
    return dict(counts)


def main(function: str, folder: pathlib.Path) -> None:
    fn, tolerance = FUNCTIONS[function]
    sets = [operands(seed) for seed in range(3)]
    # Without jit around it each call is a program of its own, too short for a graph.
    expected = [fn(*s) for s in sets]
    replayed = jax.jit(fn)
    wrong = sum(
        not same(replayed(*s), e, tolerance)
        for _ in range(REPLAYS)
        for s, e in zip(sets, expected, strict=True)
    )
    report = {"replays": REPLAYS * len(sets), "wrong": wrong}
    print(json.dumps(report), flush=True)
    with jax.profiler.trace(folder / "trace"):
        for _ in range(REPLAYS):
            jax.block_until_ready(replayed(*sets[0]))
    report |= {"profiled_replays": REPLAYS, "events": traced_events(folder / "trace")}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
