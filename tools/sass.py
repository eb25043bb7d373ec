# SPDX-License-Identifier: Apache-2.0
"""Reads the machine code (SASS) of the kernels in a compiled module.

`python tools/sass.py [MODULE]` prints each kernel's registers and what its hot loop is made of;
MODULE defaults to the installed eqx_flash._C. Look here, not at the source, to see what overlaps:
ptxas may move a wait across a whole loop body.

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
    def hot_loop(self) -> list[str]:
        """The shortest loop around a wgmma, empty if there is none. Longer ones are the loop over
        tiles, and branches back from waiting code, which ptxas puts at the kernel's end."""
        index = {address: i for i, (address, _) in enumerate(self.instructions)}
        loops = []
        for end, (_, text) in enumerate(self.instructions):
            if branch := _BRANCH.match(text):
                start = index[int(branch[1], 16)]
                loops.append([text for _, text in self.instructions[start : end + 1]])
        return min((body for body in loops if "HGMMA" in count_opcodes(body)), key=len, default=[])


def count_opcodes(instructions: Iterable[str]) -> collections.Counter[str]:
    return collections.Counter(re.split(r"[.\s]", text)[0] for text in instructions)


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
        if loop := kernel.hot_loop:
            counts = count_opcodes(loop).most_common(12)
            print(f"    hot loop of {len(loop)}:", ", ".join(f"{n} {op}" for op, n in counts))


if __name__ == "__main__":
    main()
