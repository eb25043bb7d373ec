# SPDX-License-Identifier: Apache-2.0
"""The tests of the device primitives compile. (tests/gpu/test_primitives.py runs them.)"""

import check_ptxas
import numpy as np
import pytest
from primitives_library import Library, compile_library


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_library(tmp_path_factory.getbasetemp() / "primitives")


def test_ptxas_finds_no_problem(compiled):
    _, report = compiled
    assert check_ptxas.find_problems(report) == []


def test_every_primitive_has_a_kernel(compiled):
    _, report = compiled
    names = " ".join(function.name for function in check_ptxas.read_report(report))
    for kernel in ("scores", "output", "epilogue", "load", "ring", "cursor", "turns", "pack"):
        assert f"{kernel}_kernel" in names


def test_errors_are_reported(compiled):
    """Also without a device: no kernel has this width."""
    path, _ = compiled
    empty = np.empty(0)
    with Library(path) as library:
        for _ in range(2):  # the second call in a new process
            with pytest.raises(RuntimeError, match=r"scores returned CUDA error 1$"):
                library.call("scores", False, 63, 64, False, empty, empty, empty)
