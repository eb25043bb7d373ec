# SPDX-License-Identifier: Apache-2.0
"""Reads the machine code (SASS) of the kernels in a compiled module.

`python tools/sass.py [MODULE]` prints each kernel's registers, what its loops are made of and in
which order; MODULE defaults to the installed eqx_flash._C. Look here, not at the source, to see
what overlaps: ptxas may move a wait across a whole loop body.

Needs the wheels nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, which `.[test]` brings.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from check_ptxas import demangle

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([^;]+?)\s*;")
_BRANCH = re.compile(r"BRA\S*\s.*?0x([0-9a-f]+)$")
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")
_MATRIX_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.\S+ R\d+, (R\d+, )?gdesc")
_SHARED_ACCESS = re.compile(r"(?:LDS|STS)(?:\.\w+)*?(?:\.(\d+))? ")
_SHARED_MATRICES = re.compile(r"(?:LDSM|STSM)\S*?(?:\.([24]))? \S")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)")

# What an instruction keeps busy. The rest is integer arithmetic, moves and branches.
KINDS = {
    "mma": "HGMMA",
    "exp": "MUFU",
    "fp32": "FADD FFMA FMUL FMNMX FSEL FSETP FSET FCHK",
    "convert": "F2FP F2F F2I I2F I2FP",
    "shared": "LDS STS LDSM STSM ATOMS",
    "global": "LD LDG ST STG RED REDG ATOM ATOMG UTMALDG UTMASTG UTMAREDG UBLKCP UBLKRED",
    "sync": "BAR SYNCS WARPGROUP DEPBAR MEMBAR FENCE WARPSYNC",
}
_KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack_bytes: int
    instructions: list[tuple[int, str]]  # address, text without its predicate

    @property
    def opcodes(self) -> collections.Counter[str]:
        return count_opcodes(text for _, text in self.instructions)

    @property
    def loops(self) -> list[list[str]]:
        """The innermost loops around a wgmma, in the order of the code. Longer ones that overlap
        them are the loop over tiles. A branch back from behind an exit is no loop but waiting
        code, which ptxas puts at the kernel's end."""
        index = {address: i for i, (address, _) in enumerate(self.instructions)}
        spans = [
            (index[int(branch[1], 16)], end + 1)
            for end, (_, text) in enumerate(self.instructions)
            if (branch := _BRANCH.match(text))
        ]
        inner: list[tuple[int, int]] = []
        for begin, end in sorted(spans, key=lambda span: span[1] - span[0]):
            opcodes = count_opcodes(text for _, text in self.instructions[begin:end])
            is_loop = "HGMMA" in opcodes and "EXIT" not in opcodes
            if is_loop and all(end <= b or e <= begin for b, e in inner):
                inner.append((begin, end))
        return [[text for _, text in self.instructions[b:e]] for b, e in sorted(inner)]

    @property
    def hot_loop(self) -> list[str]:
        """The shortest of `loops`, empty if there is none."""
        return min(self.loops, key=len, default=[])


def count_opcodes(instructions: Iterable[str]) -> collections.Counter[str]:
    return collections.Counter(re.split(r"[.\s]", text)[0] for text in instructions)


def count_kinds(instructions: Iterable[str]) -> dict[str, int]:
    """Instructions of each of KINDS, then "uniform" (one for a whole warp) and "other"."""
    counts = dict.fromkeys((*KINDS, "uniform", "other"), 0)
    for opcode, n in count_opcodes(instructions).items():
        uniform = opcode.startswith("U") or opcode in ("R2UR", "S2UR")
        counts[_KIND_OF.get(opcode, "uniform" if uniform else "other")] += n
    return counts


def shared_memory_bytes(instructions: Iterable[str]) -> int:
    """What a warpgroup moves between shared memory and its registers or the tensor cores."""
    total = 0
    for text in instructions:
        if product := _MATRIX_PRODUCT.match(text):
            rows = int(product[1]) + (0 if product[2] else 64)  # of B, and of A if not in registers
            total += rows * 16 * 2
        elif access := _SHARED_ACCESS.match(text):
            total += 128 * int(access[1] or 32) // 8
        elif matrices := _SHARED_MATRICES.match(text):
            total += 4 * int(matrices[1] or 1) * 128  # a warp's 8 x 8 matrices of 16 bits
    return total


def order(instructions: Iterable[str]) -> str:
    """The sequence of what should overlap, as "8mma 8mma wait1 34exp wait0": matrix products up to
    each commit, exponentials, waits until so many groups of products are left, and barriers."""
    events: list[tuple[int, str]] = []
    for text in instructions:
        if wait := _WAIT.match(text):
            name = f"wait{wait[1]}"
        elif text.startswith("BAR.SYNC"):
            name = "barrier"
        elif text.startswith("MUFU.EX2"):
            name = "exp"
        elif text.startswith("HGMMA"):
            name = "mma"
        else:
            continue
        counted = name in ("exp", "mma")
        if counted and events and events[-1][1] == name:
            events[-1] = events[-1][0] + 1, name
        else:
            events.append((1 if counted else 0, name))
        if "gsb0" in text and name == "mma":  # the group's last
            events.append((0, ""))
    return " ".join(f"{n or ''}{name}" for n, name in events if name)


def read_kernels(module: str | Path) -> list[Kernel]:
    resources = {
        name: (int(registers), int(stack))
        for name, registers, stack in _RESOURCES.findall(_cuobjdump("-res-usage", module))
    }
    kernels = []
    for section in _cuobjdump("-sass", module).split("Function : ")[1:]:
        name = section.split(maxsplit=1)[0]
        instructions = [(int(address, 16), text) for address, text in _INSTRUCTION.findall(section)]
        kernels.append(Kernel(name, *resources[name], instructions))
    return kernels


def embedded_ptx(module: str | Path) -> list[str]:
    """Names of the PTX images in the module, which a driver could compile anew."""
    return re.findall(r"PTX file\s+\d+: (\S+)", _cuobjdump("-lptx", module))


def _cuobjdump(option: str, module: str | Path) -> str:
    command = [_find_cuobjdump(), option, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _find_cuobjdump() -> str:
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        for tool in sorted(Path(folder).glob("cu*/bin/cuobjdump"), reverse=True):
            return str(tool)
    raise FileNotFoundError("cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def main() -> None:
    built = importlib.util.find_spec("eqx_flash._C")
    module = sys.argv[1] if len(sys.argv) > 1 else built and built.origin
    if not module:
        sys.exit("eqx_flash._C was not built, and no other module was named")
    for kernel in read_kernels(module):
        print(
            f"{demangle(kernel.name)}: {kernel.registers} registers, "
            f"{kernel.stack_bytes} bytes of stack, {len(kernel.instructions)} instructions"
        )
        for loop in kernel.loops:
            counts = count_opcodes(loop).most_common(12)
            print(f"    loop of {len(loop)}:", ", ".join(f"{n} {op}" for op, n in counts))
            print(f"    {shared_memory_bytes(loop)} bytes of shared memory, order: {order(loop)}")


if __name__ == "__main__":
    main()
