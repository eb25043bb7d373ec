# SPDX-License-Identifier: Apache-2.0
"""The examples run as a user would run them."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from lowered import BACKWARD, cuda_text, kernel_calls

ROOT = Path(__file__).parents[1]
TRAIN = "train_char_lm.py"
SMALL = "--steps 60 --report-every 20 --batch 4 --context 32 --width 64 --depth 1".split()


def run(example, *args, cwd):
    """Runs an example in a fresh process, from a folder that holds nothing of this project."""
    return subprocess.run(
        [sys.executable, ROOT / "examples" / example, *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # works on a tree that is not installed, too
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_quickstart(tmp_path):
    result = run("quickstart.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    explanation, comparison = result.stdout.splitlines()
    assert re.match("(flash|xla)", explanation)
    assert "(2, 1024, 8, 64) bfloat16" in comparison
    assert float(comparison.split()[-1]) < 0.05


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    pytest.importorskip("optax")
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    folder = tmp_path_factory.mktemp("training")
    return run(TRAIN, *SMALL, "--out", "curves/run", cwd=folder), folder


def test_training_lowers_both_losses(training):
    result, _ = training
    assert result.returncode == 0, result.stderr
    reports = re.findall(r"step +(\d+) +train ([\d.]+) +held-out ([\d.]+)", result.stdout)
    steps, train, held_out = (list(map(float, column)) for column in zip(*reports, strict=True))
    assert steps == [20, 40, 60]
    assert sorted(train, reverse=True) == train and sorted(held_out, reverse=True) == held_out
    assert held_out[-1] < 4.5  # bits per character; guessing by letter frequency has 4.9


def test_training_says_what_computes_attention(training):
    result, _ = training
    attention = re.search(r"^attention +(flash|xla)\b", result.stdout, re.MULTILINE)
    kernels = re.search(r"^kernels +(.+) in the compiled step$", result.stdout, re.MULTILINE)
    assert attention and kernels
    both = "eqx_flash_backward x 1, eqx_flash_forward x 1"  # of the one block
    assert kernels[1] == {"flash": both, "xla": "none"}[attention[1]]


def test_training_writes_the_loss_curve_and_a_sample(training):
    result, folder = training
    path = folder / result.stdout.split()[-1]
    assert path == folder / "curves" / "run" / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    _, sample = result.stdout.split("the model's own:")
    assert len(sample.split("|", 1)[1]) > 400


def test_training_shows_progress(training):
    result, _ = training
    assert "60/60" in result.stderr


@pytest.fixture
def train_char_lm(monkeypatch):
    for package in ("optax", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("train_char_lm")


def test_count_of_the_kernels_in_a_compiled_program(train_char_lm):
    class Program:
        def as_text(self):
            targets = ["eqx_flash_forward", "__cublas$gemm", "eqx_flash_forward"]
            return "".join(f'  %x = custom-call(), custom_call_target="{x}"\n' for x in targets)

    assert train_char_lm.flash_kernels(Program()) == "eqx_flash_forward x 2"


@pytest.mark.parametrize(
    "args, message",
    [
        (["--steps", "0"], "argument --steps: expected a whole number of at least 1, got '0'"),
        (["--batch", "-3"], "argument --batch: expected a whole number of at least 1, got '-3'"),
        (["--depth", "two"], "argument --depth: expected a whole number of at least 1, got 'two'"),
        (["--width", "100"], "argument --width: expected a multiple of 64, got 100"),
        (["--context", "1000000"], "argument --context: expected at most "),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_command_line_errors(train_char_lm, monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", [TRAIN, *args])
    with pytest.raises(SystemExit):
        train_char_lm.main()
    assert message in capsys.readouterr().err


def test_held_out_text_is_not_in_the_training_text(train_char_lm):
    train, held_out = map(train_char_lm.decode, train_char_lm.load_text())
    assert len(train) > 200_000 and len(held_out) > len(train) // 10
    assert not set(train.split("\n\n")) & set(held_out.split("\n\n"))


def test_training_in_bfloat16_calls_each_kernel_once_per_block(train_char_lm):
    model = train_char_lm.GPT(context=16, width=64, depth=2, key=jax.random.key(0))

    def loss(model, windows):
        return train_char_lm.loss_fn(model, windows, jnp.bfloat16)

    windows = jnp.zeros((5, 17), jnp.int32)
    arrays, static = eqx.partition(model, eqx.is_array)
    program = cuda_text(lambda x: eqx.filter_grad(loss)(eqx.combine(x, static), windows), arrays)
    assert kernel_calls(program) == kernel_calls(program, BACKWARD) == 2
