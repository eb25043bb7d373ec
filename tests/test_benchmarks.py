# SPDX-License-Identifier: Apache-2.0
"""The benchmark's bookkeeping, on a CPU: its tables on invented numbers, its loop on a toy."""

import csv
import functools
import importlib
import itertools
import json
import math
import pathlib
import random
import sys

import jax
import jax.numpy as jnp
import pytest

import eqx_flash

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("report")


@pytest.fixture
def bench(report):
    return importlib.import_module("bench")


def row(implementation, tflops, data="normal", head_dim=64, mask="full", seq=512, pass_="fwd"):
    return {
        "data": data, "pass": pass_, "head_dim": head_dim, "mask": mask, "seq": seq,
        "implementation": implementation, "tflops": tflops,
    }  # fmt: skip


def test_summary(report):
    rows = [
        row("eqx_flash", 400.0), row("fa3", 500.0), row("cudnn", 200.0), row("matmul 8192", 900.0),
        row("eqx_flash", 600.0, seq=2048), row("fa3", 500.0, seq=2048),
        row("eqx_flash", 300.0, "peaky"), row("fa3", 300.0, "peaky"),
    ]  # fmt: skip
    lines = report.summary(rows).splitlines()
    assert lines == [
        "fwd on normal data, ours over the best peer: 1 of 2 cells won, "
        f"geometric mean {math.sqrt(0.8 * 1.2):.3f}, lowest 0.800",
        "fwd on normal data, ours over FA3: 1 of 2 cells won, geometric mean 0.980, lowest 0.800",
        "fwd on normal data, ours over cuDNN: 1 of 1 cells won, geometric mean 2.000, lowest 2.000",
        "fwd on peaky data, ours over the best peer: 1 of 1 cells won, "
        "geometric mean 1.000, lowest 1.000",
        "fwd on peaky data, ours over FA3: 1 of 1 cells won, geometric mean 1.000, lowest 1.000",
    ]


def test_table_and_figure(report, bench, tmp_path):
    rng = random.Random(0)
    rows = [
        row(name, rng.uniform(200, 700), data, shape.head_dim, shape.mask, shape.seq, pass_)
        for pass_ in report.PASSES
        for shape in bench.SHAPES
        for data in bench.QUERY_FACTOR
        for name in [*bench.IMPLEMENTATIONS, report.THERMOMETER]
        if (name, shape.head_dim) != ("mosaic", 256)  # a peer may not have every cell
    ]
    lines = report.table(rows).splitlines()
    assert sum(line.startswith("fwd d") for line in lines) == 48
    assert sum(line.startswith("bwd d") for line in lines) == 48
    assert lines[0].split() == [
        "normal", "data", "ours", "det.", "FA3", "cuDNN", "Mosaic",
        "/cuDNN", "/best", "matmul", "MHz", "W",
    ]  # fmt: skip
    report.write(tmp_path, {"gpu": "none"}, rows)
    report.plot(tmp_path / "bench.png", {"gpu": "none"}, rows)
    assert json.loads((tmp_path / "bench.json").read_text())["rows"] == rows
    with open(tmp_path / "bench.csv") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    for pass_ in report.PASSES:
        assert (tmp_path / f"bench_{pass_}.png").stat().st_size > 10_000


def test_flops(bench):
    shapes = {str(shape): shape for shape in bench.SHAPES}
    assert len(shapes) == 24
    full, causal = shapes["d128-full-2048"], shapes["d128-causal-2048"]
    assert full.array == (8, 2048, 16, 128)
    assert full.flops == 4 * 8 * 16 * 2048**2 * 128 == 2 * causal.flops


def test_whole_run(bench, monkeypatch, tmp_path, capsys):
    """With plain attention as each implementation, one that is absent, and tiny shapes."""

    def plain(causal):
        return functools.partial(
            eqx_flash.dot_product_attention, is_causal=causal, implementation="xla"
        )

    def absent(causal):
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(bench, "WIDTH", 128)
    monkeypatch.setattr(bench, "SHAPES", [bench.Shape(64, "causal", 32)])
    monkeypatch.setattr(
        bench, "IMPLEMENTATIONS", {"eqx_flash": plain, "cudnn": plain, "mosaic": absent}
    )
    matrices = (jnp.ones((8, 8)),) * 2
    monkeypatch.setattr(bench, "thermometer", lambda: (jax.jit(jnp.matmul), matrices, 1024))
    monkeypatch.setattr(
        sys, "argv", ["bench.py", f"--out={tmp_path}", "--rounds=2", "--batch=0.001"]
    )
    bench.main()
    printed = capsys.readouterr().out
    assert "mosaic d64-causal-32 left out: ModuleNotFoundError" in printed
    for pass_ in ("fwd", "bwd"):
        assert f"{pass_} on normal data, ours over cuDNN" in printed
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {r["implementation"] for r in rows} == {"eqx_flash", "cudnn", "matmul 8192"}
    assert {(r["data"], r["pass"]) for r in rows} == set(
        itertools.product(("normal", "peaky"), ("fwd", "bwd"))
    )
    assert all(r["max_difference_to_ours"] in (0, None) for r in rows)
