# SPDX-License-Identifier: Apache-2.0
"""The kernels on this machine's CPU, through the emulator in tests/emulator.

A library has the C functions of benchmarks/tune_entry.cu.in, so it is run and judged as on a GPU by
tune_device.py and tune_cases.py. Needs the headers of a CUDA toolkit, Linux, and a C++ compiler.
"""

import functools
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from emulator import translate

ROOT = pathlib.Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
sys.path += [str(ROOT / "benchmarks")]

import tune_build  # noqa: E402
from tune_build import Kernel, Variant  # noqa: E402
from tune_cases import Case, Cases, Checker, Checks, check, check_table  # noqa: E402

ELEMENTS = {"bfloat16": "__nv_bfloat16", "float16": "__half"}

OPTIONS = "-std=c++20 -O1 -w -fPIC -shared -fvisibility=hidden -include cuda_on_host.h".split()
# What is not set is a large number, not what a run before has left there. GCC 12 knows it.
PATTERN = "-ftrivial-auto-var-init=pattern"

EIGHT = 8  # launches in a row: all orders that the emulator knows
HANGS_AFTER = 120  # seconds of what should take five


def small_cases(head_dim: int) -> Cases:
    """Four batch-heads, so that each of two multiprocessors gets several tiles."""
    fewest = head_dim // 2 - 8 if head_dim > 64 else 24  # 72 and 136 are the first in their tiles
    rows, keys = (200, 300) if head_dim < 256 else (140, 200)  # its tiles are smaller
    return Cases(
        batch=2,
        heads=2,
        length=300,
        cases=(
            Case(rows, keys, 1, launches=EIGHT),
            Case(260, 130, 2, missing_columns=fewest),  # causal: rows that see nothing
            Case(1, 129, 1),
            Case(128, 128, 2, alignment="top_left", has_dlse=False),
        ),
    )


def cuda_headers(folder: pathlib.Path) -> list[str]:
    """The options with which nvcc looks for its headers; SystemExit where there is no nvcc."""
    command = [tune_build.find_nvcc(folder), "--dryrun", "-E", "-x", "cu", os.devnull]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return shlex.split(" ".join(re.findall(r"^#\$ (?:SYSTEM_)?INCLUDES=(.*)", listed, re.M)))


def compile_kernel(
    csrc: pathlib.Path, kernel: Kernel, dtype: str, folder: pathlib.Path, headers: list[str]
) -> pathlib.Path:
    """`folder` gets the translated sources and the library. RuntimeError if it does not compile."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    translate.translate_tree(csrc, folder)
    unit, library = folder / f"{kernel}.cpp", folder / f"{kernel}.so"
    entry = tune_build.entry_of(kernel, EMULATOR / "entry.cpp.in")
    unit.write_text(entry.replace("@ELEMENT@", ELEMENTS[dtype]))
    folders = [f"-I{path}" for path in (folder / "csrc", EMULATOR, tune_build.ARGUMENTS.parent)]
    options = [*OPTIONS, PATTERN] if _compiler_takes(PATTERN) else OPTIONS
    command = ["c++", *options, *folders, *headers, "-o", library, unit]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        errors = [line for line in run.stdout.splitlines() if "error" in line]
        raise RuntimeError(f"{kernel} does not compile: {errors or run.stdout}")
    return library


@functools.cache
def _compiler_takes(option: str) -> bool:
    command = ["c++", option, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def run_library(library: pathlib.Path, pass_: str, checker: Checker) -> tuple[str, pathlib.Path]:
    """What went wrong, empty if nothing did, and the file with the results."""
    folder = tempfile.mkdtemp(dir=library.parent)  # a library may run with other cases meanwhile
    stem = f"{folder}/{pass_}"
    job = {
        "library": str(library), "cases": checker.job_cases(pass_), "cells": [],
        "results": f"{stem}.npz",
    }  # fmt: skip
    return check(job, f"{stem}.json", HANGS_AFTER), pathlib.Path(job["results"])


def emulate(variants: list[Variant], kernels: list[Kernel], folder: pathlib.Path, jobs: int) -> str:
    """A table of what is wrong with each variant's kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = cuda_headers(folder)
    wanted = [(v, k) for k in kernels for v in variants if v.concerns(k)]
    checkers = {
        key: Checker(*key, folder, small_cases(key[0]))
        for key in dict.fromkeys((k.head_dim, k.mask) for _, k in wanted)
    }

    def checks_of(variant: Variant, kernel: Kernel) -> Checks:
        sources = folder / variant.name / str(kernel)
        try:
            tune_build.make_sources(variant, kernel.head_dim, sources)
            csrc, built = sources / "csrc", sources / "built"
            library = compile_kernel(csrc, kernel, "bfloat16", built, headers)
        except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            problem = (getattr(error, "stderr", None) or str(error)).strip()
            return {(str(kernel), variant.name, kernel.pass_): {"error": None, "problem": problem}}
        found: Checks = {}
        checker = checkers[kernel.head_dim, kernel.mask]
        for pass_ in ("forward",) if kernel.pass_ == "forward" else ("backward", "deterministic"):
            problem, path = run_library(library, pass_, checker)
            error = None
            if not problem:
                with np.load(path) as results:
                    error = checker.worst_error(pass_, dict(results))
                problem = "" if error <= 1 else "wrong"
            found[str(kernel), variant.name, pass_] = {"error": error, "problem": problem}
        return found

    with ThreadPoolExecutor(jobs) as pool:
        work = [pool.submit(checks_of, *one) for one in wanted]
        return check_table({key: found for job in work for key, found in job.result().items()})
