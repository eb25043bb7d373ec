# SPDX-License-Identifier: Apache-2.0
"""Compiles tests/gpu/primitives.cu and calls its functions.

Here `tests/` is on the path: `from primitives_library import Library, compile_library`.
"""

import ctypes
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import build_settings
import numpy as np
import pypi_nvcc
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "gpu" / "primitives.cu"

# A kernel takes milliseconds, the first call a few seconds.
TIMEOUT_SECONDS = 30


def compile_library(folder: Path) -> tuple[Path, str]:
    """The library and what the compiler said of it. What is in `folder` already is not made anew.

    Skips the test that asks where there is no nvcc.
    """
    library, report = folder / "primitives.so", folder / "primitives.log"
    if not report.exists():
        nvcc = _find_nvcc(folder)
        folder.mkdir(exist_ok=True)
        atoms = folder / "wgmma_atoms.inc"
        generator = ROOT / "csrc" / "sm90" / "generate_wgmma.py"
        subprocess.run([sys.executable, generator, atoms], check=True)
        options = "-O3 -std=c++20 --expt-relaxed-constexpr -Xptxas=-v -shared -Xcompiler=-fPIC"
        target = "-gencode=arch=compute_90a,code=sm_90a -cudart=static"
        folders = [f"-I{ROOT / 'csrc'}", f"-I{folder}"]
        compilation = subprocess.run(
            [nvcc, *options.split(), *target.split(), *folders, "-o", library, SOURCE],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert compilation.returncode == 0, compilation.stdout
        report.write_text(compilation.stdout)
    return library, report.read_text()


def _find_nvcc(folder: Path) -> str:
    if nvcc := build_settings.system_nvcc():
        return nvcc
    try:
        return pypi_nvcc.make_toolkit(folder / "toolkit", pypi_nvcc.find_wheels())
    except SystemExit:
        pytest.skip("no nvcc: neither a CUDA toolkit nor NVIDIA's wheels are installed")


class Library:
    """The library's functions, run by another process: if one hangs or faults, the next still runs.

    A context manager; the process ends with it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._running = None

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_) -> None:
        self._end_process()

    def call(self, function: str, *arguments: bool | int | np.ndarray) -> np.ndarray:
        """The last of the arrays, as the function leaves it. Ours stay as they are."""
        _, connection = self._running = self._running or self._start_process()
        contiguous = [np.ascontiguousarray(x) if np.ndim(x) else x for x in arguments]
        try:
            connection.send((function, contiguous))
            if not connection.poll(TIMEOUT_SECONDS):
                raise TimeoutError(f"{function} took longer than {TIMEOUT_SECONDS} s")
            error, result = connection.recv()
            if error:
                raise RuntimeError(f"{function} returned CUDA error {error}")
        except (EOFError, OSError, RuntimeError) as problem:
            self._end_process()  # most errors of a device stay with the process
            if isinstance(problem, EOFError):
                raise RuntimeError(f"{function} killed its process") from problem
            raise
        return result

    def _start_process(self):
        # Not forked: JAX has threads, and CUDA does not survive a fork.
        context = multiprocessing.get_context("spawn")
        ours, theirs = multiprocessing.Pipe()
        process = context.Process(target=_serve, args=(self._path, theirs), daemon=True)
        process.start()
        theirs.close()  # or we would not notice the end of the process
        return process, ours

    def _end_process(self) -> None:
        if self._running:
            process, connection = self._running
            process.kill()
            process.join()
            connection.close()
        self._running = None


def _serve(library: Path, connection: Connection) -> None:
    functions = ctypes.CDLL(str(library))
    while True:
        name, arguments = connection.recv()
        pointers = [
            ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments
        ]
        error = getattr(functions, name)(*pointers)
        connection.send((error, [x for x in arguments if isinstance(x, np.ndarray)][-1]))
