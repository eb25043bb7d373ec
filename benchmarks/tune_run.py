# SPDX-License-Identifier: Apache-2.0
"""Checks and times the libraries of `tune_build`. Part of `tune.py`.

First each library, in a process of its own, runs small problems that the tests' oracle judges, and
once each shape that will be timed. Those that pass are then timed in turns, in one process.
"""

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # memory is not all JAX's

import bench
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import report
import tune_build
import tune_device
from tune_cases import Case, Cases, Checker, Checks, check, check_table, plain
from tune_device import Library, Memory, Problem

PASSES = {"forward": "fwd", "backward": "bwd", "deterministic": "bwd"}

# Rows of right results differ by roundings to bf16, 1/256 of them. Of 16,384 keys a missing block
# of 128 makes a difference of 1/11.
LARGEST_DIFFERENCE = 1 / 32

HANGS_AFTER = 40  # seconds of one step that should take a few milliseconds

Row = dict[str, Any]


# ---- Correctness ---------------------------------------------------------------------------------


# 32 heads of full length outnumber the multiprocessors.
CASES = Cases(
    batch=2,
    heads=16,
    length=1024,
    cases=(
        Case(1024, 1024, 16),
        Case(1000, 777, 4, missing_columns=8),  # causal: rows that see nothing
        Case(333, 1019, 1, alignment="top_left", query_factor=bench.QUERY_FACTOR["peaky"]),
        Case(1, 129, 8),
    ),
)


# ---- Timing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cell:
    pass_: str
    shape: bench.Shape

    def __str__(self) -> str:
        return f"{self.pass_}-{self.shape}"

    @property
    def kernel(self) -> str:
        return f"{self.problem.kind}-d{self.shape.head_dim}-{self.shape.mask}"

    @property
    def problem(self) -> Problem:
        batch, seq, heads, head_dim = self.shape.array
        return Problem(self.pass_, batch, seq, seq, heads, heads, head_dim)

    @property
    def flops(self) -> float:
        return self.shape.flops * (1 if self.pass_ == "forward" else bench.BACKWARD_FLOPS)


class Watchdog:
    """Ends the process when a step takes too long: a kernel that hangs cannot be stopped."""

    def __init__(self, limit: float) -> None:
        self._limit, self._step, self._since = limit, "", time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def begin(self, step: str) -> None:
        self._step, self._since = step, time.monotonic()

    def _watch(self) -> None:
        while True:
            time.sleep(1)
            if time.monotonic() - self._since > self._limit:
                print(f"{self._step} hangs; what was measured before is written", flush=True)
                os._exit(1)


Libraries = dict[str, Library]  # by variant, shipped first
Arrays = dict[str, np.ndarray]
Measurement = Callable[[int], float]  # so many calls to seconds for one


def time_in_turns(
    measurements: dict[str, Measurement], rounds: int, batch: float, watchdog: Watchdog, where: str
) -> dict[str, list[float]]:
    """The seconds of each round."""
    calls = {}
    for name, measure in measurements.items():
        watchdog.begin(f"{name} in {where}")
        measure(2)
        calls[name] = max(1, round(batch / max(measure(3), 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in measurements}
    for names in bench.turns(measurements, rounds):
        for name in names:
            watchdog.begin(f"{name} in {where}")
            seconds[name].append(measurements[name](calls[name]))
    return seconds


def prepare(cell: Cell, libraries: Libraries, forward: Library, memory: Memory) -> None:
    """Makes room for the cell; for a backward pass, `forward` computes what it starts from."""
    problem = cell.problem
    for library in libraries.values():
        memory.reserve(library.buffer_bytes(problem))
    if problem.kind == "backward":
        before = dataclasses.replace(problem, pass_="forward")
        memory.reserve(forward.buffer_bytes(before))
        tune_device.run_poisoned(forward, memory, before)
        memory.upload("dlse", np.zeros(problem.shape("dlse"), np.float32))


def differences(
    cell: Cell, libraries: Libraries, memory: Memory, watchdog: Watchdog
) -> dict[str, float]:
    """Of each variant's 16-bit results from those of the first."""
    problem = cell.problem
    names = [name for name in tune_device.OUTPUTS[problem.kind] if name != "lse"]
    found = {}
    for variant, library in libraries.items():
        watchdog.begin(f"{variant} in {cell}")
        tune_device.run_poisoned(library, memory, problem)
        if not found:
            sizes = library.buffer_bytes(problem)
            memory.reserve({f"expected_{name}": sizes[name] for name in names})
            for name in names:
                library.copy(memory[f"expected_{name}"], memory[name], sizes[name])
        found[variant] = max(
            library.difference(
                memory[name], memory[f"expected_{name}"], problem.shape(name), memory["scratch"]
            )
            for name in names
        )
    return found


def peer_measurements(cell: Cell, programs: dict, arrays: Arrays) -> dict[str, Measurement]:
    """As XLA runs them, which takes a little longer than launches alone."""
    shape = cell.shape
    q, k, v, dout = (jnp.asarray(arrays[x].reshape(shape.array)) for x in ("q", "k", "v", "dout"))
    passes = ("fwd",) if cell.pass_ == "forward" else ("saving", "bwd")
    runs = bench.runs_of({p: programs.get((shape, p), {}) for p in passes}, q, k, v, dout)

    def measure(calls: int, program: Callable, operands: tuple) -> float:
        return bench.batch_seconds(program, operands, calls) / calls

    return {
        name: functools.partial(measure, program=program, operands=operands)
        for (_, name), (program, operands) in runs.items()
    }


# ---- All of it -----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.budget
    manifest = json.loads((args.folder / "manifest.json").read_text())
    built, measured = load(manifest, args)
    cells = [
        cell
        for cell in (Cell(p, shape) for p in args.passes for shape in bench.SHAPES)
        if measured.get(cell.kernel) and tune_build.matches(str(cell), args.cells)
    ]
    if not cells:
        sys.exit("no cell has a library and matches")
    about = bench.environment(args.commit) | {"manifest": manifest}
    print(f"{about['gpu_details'] or about['gpu']}, kernels of {manifest['commit']}", flush=True)

    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(bench.TOKENS * bench.WIDTH, np.float32).astype(ml_dtypes.bfloat16)
        for name in ("q", "k", "v", "dout")
    }
    begin = time.monotonic()
    checks = check_all(args, cells, measured, arrays["q"], deadline)
    print(f"{check_table(checks)}\nchecked in {time.monotonic() - begin:.0f} s", flush=True)

    begin = time.monotonic()
    programs = {}
    if args.peers:
        shapes = list(dict.fromkeys(cell.shape for cell in cells))
        passes = list({PASSES[cell.pass_] for cell in cells})
        programs = bench.compile_all(shapes, args.peers, passes, 8)
        print(f"compiled peers in {time.monotonic() - begin:.0f} s", flush=True)

    rows: list[Row] = []
    watchdog = Watchdog(HANGS_AFTER)
    memory = Memory(next(iter(built.values())))
    memory.reserve({"scratch": 8} | {name: x.nbytes for name, x in arrays.items()})
    normal_q = arrays["q"].astype(np.float32)
    with bench.Sampler.running() as sampler:
        for data, cell in itertools.product(args.data, cells):
            if time.monotonic() > deadline:
                print(f"out of time: {cell} {data} and what follows are missing", flush=True)
                break
            watchdog.begin(f"the preparation of {cell}")
            libraries = {
                variant: library
                for variant, library in measured[cell.kernel].items()
                if checks[cell.kernel, variant, cell.pass_]["passed"]
            }
            forward = built.get((cell.kernel.replace("backward", "forward"), tune_build.SHIPPED))
            if not libraries or not forward:
                print(f"{cell} left out: no variant is right, or there is no forward kernel")
                continue
            arrays["q"] = (normal_q * bench.QUERY_FACTOR[data]).astype(ml_dtypes.bfloat16)
            for name, array in arrays.items():
                memory.upload(name, array)
            prepare(cell, libraries, forward, memory)
            found = differences(cell, libraries, memory, watchdog)
            measurements: dict[str, Measurement] = {}
            for variant, library in libraries.items():
                if found[variant] <= LARGEST_DIFFERENCE:
                    arguments = tune_device.bind(library, memory, cell.problem)
                    measurements[variant] = functools.partial(library.seconds, arguments)
                else:
                    print(f"{variant} is wrong in {cell}, {data} data: differs by {found[variant]}")
            if args.peers:
                measurements |= peer_measurements(cell, programs, arrays)
            begin = time.monotonic()
            timed = time_in_turns(measurements, args.rounds, args.batch, watchdog, str(cell))
            state = sampler.state(begin)
            rows += [
                {
                    "data": data, "pass": cell.pass_, "head_dim": cell.shape.head_dim,
                    "mask": cell.shape.mask, "seq": cell.shape.seq, "variant": variant,
                    "tflops": cell.flops / statistics.median(seconds) / 1e12,
                    "median_ms": 1e3 * statistics.median(seconds),
                    "fastest_ms": 1e3 * min(seconds), "slowest_ms": 1e3 * max(seconds),
                    "difference": found.get(variant), **state,
                }
                for variant, seconds in timed.items()
            ]  # fmt: skip
            write(args.out, about, checks, rows)  # what is measured is never lost
    if not rows:
        sys.exit("nothing was measured")
    print(table(rows))


def load(
    manifest: dict[str, Any], args: argparse.Namespace
) -> tuple[dict[tuple[str, str], Library], dict[str, Libraries]]:
    """All libraries by kernel and variant, and by kernel those that were asked for."""
    built = {
        (entry["kernel"], entry["variant"]): Library(args.folder / entry["library"])
        for entry in manifest["entries"]
        if entry["library"]
    }
    measured: dict[str, Libraries] = {}
    for entry in manifest["entries"]:
        kernel, variant = where = entry["kernel"], entry["variant"]
        asked_for = not args.variants or variant in (tune_build.SHIPPED, *args.variants)
        if entry["measured"] and asked_for and where in built:
            measured.setdefault(kernel, {})[variant] = built[where]
    return built, measured


def check_all(
    args: argparse.Namespace, cells: list[Cell], measured: dict[str, Libraries],
    data: np.ndarray, deadline: float,
) -> Checks:  # fmt: skip
    checks: Checks = {}
    if args.unchecked:
        for cell in cells:
            for variant in measured[cell.kernel]:
                where = cell.kernel, variant, cell.pass_
                checks[where] = {"passed": True, "error": None, "problem": "unchecked"}
        return checks
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.check_jobs) as pool:
        folder = pathlib.Path(name)
        np.save(folder / "data.npy", plain(data))
        checkers, jobs = {}, {}
        for cell in cells:
            key = cell.shape.head_dim, cell.shape.mask
            if key not in checkers:
                checkers[key] = Checker(*key, folder, CASES)
            for variant, library in measured[cell.kernel].items():
                where = cell.kernel, variant, cell.pass_
                if where in jobs:
                    continue
                stem = f"{folder}/{variant}-{cell.pass_}-d{key[0]}-{key[1]}"
                problems = [c.problem for c in cells if (c.kernel, c.pass_) == where[::2]]
                job = {
                    "library": str(library.path), "cases": checkers[key].job_cases(cell.pass_),
                    "cells": [dataclasses.asdict(problem) for problem in problems],
                    "data": str(folder / "data.npy"), "results": f"{stem}.npz",
                }  # fmt: skip
                limit = max(1.0, min(args.check_timeout, deadline - time.monotonic()))
                jobs[where] = key, stem, pool.submit(check, job, f"{stem}.json", limit)
        for where, (key, stem, job) in jobs.items():
            problem, error = job.result(), None
            if not problem:
                with np.load(f"{stem}.npz") as found:
                    error = checkers[key].worst_error(where[2], dict(found))
                problem = "" if error <= 1 else "wrong"
            checks[where] = {"passed": not problem, "error": error, "problem": problem}
    return checks


def write(folder: pathlib.Path, about: dict[str, Any], checks: Checks, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed = [
        {"kernel": kernel, "variant": variant, "pass": pass_, **found}
        for (kernel, variant, pass_), found in checks.items()
    ]
    content = {"environment": about, "checks": listed, "rows": rows}
    (folder / "tune.json").write_text(json.dumps(content, indent=1) + "\n")
    with open(folder / "tune.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    tables = tune_build.table(about["manifest"]["entries"]), check_table(checks), table(rows)
    (folder / "tune.txt").write_text("\n\n".join(tables) + "\n")


def table(rows: list[Row]) -> str:
    """TFLOP/s and the ratio to shipped by sequence length, for each kernel and kind of data."""
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        title = f"{row['pass']}-d{row['head_dim']}-{row['mask']}, {row['data']} data"
        groups.setdefault(title, {}).setdefault(row["variant"], {})[row["seq"]] = row["tflops"]
    lines = []
    for title, variants in groups.items():
        seqs = sorted({seq for speeds in variants.values() for seq in speeds})
        shipped = variants.get(tune_build.SHIPPED, {})
        lines.append(f"{title:42s}" + "".join(f"{seq:>8d}{'':>7s}" for seq in seqs) + "    mean")
        for variant, speeds in variants.items():
            ratios = {
                seq: speeds[seq] / shipped[seq] for seq in seqs if seq in speeds and seq in shipped
            }
            line = f"  {variant:40s}"
            for seq in seqs:
                line += f"{speeds[seq]:8.1f}" if seq in speeds else f"{'-':>8s}"
                line += f"{ratios[seq]:7.3f}" if seq in ratios else f"{'':>7s}"
            lines.append(line + f"{report.geometric_mean(ratios.values()):8.3f}")
    return "\n".join(lines)
