# SPDX-License-Identifier: Apache-2.0
"""What the environment asks of a build, and where its nvcc comes from.

backend.py imports this to add requirements. CMake runs it: `build_settings.py BUILD_FOLDER` prints
the settings as CMake code.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pypi_nvcc

CUDA_CHOICES = ("auto", "off", "system", "pypi")
HEAD_DIMS = (64, 128, 256)

# An FFI handler runs in the jaxlib its headers came from and in every newer one, never in an older
# one: there it stops all of JAX from starting. So this is the oldest jaxlib we support.
FFI_HEADERS = "jaxlib==0.10.2"

# The first CUDA with cudaGetDriverEntryPointByVersion.
OLDEST_NVCC = (12, 5)

DEFAULT_TOOLKIT = "/usr/local/cuda"

# Exists where an NVIDIA driver is loaded.
DRIVER = Path("/proc/driver/nvidia/version")


def build_requirements(environ: Mapping[str, str] = os.environ) -> list[str]:
    """What a build with kernels requires; nothing for one without."""
    head_dims(environ)  # complain about a bad value before anything is downloaded
    choice = cuda_choice(environ)
    if choice == "off":
        return []
    return [FFI_HEADERS, *(pypi_nvcc.WHEELS if choice == "pypi" else ())]


def head_dims(environ: Mapping[str, str] = os.environ) -> list[int]:
    """The head dims to build kernels for, from EQX_FLASH_HEAD_DIMS; all of them by default."""
    text = environ.get("EQX_FLASH_HEAD_DIMS", "")
    names = [name for name in re.split(r"[;,\s]+", text) if name] or [str(d) for d in HEAD_DIMS]
    unknown = [name for name in names if name not in map(str, HEAD_DIMS)]
    if unknown:
        sys.exit(
            f"EQX_FLASH_HEAD_DIMS={text!r}: no kernel has head dim {', '.join(unknown)}; "
            f"choose among {', '.join(map(str, HEAD_DIMS))}."
        )
    return sorted({int(name) for name in names})


def cuda_choice(environ: Mapping[str, str] = os.environ) -> str:
    """Where nvcc comes from: "system", "pypi" or "off" (no kernels), from EQX_FLASH_CUDA."""
    choice = environ.get("EQX_FLASH_CUDA", "") or "auto"
    if choice not in CUDA_CHOICES:
        sys.exit(f"EQX_FLASH_CUDA={choice!r}: choose one of {', '.join(CUDA_CHOICES)}.")
    if choice == "auto":
        if system_nvcc(environ):
            return "system"
        # Without a GPU nobody wants to download a compiler for kernels that cannot run.
        return "pypi" if DRIVER.exists() else "off"
    if choice == "system" and not system_nvcc(environ):
        oldest = ".".join(map(str, OLDEST_NVCC))
        sys.exit(
            f"EQX_FLASH_CUDA='system', but no nvcc of CUDA {oldest} or newer is in CUDACXX, on "
            f"PATH, in CUDA_HOME or in {DEFAULT_TOOLKIT}; choose one of auto, off, pypi."
        )
    return choice


def system_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """The first nvcc found that is new enough."""
    roots = (environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), DEFAULT_TOOLKIT)
    candidates = (
        environ.get("CUDACXX"),
        shutil.which("nvcc", path=environ.get("PATH")),
        *(os.path.join(root, "bin", "nvcc") for root in roots if root),
    )
    for nvcc in candidates:
        if nvcc and shutil.which(nvcc) and nvcc_version(nvcc) >= OLDEST_NVCC:
            return nvcc
    return None


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def ffi_include_folder() -> str:
    """The FFI headers of the jaxlib at hand, without importing it."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        sys.exit(
            f"The kernels need XLA's FFI headers: install {FFI_HEADERS} to build without isolation."
        )
    found = f"jaxlib=={importlib.metadata.version('jaxlib')}"
    if found != FFI_HEADERS:
        print(
            f"Built with the FFI headers of {found}: will not run with an older jaxlib.",
            file=sys.stderr,
        )
    return os.path.join(spec.submodule_search_locations[0], "include")


def main() -> None:
    (build_folder,) = sys.argv[1:]
    settings = {"EQX_FLASH_CUDA": cuda_choice(), "EQX_FLASH_HEAD_DIMS": ""}
    if settings["EQX_FLASH_CUDA"] != "off":
        settings["EQX_FLASH_HEAD_DIMS"] = ";".join(map(str, head_dims()))
        settings["EQX_FLASH_FFI_INCLUDE"] = ffi_include_folder()
        settings["EQX_FLASH_NVCC"] = (
            system_nvcc() or ""
            if settings["EQX_FLASH_CUDA"] == "system"
            else pypi_nvcc.make_toolkit(Path(build_folder) / "toolkit", pypi_nvcc.find_wheels())
        )
    for name, value in settings.items():
        print(f'set({name} "{value}")')


if __name__ == "__main__":
    main()
