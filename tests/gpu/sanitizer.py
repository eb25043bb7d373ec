# SPDX-License-Identifier: Apache-2.0
"""Runs sanitizer_target.py under the tools of compute-sanitizer, all at once, and reads them."""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

TARGET = pathlib.Path(__file__).with_name("sanitizer_target.py")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
KERNEL = "eqx_flash"  # the namespace of all our kernels


@dataclasses.dataclass(frozen=True)
class Report:
    tool: str
    seconds: float
    ran: bool
    """Whether all cases came to their end, with right results."""
    errors: int | None
    """Of the tool's summary; None if there is none."""
    text: str

    @property
    def clean(self) -> bool:
        return self.ran and self.errors == 0

    def line(self) -> str:
        verdict = "clean" if self.clean else "FAILED"
        cases = re.search(r"\d+ cases, \d+ wrong", self.text)
        return (
            f"{self.tool}: {verdict}, {self.errors} errors, "
            f"{cases[0] if cases else 'did not finish'}, {self.seconds:.0f} s"
        )


def executable() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )


@functools.cache
def kernel_filter(sanitizer: str) -> tuple[str, ...]:
    """Restricts the instrumentation to our kernels, in the option's spelling of this version."""
    usage = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-regex", "--kernel-name", "--filter"):
        if option in usage:
            return option, f"kns={KERNEL}"
    return ()


def command(sanitizer: str, tool: str) -> list[str]:
    options = ["--tool", tool, *kernel_filter(sanitizer), "--print-limit", "100"]
    if tool == "memcheck":
        # JAX probes for optional features: failing API calls are its way of asking.
        options += ["--report-api-errors", "no", "--leak-check", "no"]
    if tool == "initcheck":
        # It does not see TMA's stores, and would take every result for unwritten when it is copied
        # to the host. test_edge_values.py checks that all elements are written.
        options += ["--check-api-memory-access", "no"]
    quick = ["--quick"] if tool in ("racecheck", "initcheck") else []
    return [sanitizer, *options, sys.executable, str(TARGET), *quick]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        # Every array its own allocation: beyond its end lies nobody's memory, not a neighbour's.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Launches, not graphs, so that each kernel is seen by its name.
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
    }


def run_all(timeout: float, tools: tuple[str, ...] = TOOLS) -> dict[str, Report]:
    """One report for each tool. What has not ended after `timeout` seconds counts as failed."""
    sanitizer = executable()
    if sanitizer is None:
        raise FileNotFoundError("compute-sanitizer is not installed")
    start = time.monotonic()
    runs = {
        tool: subprocess.Popen(
            command(sanitizer, tool),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in tools
    }
    reports = {}
    for tool, run in runs.items():
        try:
            text, _ = run.communicate(timeout=max(1, timeout - (time.monotonic() - start)))
        except subprocess.TimeoutExpired:
            run.kill()
            text, _ = run.communicate()
        reports[tool] = read(tool, text, time.monotonic() - start)
    return reports


def read(tool: str, text: str, seconds: float) -> Report:
    ran = re.search(r"\d+ cases, 0 wrong", text) is not None
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if tool == "racecheck":
        summary = re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return Report(tool, seconds, ran, int(summary[1]) if summary else None, text)
