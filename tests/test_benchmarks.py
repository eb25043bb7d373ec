# SPDX-License-Identifier: Apache-2.0
"""The benchmark's bookkeeping, on a CPU: its tables on invented numbers, its loop on a toy."""

import argparse
import csv
import functools
import importlib
import itertools
import json
import math
import pathlib
import random
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from common import quick_compilation

import eqx_flash

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("report")


@pytest.fixture
def bench(report):
    return importlib.import_module("bench")


@pytest.fixture
def tune_build(report):
    return importlib.import_module("tune_build")


@pytest.fixture
def tune_run(report):
    return importlib.import_module("tune_run")


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


@pytest.fixture
def toy_bench(bench, monkeypatch, tmp_path):
    """With plain attention as each implementation, one that is absent, and tiny shapes.

    Calls are made, but take as long as they have operands: a busy machine's clock is of no use.
    """

    def plain(causal):
        return functools.partial(
            eqx_flash.dot_product_attention, is_causal=causal, implementation="xla"
        )

    def absent(causal):
        raise ModuleNotFoundError("No module named 'absent'")

    def seconds(program, operands, calls):
        jax.block_until_ready(program(*operands))
        return calls * len(operands) * 1e-4

    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(bench, "WIDTH", 128)
    monkeypatch.setattr(bench, "SHAPES", [bench.Shape(64, "causal", 32)])
    monkeypatch.setattr(
        bench, "IMPLEMENTATIONS", {"eqx_flash": plain, "cudnn": plain, "mosaic": absent}
    )
    matrices = (jnp.ones((8, 8)),) * 2
    monkeypatch.setattr(bench, "thermometer", lambda: (jax.jit(jnp.matmul), matrices, 1024))
    monkeypatch.setattr(bench, "batch_seconds", seconds)
    monkeypatch.setattr(
        sys, "argv", ["bench.py", f"--out={tmp_path}", "--rounds=2", "--batch=0.001"]
    )
    return bench


def test_whole_run(toy_bench, tmp_path, capsys):
    toy_bench.main()
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
    milliseconds = {r["pass"]: r["median_ms"] for r in rows if r["implementation"] == "cudnn"}
    assert milliseconds == pytest.approx({"fwd": 0.3, "bwd": 0.2})
    assert all((len(r["sweep_medians_ms"].split()), r["rounds"]) == (2, 4) for r in rows)


def test_a_nan_of_any_sweep_is_in_the_record(bench):
    state = dict.fromkeys(bench.SAMPLED.values())
    sweeps = [bench.Measurement(1.0, [1.0, 2.0], 1, x, state) for x in (0.5, math.nan, 0.25)]
    assert math.isnan(bench.summary(sweeps)["max_difference_to_ours"])


def test_everyone_runs_once_a_round_and_after_others(bench):
    rounds = list(bench.turns("abcde", 9))
    assert all(sorted(names) == list("abcde") for names in rounds)
    followers = {
        x: {names[i + 1] for names in rounds for i in range(4) if names[i] == x} for x in "abcde"
    }
    assert all(len(found) > 1 for found in followers.values())
    assert rounds == list(bench.turns("abcde", 9))
    assert rounds != list(bench.turns("abcde", 9, seed=1))


# ---- Training steps ------------------------------------------------------------------------------


@pytest.fixture
def train_step(report):
    for package in ("optax", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    if jax.default_backend() != "cpu":
        pytest.skip("needs two devices, and counts what XLA makes of the steps for CPUs")
    return importlib.import_module("train_step")


TOY = "--seq=32 --width=32 --heads=2 --depth=1 --steps=4 --rounds=2 --seconds=0.001".split()


def run_train_step(train_step, monkeypatch, folder, *args):
    monkeypatch.setattr(sys, "argv", ["train_step.py", *TOY, f"--out={folder}", *args])
    with quick_compilation(), jax.numpy_dtype_promotion("standard"):  # optax needs the latter
        train_step.main()
    return json.loads((folder / "train_step.json").read_text())


def test_training_steps_on_two_devices(train_step, monkeypatch, tmp_path, capsys):
    """The losses agree, and only what must be sent is sent."""
    content = run_train_step(
        train_step, monkeypatch, tmp_path, "--attention=eqx_flash", "--mesh=single,data,heads"
    )
    assert not content["failures"]
    single, data, heads = content["rows"]
    assert [row["devices"] for row in (single, data, heads)] == [1, 2, 2]
    assert single["losses"][-1] < single["losses"][0]
    assert single["collectives"] == {}
    assert set(data["collectives"]) == {"all-reduce"}
    # One each for the output projection and the MLP, in each pass.
    assert heads["collectives"] == {"all-reduce": 2 * 2}
    nothing = {"kernel_calls": {}, "collectives": {}}
    assert content["attention_alone"] == dict.fromkeys(("single", "data", "heads"), nothing)
    assert "attention alone on heads: collectives: none" in capsys.readouterr().out


def test_training_steps_with_another_attention(train_step, monkeypatch, tmp_path):
    content = run_train_step(train_step, monkeypatch, tmp_path)
    assert not content["failures"]
    ours, plain = content["rows"]
    assert (ours["attention"], plain["attention"]) == ("eqx_flash", "xla")
    assert plain["loss_difference_to_first"] > 0  # it is another computation


def test_what_a_training_step_must_not_do(train_step, monkeypatch):
    args = argparse.Namespace(depth=12)
    monkeypatch.setattr(train_step, "expected_calls", lambda args, mesh, count: {"kernel": count})
    right = {
        "attention": "eqx_flash", "mesh": "data", "kernel_calls": {"kernel": 12},
        "loss_difference_to_first": 1e-3,
    }  # fmt: skip
    alone = {"kernel_calls": {"kernel": 1}, "collectives": {}}
    assert train_step.failures(args, [right], {"data": alone}) == []
    for wrong, message in (
        ({"loss_difference_to_first": 1e-2}, "the losses differ from the first variant's"),
        ({"loss_difference_to_first": math.nan}, "the losses differ from the first variant's"),
        ({"kernel_calls": {}}, "expected the kernel calls {'kernel': 12}, got {}"),
    ):
        (found,) = train_step.failures(args, [right | wrong], {})
        assert found == f"eqx_flash on data: {message}"
    for wrong in ({"kernel_calls": {"kernel": 2}}, {"collectives": {"all-gather": 1}}):
        (found,) = train_step.failures(args, [], {"data": alone | wrong})
        assert found.startswith("attention alone on data: expected {'kernel': 1}, no collectives;")


def test_kernel_calls_and_collectives_of_a_compiled_program(train_step):
    class Compiled:
        def as_text(self):
            return """
  %all-reduce.1 = bf16[8]{0} all-reduce(%p), metadata={op_name="all-gather(x)"}
  %start = (f32[4]{0}, f32[8]{0}) all-gather-start(%all-reduce.1)
  %done = f32[8]{0} all-gather-done(%start)
  %f.1 = (bf16[1,8,2,64]{3,2,1,0}, f32[1,2,8]{2,1,0}) custom-call(%q), custom_call_target="eqx_flash_forward"
  %f.2 = (bf16[1,8,2,64]{3,2,1,0}, f32[1,2,8]{2,1,0}) custom-call(%q), custom_call_target="eqx_flash_forward"
  %g = bf16[8,8]{1,0} custom-call(%q), custom_call_target="__cublas$gemm"
"""  # noqa: E501

    assert train_step.kernel_calls(Compiled()) == {"eqx_flash_forward bf16[1,8,2,64]": 2}
    assert train_step.collectives(Compiled()) == {"all-reduce": 1, "all-gather": 1}


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--attention=fa3", "argument --attention: expected some of eqx_flash,cudnn,xla"),
        ("--mesh=single,both", "argument --mesh: expected some of single,data,heads"),
        ("--heads=5", "argument --heads: expected a divisor of the width, 32"),
    ],
)
def test_command_line_errors(train_step, monkeypatch, tmp_path, capsys, arg, message):
    with pytest.raises(SystemExit):
        run_train_step(train_step, monkeypatch, tmp_path, arg)
    assert message in capsys.readouterr().err


# ---- Tuning --------------------------------------------------------------------------------------


TILES = """
constexpr Tile tile(int head_dim, Mask) {
  switch (head_dim) {
    case 64:  // not 128
    case 96:
      return {.rows = 64, .stages = 2};
    default:
      return {.rows = 32,  // as in case 64
              .flag = false};
  }
}

constexpr Tile other_tile(int head_dim) {
  Tile tile = tile(head_dim);
  tile.rows = 16;
  return tile;
}
"""


@pytest.mark.parametrize(
    "function, field, head_dim, before, after",
    [
        ("tile", "rows", 64, ".rows = 64,", ".rows = 7,"),
        ("tile", "stages", 96, ".stages = 2}", ".stages = 7}"),
        ("tile", "rows", 256, ".rows = 32,", ".rows = 7,"),
        ("tile", "flag", 128, ".flag = false}", ".flag = 7}"),
        ("other_tile", "rows", 64, "tile.rows = 16;", "tile.rows = 7;"),
    ],
)
def test_override_of_a_tile(tune_build, function, field, head_dim, before, after):
    changed = tune_build.override_tile(TILES, function, field, "7", head_dim)
    assert changed == TILES.replace(before, after) != TILES


def test_override_finds_exactly_one_place(tune_build, tmp_path):
    (tmp_path / "tile_config.h").write_text(TILES)
    (tmp_path / "a.cuh").write_text("static constexpr bool kFast = a && b;\nint x = kFast;\n")
    (tmp_path / "b.cuh").write_text("constexpr int kTwice = 1;\nconstexpr int kTwiceMore = 1;\n")
    (tmp_path / "c.cuh").write_text("constexpr int kTwice = 2;\n")
    tune_build.override(tmp_path, "kFast=false", 64)
    tune_build.override(tmp_path, "c.cuh:kTwice=3", 64)
    assert (tmp_path / "a.cuh").read_text().startswith("static constexpr bool kFast = false;\n")
    assert (tmp_path / "c.cuh").read_text() == "constexpr int kTwice = 3;\n"
    for change, message in {
        "tile.flag=1": "sets flag in 0 places for head dim 64, not in one; it sets rows, stages",
        "no_tile.rows=1": "no function no_tile",
        "kTwice=1": r"kTwice is defined in 2 places \(b.cuh, c.cuh\)",
        "kSlow=1": "kSlow is defined in 0 places",
        "tile.rows": "not TARGET=VALUE",
    }.items():
        with pytest.raises(ValueError, match=message):
            tune_build.override(tmp_path, change, 64)


def test_overrides_fit_the_tile_table(tune_build, tmp_path):
    table = (tune_build.ROOT / "csrc" / "tile_config.h").read_text()
    for head_dim in (64, 128, 256):
        for function in ("forward_tile", "backward_dq_tile", "backward_dkdv_tile"):
            changed = tune_build.override_tile(table, function, "block_n", "8", head_dim)
            assert changed != table


def test_variants_compile(tune_build, tmp_path):
    """One is as shipped, one is refused by ptxas and built nevertheless, one does not exist."""
    shipped, slow, wrong = (
        tune_build.Variant(name, tune_build.ROOT / "csrc", changes=changes)
        for name, changes in {
            "shipped": [],
            "slow": ["forward_tile.consumer_warpgroups=2", "forward_tile.consumer_registers=128"],
            "wrong": ["forward_tile.rows=1"],
        }.items()
    )
    kernels = [tune_build.Kernel("forward", 64, "full")]
    try:
        entries = tune_build.build([shipped, slow, wrong], kernels, tmp_path, 2)
    except SystemExit:
        pytest.skip("no nvcc: neither a CUDA toolkit nor NVIDIA's wheels are installed")
    assert [entry["variant"] for entry in entries] == ["shipped", "slow"]
    assert all((tmp_path / entry["library"]).exists() for entry in entries)
    first, second = entries
    assert not first["problems"] and second["problems"]
    loops = first["functions"][0]["loops"]
    assert len(loops) == 2  # with and without the search for the maximum
    for loop in loops:
        assert loop["mma"] == sum(int(n) for n in re.findall(r"(\d+)mma", loop["order"]))
    assert len(tune_build.table(entries).splitlines()) >= 3


def test_unchecked_variants_are_timed(tune_run, bench):
    """Nothing is run for it: the library is not there."""
    cell = tune_run.Cell("forward", bench.Shape(64, "full", 512))
    args = argparse.Namespace(unchecked=True)
    found = tune_run.check_all(args, [cell], {cell.kernel: {"slow": None}}, None, 0.0)
    assert found == {
        ("forward-d64-full", "slow", "forward"): {
            "passed": True, "error": None, "problem": "unchecked",
        }
    }  # fmt: skip


def test_table_of_variants(tune_run):
    def row(variant, seq, tflops):
        cell = {"data": "peaky", "pass": "forward", "head_dim": 64, "mask": "full", "seq": seq}
        return {**cell, "variant": variant, "tflops": tflops}

    rows = [
        row("shipped", 512, 400.0), row("wide", 512, 500.0), row("shipped", 2048, 600.0),
        row("wide", 2048, 480.0), row("fa3", 2048, 660.0),
    ]  # fmt: skip
    assert [line.split() for line in tune_run.table(rows).splitlines()] == [
        ["forward-d64-full,", "peaky", "data", "512", "2048", "mean"],
        ["shipped", "400.0", "1.000", "600.0", "1.000", "1.000"],
        ["wide", "500.0", "1.250", "480.0", "0.800", "1.000"],
        ["fa3", "-", "660.0", "1.100", "1.100"],
    ]


LINE = "[gw2] [ 23%] FAILED tests/a.py::test_x[1] "
REPORT = "FAILED tests/a.py::test_x[1] - assert 0\n1 failed, 2 passed in 3 s\n"


@pytest.mark.parametrize(
    "output, expected",
    [
        ("tests/a.py::test_x[0] PASSED [ 50%]\n", []),
        ("tests/a.py::test_x[1] FAILED [ 50%]\n", ["tests/a.py::test_x[1] FAILED [ 50%]"]),
        (LINE + "\n", [LINE]),
        (LINE + "\n" + REPORT, [REPORT.splitlines()[0]]),
    ],
)
def test_failures_are_named_also_without_a_report(report, output, expected):
    assert importlib.import_module("run_on_gpu").failures(output) == expected


@pytest.mark.parametrize(
    "code, right, expected",
    [(0, (0,), "ok"), (5, (0,), "FAILED (exit code 5)"), (5, (0, 5), "ok")],
)
def test_an_exit_code_is_judged(report, tmp_path, code, right, expected):
    """pytest's 5, no tests, is right where a keyword may have selected none."""
    session = importlib.import_module("run_on_gpu").Session(tmp_path, 60)
    run = session.start(sys.executable, "-c", f"raise SystemExit({code})")
    verdict, _ = session.finish("title", run, 30, right)
    assert verdict.startswith(expected + " [")
    assert session.failed == (expected != "ok")
