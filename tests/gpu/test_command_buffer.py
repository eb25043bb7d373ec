# SPDX-License-Identifier: Apache-2.0
"""XLA captures the calls into a CUDA graph, without being asked to, and replays it right."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

TARGET = pathlib.Path(__file__).with_name("command_buffer_target.py")


@pytest.mark.gpu
@pytest.mark.parametrize("function, calls", [("three_layers", 3), ("gradient", 6)])
def test_capture_and_replay(tmp_path, function, calls):
    dump = tmp_path / "dump"
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_dump_to={dump}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process may hold most of the memory
    }
    run = subprocess.run(
        [sys.executable, TARGET, function, tmp_path],
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
    )
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert reports, run.stderr[-4000:]
    report = reports[-1]  # without profile, where a machine forbids that: the dump is enough
    plans = sorted(dump.glob(f"*jit_{function}*thunk_sequence*.txt"))
    text = plans[-1].read_text() if plans else ""
    captured, outside = count_custom_calls(text)
    evidence = json.dumps({**report, "captured": captured, "outside": outside})
    if folder := os.environ.get("EQX_FLASH_RECORD"):
        pathlib.Path(folder, f"command_buffer_{function}.txt").write_text(f"{evidence}\n\n{text}")
    assert report["wrong"] == 0, evidence
    launched = report.get("events", {}).get("GraphLaunch", 0)
    was_replayed = "events" in report and launched >= report["profiled_replays"]
    assert (captured, outside) == (calls, 0) or was_replayed, f"{evidence}\n{text[:4000]}"


def count_custom_calls(plan: str) -> tuple[int, int]:
    """Custom calls (inside, outside) of command buffers in XLA's dump of what it executes.

    One line for each step, `003: kCustomCall ...`, those of a command buffer indented below it.
    """
    inside = outside = 0
    in_command_buffer = False
    for line in plan.splitlines():
        step = re.match(r"(\s*)\d+: (k\w+)", line)
        if step is None:
            continue
        if not step[1]:
            in_command_buffer = step[2] == "kCommandBuffer"
        if step[2] == "kCustomCall":
            inside += in_command_buffer
            outside += not in_command_buffer
    return inside, outside


def test_count_custom_calls():
    plan = """000: kCommandBuffer
    001: kCustomCall eqx_flash_forward
    002: kKernel tanh
    003: kCustomCall eqx_flash_forward
004: kCustomCall eqx_flash_forward
"""
    assert count_custom_calls(plan) == (2, 1)
    assert count_custom_calls("") == (0, 0)
