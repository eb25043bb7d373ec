# SPDX-License-Identifier: Apache-2.0
"""Forward and backward against the fastest attention that JAX has on Hopper, in one process.

All implementations run the same arrays; a cell's figure is the median of its rounds. Power limits
the clocks, and they take a tenth of a second to follow a load. Hence many short turns, in another
order each round: all have the clocks of the mix. A cell's rounds are spread over sweeps of all
cells, in each behind a spacer of another size: what a sweep happens to get moves a ratio by 1 to
2 %. A bf16 matrix product runs along, to tell a slow kernel from a slow machine. The backward pass
is timed by itself, on what the forward pass has saved for it: in a difference of two times it would
pay for what a fast forward pass costs both in clocks.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import random
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

SAMPLED = {"clocks.sm": "clock_mhz", "power.draw": "power_w", "temperature.gpu": "temperature_c"}
State = dict[str, float | None]  # what was sampled

TOKENS = 16_384  # batch * seq
WIDTH = 2048  # heads * head_dim
HEAD_DIMS = (64, 128, 256)
MASKS = ("full", "causal")
SEQS = (512, 2048, 8192, 16_384)
# Peaky scores defeat a kernel that is fast only while its running maximum rarely moves.
QUERY_FACTOR = {"normal": 1.0, "peaky": 6.0}


# ---- What is compared ----------------------------------------------------------------------------
# Each returns a function of (q, k, v), all [batch, seq, heads, head_dim], that gives the output.


def ours(causal: bool) -> Callable:
    import eqx_flash

    # Returns the log-sum-exp too: our kernel always writes it.
    return functools.partial(eqx_flash.flash_attention_hopper_fwd, causal=causal)


def ours_deterministic(causal: bool) -> Callable:
    import eqx_flash

    return functools.partial(
        eqx_flash.flash_attention_hopper_fwd, causal=causal, deterministic=True
    )


def fa3(causal: bool) -> Callable:
    jax.devices()  # loads the CUDA runtime, which the library looks for
    import dew_flash_attn  # pyright: ignore[reportMissingImports]

    return functools.partial(dew_flash_attn.flash_mha, is_causal=causal)


def cudnn(causal: bool) -> Callable:
    return functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")


def mosaic(causal: bool) -> Callable:
    import tokamax  # pyright: ignore[reportMissingImports]

    return functools.partial(
        tokamax.dot_product_attention, is_causal=causal, implementation="mosaic"
    )


IMPLEMENTATIONS = {
    report.OURS: ours,
    report.DETERMINISTIC: ours_deterministic,
    "fa3": fa3,
    "cudnn": cudnn,
    "mosaic": mosaic,
}
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-nccl-cu13",
            "eqx-flash", "equinox", "optax", "dew-flash-attn-cu13", "tokamax")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    head_dim: int
    mask: str
    seq: int

    def __str__(self) -> str:
        return f"d{self.head_dim}-{self.mask}-{self.seq}"

    @property
    def array(self) -> tuple[int, int, int, int]:
        return TOKENS // self.seq, self.seq, WIDTH // self.head_dim, self.head_dim

    @property
    def flops(self) -> float:
        """Of the forward pass: two matrix products; of a causal mask half."""
        return 4 * TOKENS * self.seq * WIDTH / (2 if self.mask == "causal" else 1)


BACKWARD_FLOPS = 2.5  # of the forward's: five products


def saving_pass(fn: Callable) -> Callable:
    """`(q, k, v) -> backward`, the forward pass for the sake of what a backward pass needs."""

    def run(q, k, v):
        return jax.vjp(lambda *operands: _output(fn(*operands)), q, k, v)[1]

    return run


def backward_pass(backward: Callable, dout: jax.Array):
    return backward(dout)


SHAPES = [Shape(d, mask, seq) for d in HEAD_DIMS for mask in MASKS for seq in SEQS]


# ---- Compilation ---------------------------------------------------------------------------------


Programs = dict[str, Callable]  # by implementation


def compile_all(
    shapes: list[Shape], names: list[str], passes: list[str], threads: int
) -> dict[tuple[Shape, str], Programs]:
    """{(shape, "fwd", "saving" or "bwd"): programs}.

    What cannot be had is left out, with a line that says why.
    """
    lowered = {}
    for shape, name in itertools.product(shapes, names):
        operand = jax.ShapeDtypeStruct(shape.array, jnp.bfloat16)
        with left_out_on_error(name, shape):
            fn = IMPLEMENTATIONS[name](shape.mask == "causal")
            if name != report.DETERMINISTIC:  # only the backward pass differs
                lowered[shape, "fwd", name] = jax.jit(fn).lower(*[operand] * 3)
            if "bwd" in passes:
                saving = jax.jit(saving_pass(fn)).lower(*[operand] * 3)
                saved = jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saving.out_info
                )
                lowered[shape, "saving", name] = saving
                lowered[shape, "bwd", name] = jax.jit(backward_pass).lower(saved, operand)
    programs: dict[tuple[Shape, str], Programs] = {
        (shape, pass_): {} for shape in shapes for pass_ in ("fwd", "saving", "bwd")
    }
    with ThreadPoolExecutor(threads) as pool:
        jobs = {where: pool.submit(one.compile) for where, one in lowered.items()}
        for (shape, pass_, name), job in jobs.items():
            with left_out_on_error(name, shape):
                programs[shape, pass_][name] = job.result()
    return programs


@contextlib.contextmanager
def left_out_on_error(name: str, shape: Shape) -> Iterator[None]:
    """A peer may not be installed, or not serve a shape. The others are worth measuring still."""
    try:
        yield
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        print(f"{name} {shape} left out: {type(error).__name__}: {text[0][:160]}", flush=True)


def thermometer() -> tuple[Callable, tuple, float]:
    """A matrix product: `(program, operands, flops)`."""
    n = 8192
    operands = tuple(jax.random.normal(key, (n, n), jnp.bfloat16) for key in _keys(0, 2))
    return jax.jit(jnp.matmul).lower(*operands).compile(), operands, 2 * n**3


# ---- Timing --------------------------------------------------------------------------------------


def batch_seconds(program: Callable, operands: tuple, calls: int) -> float:
    """Time of so many calls, enqueued without waiting: the GPU never sees the host's overhead."""
    start = time.perf_counter()
    for _ in range(calls):
        result = program(*operands)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def turns(names: Iterable[Any], rounds: int, seed: int = 0) -> Iterator[list[Any]]:
    """All names in another order each round."""
    names, order = list(names), random.Random(seed)
    for _ in range(rounds):
        yield order.sample(names, len(names))


def time_in_turns(
    runs: dict[Any, tuple[Callable, tuple]], rounds: int, batch: float, seed: int = 0
) -> dict[Any, tuple[list[float], int]]:
    """{name: (seconds per call of each round, calls in a round)}."""
    calls = {}
    for name, (program, operands) in runs.items():
        batch_seconds(program, operands, 2)
        calls[name] = max(2, round(batch / batch_seconds(program, operands, 4) * 4))
        batch_seconds(program, operands, calls[name])  # warm: clocks, too
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for names in turns(runs, rounds, seed):
        for name in names:
            seconds[name].append(batch_seconds(*runs[name], calls[name]) / calls[name])
    return {name: (seconds[name], calls[name]) for name in runs}


Runs = dict[tuple[str, str], tuple[Callable, tuple]]  # pass, name: program, operands


def runs_of(programs: dict[str, Programs], q, k, v, dout) -> Runs:
    """What to time of each pass in `programs`; "bwd" needs "saving"."""
    runs: Runs = {("fwd", name): (p, (q, k, v)) for name, p in programs.get("fwd", {}).items()}
    for name, program in programs.get("bwd", {}).items():
        runs["bwd", name] = program, (programs["saving"][name](q, k, v), dout)
    return runs


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one implementation in one cell, by one sweep."""

    flops: float
    seconds: list[float]  # per call, of each round
    calls: int  # in a round
    difference: float | None  # the largest, to our result
    state: State  # of the machine


Key = tuple[str, str, Shape, str]  # data, pass, shape, implementation


def measure_cell(
    shape: Shape, data: str, programs: dict[str, Programs], reference: tuple, sampler: "Sampler",
    rounds: int, batch: float, seed: int = 0,
) -> dict[Key, Measurement]:  # fmt: skip
    """Of the passes in `programs`."""
    # Moves what is allocated after it.
    spacer = jnp.zeros(random.Random(f"{seed} {data} {shape}").randrange(1 << 28), jnp.int8)
    q, k, v, dout = (jax.random.normal(key, shape.array, jnp.bfloat16) for key in _keys(0, 4))
    q = q * jnp.asarray(QUERY_FACTOR[data], q.dtype)
    runs = runs_of(programs, q, k, v, dout)
    differences = compare(runs)
    matmul, matrices, matmul_flops = reference
    runs["fwd", report.THERMOMETER] = matmul, matrices
    begin = time.monotonic()
    timed = time_in_turns(runs, rounds, batch, seed)
    state = sampler.state(begin)
    spacer.delete()
    return {
        (data, pass_, shape, name): Measurement(
            (matmul_flops if name == report.THERMOMETER else shape.flops)
            * (BACKWARD_FLOPS if pass_ == "bwd" else 1),
            seconds, calls, differences.get((pass_, name)), state,
        )
        for (pass_, name), (seconds, calls) in timed.items()
    }  # fmt: skip


def rows_of(measurements: dict[Key, list[Measurement]]) -> list[report.Row]:
    """From those of each sweep."""
    return [
        {
            "data": data, "pass": pass_, "head_dim": shape.head_dim, "mask": shape.mask,
            "seq": shape.seq, "implementation": name, **summary(sweeps),
        }
        for (data, pass_, shape, name), sweeps in measurements.items()
    ]  # fmt: skip


def summary(sweeps: list[Measurement]) -> report.Row:
    seconds = [x for sweep in sweeps for x in sweep.seconds]
    lower, median, upper = statistics.quantiles(seconds, n=4)
    medians = [statistics.median(sweep.seconds) for sweep in sweeps]
    differences = [sweep.difference for sweep in sweeps if sweep.difference is not None]
    return {
        "tflops": sweeps[0].flops / median / 1e12, "median_ms": 1e3 * median,
        "lower_quartile_ms": 1e3 * lower, "upper_quartile_ms": 1e3 * upper,
        "fastest_ms": 1e3 * min(seconds), "rounds": len(seconds),
        "sweep_medians_ms": " ".join(f"{1e3 * x:.4f}" for x in medians),
        "calls_per_round": sweeps[0].calls,
        # Not max(), which may lose a NaN.
        "max_difference_to_ours": float(np.max(differences)) if differences else None,
        **{name: _mean(sweep.state[name] for sweep in sweeps) for name in SAMPLED.values()},
    }  # fmt: skip


def _mean(values: Iterable[float | None]) -> float | None:
    known = [x for x in values if x is not None]
    return statistics.mean(known) if known else None


def compare(runs: Runs) -> dict[tuple[str, str], float]:
    """The largest difference of each result from ours: a fast wrong answer should not pass."""
    results = {where: _output(program(*operands)) for where, (program, operands) in runs.items()}
    return {
        (pass_, name): float(_difference(x, results[pass_, report.OURS]))
        for (pass_, name), x in results.items()
        if (pass_, report.OURS) in results
    }


@jax.jit
def _difference(x, y):
    return jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)))


def _output(result):
    return result[0] if isinstance(result, tuple | list) else result


# ---- The machine ---------------------------------------------------------------------------------


class Sampler:
    """nvidia-smi in the background: what the GPU did between two moments."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, list[float]]] = []

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator["Sampler"]:
        sampler = cls()
        command = ["nvidia-smi", f"--query-gpu={','.join(SAMPLED)}", "-i", "0",
                   "--format=csv,noheader,nounits", "-lms", "100"]  # fmt: skip
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            yield sampler
            return
        threading.Thread(target=sampler._read, args=(process.stdout,), daemon=True).start()
        try:
            yield sampler
        finally:
            process.kill()
            process.wait()

    def _read(self, lines) -> None:
        for line in lines:
            with contextlib.suppress(ValueError):
                self.samples.append((time.monotonic(), [float(x) for x in line.split(",")]))

    def state(self, begin: float) -> State:
        """Medians since `begin`."""
        found = [values for when, values in self.samples if when >= begin]
        if not found:
            return dict.fromkeys(SAMPLED.values())
        medians = map(statistics.median, zip(*found, strict=True))
        return dict(zip(SAMPLED.values(), medians, strict=True))


def environment(commit: str | None) -> dict[str, Any]:
    query = "name,driver_version,power.limit,clocks.max.sm,memory.total"
    gpu = _output_of("nvidia-smi", f"--query-gpu={query}", "-i", "0", "--format=csv,noheader")
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    root = str(pathlib.Path(__file__).parents[1])
    return {
        "gpu": gpu.split(",")[0] or jax.devices()[0].device_kind,
        "gpu_details": gpu,
        "commit": commit or _output_of("git", "-C", root, "rev-parse", "HEAD") or "unknown",
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def _keys(seed: int, n: int):
    return jax.random.split(jax.random.key(seed), n)


# ---- Command line --------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    here = pathlib.Path(__file__).parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=here / "results")
    parser.add_argument("--cells", default="", help="only cells whose name, as d128-causal-8192, "
                        "contains one of these words (comma-separated)")  # fmt: skip
    parser.add_argument("--data", default=",".join(QUERY_FACTOR))
    parser.add_argument("--passes", default="fwd,bwd")
    parser.add_argument("--backward-data", default=",".join(QUERY_FACTOR))
    parser.add_argument("--implementations", default=",".join(IMPLEMENTATIONS))
    parser.add_argument("--sweeps", type=int, default=2, help="over all cells")
    parser.add_argument("--rounds", type=int, default=15, help="of a cell, in each sweep")
    parser.add_argument("--batch", type=float, default=0.006, help="seconds of work in a round")
    parser.add_argument("--compile-threads", type=int, default=8)
    parser.add_argument("--budget", type=float, default=1e9, help="seconds, then stop early")
    parser.add_argument("--commit", default=os.environ.get("EQX_FLASH_COMMIT"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    deadline = time.monotonic() + args.budget
    words = [word for word in args.cells.split(",") if word] or [""]
    shapes = [shape for shape in SHAPES if any(word in str(shape) for word in words)]
    names = args.implementations.split(",")
    about = environment(args.commit)
    print(json.dumps(about), flush=True)

    begin = time.monotonic()
    programs = compile_all(shapes, names, args.passes.split(","), args.compile_threads)
    reference = thermometer()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    measurements: dict[Key, list[Measurement]] = defaultdict(list)
    with Sampler.running() as sampler:
        for sweep, data, shape in itertools.product(
            range(args.sweeps), args.data.split(","), shapes
        ):
            if time.monotonic() > deadline:
                where = f"{shape} {data} of sweep {sweep}"
                print(f"out of time: {where} and what follows are missing", flush=True)
                break
            with_backward = data in args.backward_data.split(",")
            passes = ("fwd", "saving", "bwd") if with_backward else ("fwd",)
            measured = measure_cell(
                shape, data, {pass_: programs[shape, pass_] for pass_ in passes}, reference,
                sampler, args.rounds, args.batch, sweep,
            )  # fmt: skip
            for key, measurement in measured.items():
                measurements[key].append(measurement)
            report.write(args.out, about, rows_of(measurements))  # what is measured is never lost
    if not (rows := rows_of(measurements)):
        raise SystemExit("nothing was measured")
    print(report.table(rows))
    report.plot(args.out / "bench.png", about, rows)


if __name__ == "__main__":
    main()
