# SPDX-License-Identifier: Apache-2.0
"""What this process can run: its CUDA devices, and the kernels that were built."""

from __future__ import annotations

import dataclasses
import functools

import jax

from . import _ffi

HOPPER = "9.0"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices of this process and the compiled kernels."""

    devices: tuple[tuple[str, str], ...]
    """(name, compute capability) of each CUDA device."""
    built: bool
    """Whether the compiled module is there at all."""
    head_dims: tuple[int, ...]
    """Head dims with a kernel; empty in a build without CUDA."""

    def obstacle(self, head_dim) -> str | None:
        """Why no kernel for `head_dim` can run here; None if one can."""
        if not self.devices:
            return f"this process has no CUDA device (JAX runs on {jax.default_backend()})"
        for name, capability in self.devices:
            if capability != HOPPER:
                return (
                    f"the device {name} has compute capability {capability}, "
                    f"and the kernel needs {HOPPER} (Hopper)"
                )
        if not self.built:
            return "the extension module was not built (install eqx_flash with pip)"
        if not self.head_dims:
            return "eqx_flash was built without CUDA (reinstall it with EQX_FLASH_CUDA=pypi)"
        if head_dim > max(self.head_dims):
            return (
                f"head_dim is {head_dim}, and this build has kernels up to {max(self.head_dims)} "
                f"only (EQX_FLASH_HEAD_DIMS)"
            )
        return None


@functools.cache
def machine() -> Machine:
    """Looks once: JAX's devices do not change within a process."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        devices = []
    return Machine(
        devices=tuple((d.device_kind, str(d.compute_capability)) for d in devices),
        built=bool(_ffi.build_info()),
        head_dims=_ffi.built_head_dims(),
    )
