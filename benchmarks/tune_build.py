# SPDX-License-Identifier: Apache-2.0
"""Variants of the kernels as shared libraries, and what the compiler made of each.

A variant is a copy of csrc/ with changes; "shipped" has none. One library is one kernel of one
variant. Part of `tune.py`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "cmake"), str(ROOT / "tools")]

import build_settings  # noqa: E402
import check_ptxas  # noqa: E402
import pypi_nvcc  # noqa: E402
import sass  # noqa: E402

SHIPPED = "shipped"
ENTRY = ROOT / "benchmarks" / "tune_entry.cu.in"
ARGUMENTS = ENTRY.with_name("tune_arguments.h")
# As in cmake/kernels.cmake; then, what makes a library that shares nothing with the next one.
OPTIONS = (
    "-gencode=arch=compute_90a,code=sm_90a -O3 -std=c++20 --expt-relaxed-constexpr -Xptxas=-v "
    "-shared -cudart=static -Xcompiler=-fPIC,-fvisibility=hidden -Xlinker=-s"
).split()


@dataclasses.dataclass(frozen=True)
class Kernel:
    pass_: str
    head_dim: int
    mask: str

    def __str__(self) -> str:
        return f"{self.pass_}-d{self.head_dim}-{self.mask}"


KERNELS = [
    Kernel(pass_, head_dim, mask)
    for pass_ in ("forward", "backward")
    for head_dim in build_settings.HEAD_DIMS
    for mask in ("full", "causal")
]


@dataclasses.dataclass
class Variant:
    name: str
    tree: pathlib.Path  # a csrc/
    patches: list[pathlib.Path] = dataclasses.field(default_factory=list)
    changes: list[str] = dataclasses.field(default_factory=list)  # for override()
    words: list[str] = dataclasses.field(default_factory=list)  # of the kernels; none: all

    def concerns(self, kernel: Kernel) -> bool:
        return matches(str(kernel), self.words)


def matches(name: str, words: list[str]) -> bool:
    return not words or any(word in name for word in words)


# ---- Changes -------------------------------------------------------------------------------------


def override(csrc: pathlib.Path, change: str, head_dim: int) -> None:
    """Changes one value in one place, or raises ValueError.

    `forward_tile.block_n=144` is an entry of tile_config.h, that of `head_dim`;
    `kernels/forward.cuh:kDynamicTiles=true` is a constexpr variable, whose file may be left out if
    only one file defines it.
    """
    target, equals, value = change.partition("=")
    if not equals or not value:
        raise ValueError(f"{change!r} is not TARGET=VALUE")
    if tile := re.fullmatch(r"(\w+)\.(\w+)", target):
        path = csrc / "tile_config.h"
        path.write_text(override_tile(path.read_text(), *tile.groups(), value, head_dim))
        return
    file, _, name = target.rpartition(":")
    paths = (
        [csrc / file]
        if file
        else sorted(p for p in csrc.rglob("*") if p.suffix[:2] in (".h", ".c"))
    )
    pattern = re.compile(rf"(\bconstexpr [\w:<>, ]+? {re.escape(name)} = )[^;]+;")
    found = [(p, match) for p in paths for match in pattern.finditer(p.read_text())]
    if len(found) != 1:
        places = ", ".join(str(p.relative_to(csrc)) for p, _ in found)
        raise ValueError(f"{name} is defined in {len(found)} places ({places}), not in one")
    path, match = found[0]
    path.write_text(_spliced(path.read_text(), match.end(1), match.end() - 1, value))


def override_tile(text: str, function: str, field: str, value: str, head_dim: int) -> str:
    """tile_config.h with another value of one field of what `function` has for `head_dim`."""
    body = re.search(rf"^constexpr \w+ {function}\([^)]*\) {{\n(.*?)^}}", text, re.M | re.S)
    if not body:
        raise ValueError(f"tile_config.h has no function {function}")
    begin, end = body.span(1)
    if labels := list(re.compile(r"^ +(case \d+|default):", re.M).finditer(text, begin, end)):
        names = [label[1] for label in labels]
        wanted = f"case {head_dim}"
        first = names.index(wanted if wanted in names else "default")
        begin = labels[first].end()
        # Labels that share an entry: it is behind the last of them.
        ends = [*(label.start() for label in labels[first + 1 :]), end]
        end = next(at for at in ends if "return" in text[begin:at])
    found = list(re.compile(rf"\.{field} = ([^,;}}]+)").finditer(text, begin, end))
    if len(found) != 1:
        fields = ", ".join(dict.fromkeys(re.findall(r"\.(\w+) = ", text[begin:end])))
        raise ValueError(
            f"{function} sets {field} in {len(found)} places for head dim {head_dim}, not in one; "
            f"it sets {fields}"
        )
    return _spliced(text, *found[0].span(1), value)


def _spliced(text: str, begin: int, end: int, value: str) -> str:
    return text[:begin] + value + text[end:]


def make_sources(variant: Variant, head_dim: int, folder: pathlib.Path) -> None:
    """`folder`/csrc, and the generated file beside it."""
    shutil.rmtree(folder, ignore_errors=True)
    csrc = folder / "csrc"
    shutil.copytree(variant.tree, csrc)
    for patch in variant.patches:
        # Where git sees no repository, it applies a patch to plain files.
        subprocess.run(
            ["git", "apply", "--whitespace=nowarn", patch.resolve()], cwd=folder, check=True,
            capture_output=True, text=True,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)},
        )  # fmt: skip
    for change in variant.changes:
        override(csrc, change, head_dim)
    generator = csrc / "sm90" / "generate_wgmma.py"
    subprocess.run([sys.executable, generator, folder / "wgmma_atoms.inc"], check=True)


# ---- Compilation ---------------------------------------------------------------------------------


def entry_of(kernel: Kernel, template: pathlib.Path) -> str:
    """The translation unit that has the kernel's C functions."""
    text = template.read_text()
    for name, value in (("PASS", kernel.pass_), ("HEAD_DIM", kernel.head_dim),
                        ("MASK", kernel.mask.capitalize())):  # fmt: skip
        text = text.replace(f"@{name}@", str(value))
    return text


def find_nvcc(folder: pathlib.Path) -> str:
    """The system's, else that of PyPI's wheels, for which `folder` gets a toolkit."""
    return build_settings.system_nvcc() or pypi_nvcc.make_toolkit(
        folder / "toolkit", pypi_nvcc.find_wheels()
    )


def compile_kernel(
    variant: Variant, kernel: Kernel, out: pathlib.Path, nvcc: str, known: dict
) -> dict:
    """The kernel's entry in the manifest. What `known` has of the same sources is not made anew."""
    entry: dict[str, Any] = {
        "variant": variant.name, "kernel": str(kernel), "pass": kernel.pass_,
        "head_dim": kernel.head_dim, "mask": kernel.mask, "library": None, "error": None,
        "problems": [], "functions": [],
    }  # fmt: skip
    sources = out / "sources" / variant.name / f"d{kernel.head_dim}"
    unit = sources / f"{kernel}.cu"
    library = out / f"{variant.name}.{kernel}.so"
    unit.write_text(entry_of(kernel, ENTRY))
    entry["digest"] = _digest(unit, sources / "csrc")
    previous = known.get(library.name, {})
    if previous.get("digest") == entry["digest"] and library.exists():
        return previous
    library.unlink(missing_ok=True)
    folders = [f"-I{folder}" for folder in (sources / "csrc", sources, ENTRY.parent)]
    command = [nvcc, *OPTIONS, *folders, "-o", library, unit]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    library.with_suffix(".log").write_text(run.stdout)
    if run.returncode:
        entry["error"] = next(
            (x for x in run.stdout.splitlines() if "error" in x), run.stdout[-200:]
        )
        return entry
    entry["library"] = library.name
    entry["problems"] = check_ptxas.find_problems(run.stdout)
    entry["functions"] = _functions(run.stdout, library)
    return entry


def _digest(unit: pathlib.Path, csrc: pathlib.Path) -> str:
    digest = hashlib.sha256(" ".join(OPTIONS).encode())
    readers = [pathlib.Path(sass.__file__), pathlib.Path(check_ptxas.__file__)]
    for path in [
        unit,
        ARGUMENTS,
        *readers,
        pathlib.Path(__file__),
        *sorted(p for p in csrc.rglob("*") if p.is_file()),
    ]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _functions(report: str, library: pathlib.Path) -> list[dict[str, Any]]:
    """Of those that have loops around matrix products; without cuobjdump, of all."""
    try:
        loops = {kernel.name: kernel.loops for kernel in sass.read_kernels(library)}
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"no machine code was read: {error}")
        loops = None
    return [
        {
            "name": found[1] if found else function.name,
            "registers": function.registers,
            "spilled_bytes": function.spilled_bytes,
            "loops": [
                {
                    "instructions": len(loop),
                    **sass.count_kinds(loop),
                    "shared_bytes": sass.shared_memory_bytes(loop),
                    "order": sass.order(loop),
                }
                for loop in (loops or {}).get(function.name, [])
            ],
        }
        for function in check_ptxas.read_report(report)
        if function.registers is not None and (loops is None or loops[function.name])
        for found in [re.search(r"eqx_flash\d+(\w+?)_kernel", function.name)]
    ]


def build(
    variants: list[Variant], kernels: list[Kernel], out: pathlib.Path, jobs: int
) -> list[dict[str, Any]]:
    """Writes the libraries and manifest.json, and returns its entries."""
    out.mkdir(parents=True, exist_ok=True)
    manifest = out / "manifest.json"
    known = {}
    if manifest.exists():
        entries = json.loads(manifest.read_text())["entries"]
        known = {entry["library"]: entry for entry in entries if entry["library"]}
    nvcc = find_nvcc(out)
    wanted = [(v, k) for v in variants for k in kernels if v.concerns(k)]
    # The backward needs the results of a forward.
    helpers = {Kernel("forward", k.head_dim, k.mask) for _, k in wanted} - set(kernels)
    shipped = next(variant for variant in variants if variant.name == SHIPPED)
    wanted += [(shipped, kernel) for kernel in sorted(helpers, key=str)]
    failures = {}
    for variant, head_dim in dict.fromkeys((v.name, k.head_dim) for v, k in wanted):
        try:
            folder = out / "sources" / variant / f"d{head_dim}"
            make_sources(next(v for v in variants if v.name == variant), head_dim, folder)
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            failures[variant, head_dim] = getattr(error, "stderr", None) or str(error)
    with ThreadPoolExecutor(jobs) as pool:
        work = {
            (v.name, k): pool.submit(compile_kernel, v, k, out, nvcc, known)
            for v, k in wanted
            if (v.name, k.head_dim) not in failures
        }
    entries = [
        {**job.result(), "measured": kernel not in helpers} for (_, kernel), job in work.items()
    ]
    for path in out.glob("*.so"):  # of an earlier build
        if path.name not in {entry["library"] for entry in entries}:
            path.unlink()
    about = {
        v.name: {"tree": str(v.tree), "patches": [str(p) for p in v.patches], "changes": v.changes}
        for v in variants
    }
    content = {"commit": _commit(), "variants": about, "entries": entries}
    manifest.write_text(json.dumps(content, indent=1) + "\n")
    for (variant, head_dim), reason in failures.items():
        print(f"{variant} d{head_dim} left out: {reason.strip()}")
    return entries


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def table(entries: list[dict[str, Any]]) -> str:
    """A line for each loop around matrix products, of one warp's instructions."""
    kinds = ("instructions", *sass.KINDS, "uniform", "other")
    short = {"instructions": "loop", "convert": "cvt", "shared": "smem"}
    width = max(len(entry["variant"]) for entry in entries) + 2
    lines = [
        f"{'kernel':22s}{'variant':{width}s}{'function':16s}{'regs':>6s}{'spill':>6s}"
        + "".join(f"{short.get(kind, kind):>8s}" for kind in kinds)
        + " smem KB  order"
    ]
    for entry in sorted(entries, key=lambda entry: entry["kernel"]):  # variants stay in order
        title = f"{entry['kernel']:22s}{entry['variant']:{width}s}"
        for function in entry["functions"]:
            begin = f"{title}{function['name']:16s}{function['registers']:6d}"
            begin += f"{function['spilled_bytes']:6d}"
            lines += [
                begin
                + "".join(f"{loop[kind]:8d}" for kind in kinds)
                + f"{loop['shared_bytes'] / 1024:8.1f}  {loop['order']}"
                for loop in function["loops"]
            ] or [begin]
        lines += [f"{title}! {text}" for text in (entry["error"], *entry["problems"]) if text]
    return "\n".join(lines)
