# SPDX-License-Identifier: Apache-2.0
"""CUDA sources as C++ for the host, line by line.

Each `asm` becomes a call of a function named like its instruction, with the operands in the order
in which the instruction has them: `asm volatile("red.global.add.f32 [%0], %1;" ::"l"(sum), "f"(x)
: "memory");` becomes `::emulator::ptx::red_global_add_f32(sum, x);`. A predicate makes the name end
in `_if` and comes first. The functions are in ptx.h.

The functions of csrc/sm90 that return nothing also note where they are called, for messages.
"""

import pathlib
import re
import shutil

OPCODE = re.compile(r"(@\w+ +)?\b([a-z]\w*(?:[.:]+\w+)+)")
CONTROL = ("setp.", "bra.")  # predicates and loops around the one instruction that counts
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
OPERAND = re.compile(r'\s*"[^"]*"\s*\((.*)\)\s*', re.S)
LAUNCH = re.compile(r"([\w:]+<[^;{}]*?>)\s*<<<(.*?)>>>\(", re.S)
FUNCTION = re.compile(r"\bEQX_DEVICE void \w+\(")
BODY = re.compile(r"\) *(?:const )?{")


def translate_tree(csrc: pathlib.Path, folder: pathlib.Path) -> None:
    """`folder`/csrc, a copy of `csrc` without anything that only nvcc understands."""
    target = folder / "csrc"
    shutil.copytree(csrc, target)
    for path in [*target.rglob("*.h"), *target.rglob("*.cuh")]:
        text = translate(path.read_text())
        path.write_text(note_calls(text) if path.parent.name == "sm90" else text)


def translate(source: str) -> str:
    source = LAUNCH.sub(r"::emulator::launch(\1, \2)(", source)
    source = source.replace("cudaLaunchKernelEx(", "::emulator::launch_configured(")
    result, at = "", 0
    for match in re.finditer(r"\basm(?: volatile)?\(", source):
        body = _until(source, match.end(), ")")
        result += source[at : match.start()] + _call(body) + "\n" * body.count("\n")
        at = match.end() + len(body) + 1
    return result + source[at:]


def note_calls(source: str) -> str:
    """Gives each function a last parameter, by default the place of the call."""
    result, at = "", 0
    for match in FUNCTION.finditer(source):
        end = match.end() + len(_until(source, match.end(), ")"))
        if body := BODY.match(source, end):  # else only declared
            comma = ", " if source[match.end() : end].strip() else ""
            place = "::emulator::Place place = ::emulator::Place::current()"
            result += f"{source[at:end]}{comma}{place}{body[0]} ::emulator::note_call(place);"
            at = body.end()
    return result + source[at:]


def _call(body: str) -> str:
    sections = _split(body, ":")
    text = "".join(STRING.findall(sections[0]))
    if not text:
        return "static_cast<void>(0)"  # a barrier for the compiler
    listed = [x for section in sections[1:3] for x in _split(section, ",") if x.strip()]
    operands = [match[1] for match in map(OPERAND.fullmatch, listed) if match]
    if len(operands) != len(listed):
        raise ValueError(f"not all of {listed} are operands, in {text!r}")
    found = [(p, name) for p, name in OPCODE.findall(text) if not name.startswith(CONTROL)]
    if len(found) != 1:
        raise ValueError(f"expected one instruction, found {len(found)} in {text!r}")
    ((predicate, opcode),) = found
    name = re.sub(r"[.:]+", "_", opcode) + ("_if" if predicate else "")
    arguments = [
        operands[int(i)] + (f" + {offset}" if offset else "")
        for i, offset in re.findall(r"%(\d+)(?: \+ (\d+)\])?", text)
    ]
    return f"::emulator::ptx::{name}({', '.join(arguments)})"


def _split(text: str, separator: str) -> list[str]:
    parts, at = [], 0
    while at <= len(text):
        parts.append(_until(text, at, separator))
        at += len(parts[-1]) + 1
    return parts


def _until(text: str, begin: int, stop: str) -> str:
    """Up to `stop` outside strings and nested parentheses."""
    depth, at = 0, begin
    while at < len(text):
        if string := STRING.match(text, at):
            at = string.end()
            continue
        if depth == 0 and text[at] == stop:
            break
        depth += {"(": 1, ")": -1, "[": 1, "]": -1}.get(text[at], 0)
        at += 1
    return text[begin:at]
