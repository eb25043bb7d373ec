#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the wgmma instructions the kernels use: one C++ specialisation for each shape.

An instruction names each accumulator register, up to 128 of them; nobody should type or read that.
Run by CMake at configure time: `generate_wgmma.py OUTPUT`.
"""

import sys
from pathlib import Path

ELEMENTS = {"__nv_bfloat16": "bf16", "__half": "f16"}
K_MAJOR_N = (64, 80, 96, 128)  # tile widths of S = Q K^T, and of S^T and dP in the backward
MN_MAJOR_N = (32, 64, 128, 256)  # head dims of O += P V, dQ += dS K, ...


def instruction(ptx_type: str, n: int, a_in_registers: bool, b_transposed: bool) -> str:
    accumulators = n // 2
    d_list = ", ".join(f"%{i}" for i in range(accumulators))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(accumulators))
    operand = accumulators
    if a_in_registers:
        a_text = "{" + ", ".join(f"%{operand + i}" for i in range(4)) + "}"
        inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
        operand += 4
        # Only an operand in shared memory has a transpose bit.
        flags = f"1, 1, {int(b_transposed)}"
    else:
        a_text, inputs = f"%{operand}", '"l"(a)'
        operand += 1
        flags = f"1, 1, 0, {int(b_transposed)}"
    name, a_type = ("registers", "const uint32_t*") if a_in_registers else ("shared", "uint64_t")
    return (
        f"  EQX_DEVICE static void {name}(float (&d)[{accumulators}], {a_type} a, uint64_t b,"
        f" bool accumulate) {{\n"
        f'    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{operand + 1}, 0;"\n'
        f'      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ptx_type}.{ptx_type} "\n'
        f'      "{{{d_list}}}, {a_text}, %{operand}, p, {flags};}}"\n'
        f'      : {outputs}\n      : {inputs}, "l"(b), "r"(static_cast<int>(accumulate)));\n'
        f"  }}\n"
    )


def atom(element: str, n: int, major: str) -> str:
    ptx_type = ELEMENTS[element]
    b_transposed = major == "kMN"
    bodies = [
        instruction(ptx_type, n, a_in_registers, b_transposed) for a_in_registers in (False, True)
    ]
    return (
        f"template <>\nstruct WgmmaAtom<{element}, {n}, Major::{major}> {{\n"
        + "".join(bodies)
        + "};\n"
    )


def main() -> None:
    (output,) = sys.argv[1:]
    text = "// Written by generate_wgmma.py.\n"
    for element in ELEMENTS:
        for major, widths in (("kK", K_MAJOR_N), ("kMN", MN_MAJOR_N)):
            text += "".join(atom(element, n, major) for n in widths)
    Path(output).write_text(text)


if __name__ == "__main__":
    main()
