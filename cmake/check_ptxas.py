# SPDX-License-Identifier: Apache-2.0
"""Runs a CUDA compilation and fails it if ptxas reports what makes a kernel slow.

CMake starts the compiler through this: `check_ptxas.py nvcc ... -Xptxas=-v ... -o OBJECT`. Neither
a register spill nor a serialised wgmma is an error to nvcc, and both go unnoticed in a build log.
"""

import dataclasses
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Bytes a thread may spill. A backward kernel's few lie outside its main loop.
SPILL_LIMITS = {"forward": 0, "backward": 64}

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FUNCTION = re.compile(r"Function properties for (\w+)")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# C7510 to C7519: wgmma serialised, or a fence added by ptxas.
_WGMMA_WARNING = re.compile(r"\(C75\d\d\).*")
_ROUTINE = re.compile(r"ptxas info |\s+\d+ bytes stack frame")


@dataclasses.dataclass
class Function:
    """What `ptxas -v` says of one function."""

    name: str
    registers: int | None = None  # only a kernel's are reported
    spilled_bytes: int = 0

    @property
    def spill_limit(self) -> int:
        return next((n for kind, n in SPILL_LIMITS.items() if kind in self.name), 0)


def read_report(text: str) -> list[Function]:
    functions: dict[str, Function] = {}
    kernel = function = None
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            kernel = functions.setdefault(match[1], Function(match[1]))
        elif match := _FUNCTION.search(line):
            function = functions.setdefault(match[1], Function(match[1]))
        elif function and (match := _SPILLS.search(line)):
            function.spilled_bytes = max(int(match[1]), int(match[2]))
        elif kernel and (match := _REGISTERS.search(line)):
            kernel.registers = int(match[1])
    return list(functions.values())


def find_problems(text: str) -> list[str]:
    """Why the build must fail; empty if it need not. `text` is a compiler's output."""
    functions = read_report(text)
    problems = [f"wgmma warning {match[0]}" for match in _WGMMA_WARNING.finditer(text)]
    problems += [
        f"{f.name} spills {f.spilled_bytes} bytes, allowed are {f.spill_limit}"
        for f in functions
        if f.spilled_bytes > f.spill_limit
    ]
    if all(f.registers is None for f in functions):
        problems.append("ptxas reported on no kernel: was the compiler run with -Xptxas=-v?")
    return [demangle(problem) for problem in problems]


def demangle(text: str) -> str:
    try:
        filtered = subprocess.run(["c++filt"], input=text, capture_output=True, text=True)
    except FileNotFoundError:
        return text
    # Without its parameter list, a kernel's name fits on a line.
    return re.sub(r"\bvoid (eqx_flash::\w+<.*?>)\([^()]*\)", r"\1", filtered.stdout).strip()


def main(command: Sequence[str]) -> int:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    for line in result.stdout.splitlines():
        if not _ROUTINE.match(line):
            print(line)
    if result.returncode:
        return result.returncode

    for function in read_report(result.stdout):
        if function.registers is not None:
            print(
                f"ptxas: {demangle(function.name)}: {function.registers} registers, "
                f"{function.spilled_bytes} bytes spilled"
            )
    problems = find_problems(result.stdout)
    for problem in problems:
        print(f"error: {problem}")
    if problems:
        # Or the next run would find the object up to date and link it.
        Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
