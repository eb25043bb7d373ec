# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import pytest

# Set before anything touches a device. A forgotten cast should fail here, not in a user's training.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Meshes need devices to spread over. This asks for CPU devices only; GPUs stay as they are.
jax.config.update("jax_num_cpu_devices", 8)

HOPPER = "9.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_hopper():
        reason = pytest.mark.skip(reason=f"needs a GPU of compute capability {HOPPER}")
        for item in gpu_items:
            item.add_marker(reason)


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter") -> None:
    """Prints the transformation matrix, or as much of it as ran."""
    from common import markdown_table  # not before pytest has set up the checks of types

    found = sorted(
        (*cell, report.passed)
        for category in ("passed", "failed")
        for report in terminalreporter.getreports(category)
        for name, cell in report.user_properties
        if name == "transformation_matrix"
    )
    if found:
        terminalreporter.section(f"transformation matrix, jax {jax.__version__}")
        cells = {(row, column): x if passed else "FAILED" for _, row, column, x, passed in found}
        terminalreporter.write(markdown_table("", cells))


def _has_hopper() -> bool:
    return any(getattr(d, "compute_capability", None) == HOPPER for d in jax.local_devices())


@pytest.fixture
def exact_float32_products():
    from common import quick_compilation  # as above

    with jax.default_matmul_precision("highest"), quick_compilation():
        yield


@pytest.fixture
def getkey():
    """Call it for a new PRNG key, the same sequence of keys in every test."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))
