# SPDX-License-Identifier: Apache-2.0
"""A CUDA toolkit made of PyPI wheels, for machines that have a GPU but no toolkit."""

import importlib.util
import sys
from pathlib import Path

# nvcc's own requirements are not pinned and lack cccl (cuda_bf16.h includes a header of it).
WHEELS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)


def find_wheels() -> Path:
    """The folder that the installed wheels share."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "cu13" / "bin" / "nvcc").exists():
            return Path(folder) / "cu13"
    sys.exit(f"EQX_FLASH_CUDA='pypi' without build isolation: first install {' '.join(WHEELS)}.")


def make_toolkit(root: Path, wheels: Path) -> str:
    """Lay the wheels out at `root` as nvcc expects a toolkit; returns the path of its nvcc.

    The wheels have lib/ where nvcc.profile names lib64/. nvcc finds ../lib64 from the folder it was
    started in with links resolved, so bin/ must be a real folder of links.
    """
    (root / "bin").mkdir(parents=True, exist_ok=True)
    links = {name: wheels / name for name in ("include", "lib", "nvvm")}
    links["lib64"] = wheels / "lib"
    links |= {f"bin/{tool.name}": tool for tool in (wheels / "bin").iterdir()}
    for name, target in links.items():
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)
    return str(root / "bin" / "nvcc")
