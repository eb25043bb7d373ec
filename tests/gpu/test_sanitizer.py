# SPDX-License-Identifier: Apache-2.0
"""The kernels under compute-sanitizer: memory, races, barriers, uninitialised reads."""

import os
import pathlib

import pytest
import sanitizer


@pytest.fixture(scope="module")
def reports():
    if sanitizer.executable() is None:
        pytest.skip("compute-sanitizer is not installed")
    found = sanitizer.run_all(timeout=240)
    if folder := os.environ.get("EQX_FLASH_RECORD"):
        lines = [report.line() for report in found.values()]
        texts = [f"==== {r.tool}\n{r.text[-20_000:]}" for r in found.values() if not r.clean]
        pathlib.Path(folder, "sanitizer.txt").write_text("\n".join([*lines, "", *texts]))
    return found


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
def test_clean(reports, tool):
    report = reports[tool]
    assert report.clean, f"{report.line()}\n{report.text[-6000:]}"


@pytest.mark.parametrize(
    "tool, text, clean",
    [
        ("memcheck", "48 cases, 0 wrong\n========= ERROR SUMMARY: 0 errors", True),
        ("memcheck", "48 cases, 1 wrong\n========= ERROR SUMMARY: 0 errors", False),
        ("memcheck", "48 cases, 0 wrong\n========= ERROR SUMMARY: 1 error", False),
        ("memcheck", "========= ERROR SUMMARY: 0 errors", False),
        (
            "racecheck",
            "8 cases, 0 wrong\n"
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            True,
        ),
        (
            "racecheck",
            "8 cases, 0 wrong\n"
            "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            False,
        ),
    ],
)
def test_reading(tool, text, clean):
    assert sanitizer.read(tool, text, 1.0).clean == clean
