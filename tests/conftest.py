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


def _has_hopper() -> bool:
    return any(getattr(d, "compute_capability", None) == HOPPER for d in jax.local_devices())


@pytest.fixture
def getkey():
    """Call it for a new PRNG key, the same sequence of keys in every test."""
    counter = itertools.count()
    return lambda: jax.random.key(next(counter))
