# SPDX-License-Identifier: Apache-2.0
"""Who may import whom. A new edge is a decision about the architecture: make it in these tables."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each module of eqx_flash, and the modules of eqx_flash that it may import.
PYTHON_LAYERS = {
    "_C": set(),  # compiled
    "_types": set(),
    "_spec": set(),
    "_checks": {"_spec"},
    "_ffi": {"_C", "_spec"},
    "_platform": {"_ffi"},
    "_partition": {"_spec", "_types"},
    "_reference": {"_spec", "_types"},
    "_reverse_mode": set(),
    "_primitive": {"_ffi", "_partition", "_reference", "_reverse_mode", "_spec", "_types"},
    "_canonical": {"_checks", "_platform", "_spec", "_types"},
    "_dot_product_attention": {"_canonical", "_checks", "_primitive", "_spec", "_types"},
    "_hopper": {"_canonical", "_checks", "_primitive", "_spec", "_types"},
    "_explain": {"_canonical", "_ffi", "_platform", "_spec"},
    "nn._attention": {"_checks", "_dot_product_attention", "_spec"},
    "nn._rotary": set(),
    "nn": {"nn._attention", "nn._rotary"},
    "__init__": {"_dot_product_attention", "_explain", "_ffi", "_hopper", "nn"},
    "__main__": {"_explain", "_ffi", "_platform"},
}

# Each file or folder of csrc, and what it may include. `wgmma_atoms.inc` is generated.
CSRC_LAYERS = {
    "params.h": set(),
    "tile_config.h": {"params.h"},
    "dispatch.h": {"params.h", "tile_config.h"},
    "sm90/": {"sm90/", "wgmma_atoms.inc"},
    "kernels/": {"kernels/", "sm90/", "params.h", "tile_config.h"},
    "launch.cuh": {"params.h", "tile_config.h", "sm90/"},
    "launch_forward.cuh": {"launch.cuh", "dispatch.h", "kernels/", "tile_config.h"},
    "launch_backward.cuh": {"launch.cuh", "dispatch.h", "kernels/", "tile_config.h"},
    "instantiate.cu.in": {"launch_@PASS@.cuh"},
    "ffi/": {"ffi/", "dispatch.h", "params.h", "tile_config.h"},
}

# Headers from outside that only one layer may see.
FOREIGN_HEADERS = {"nanobind/": "ffi/", "xla/": "ffi/", "cuda/ptx": "sm90/"}


def python_files() -> dict[str, Path]:
    package = ROOT / "eqx_flash"
    files = {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in package.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imported_modules(name: str, path: Path) -> set[str]:
    """The modules of eqx_flash that `path`, which holds module `name`, imports."""
    here = ["eqx_flash", *name.replace("__init__", "").split(".")]
    package = [part for part in here if part][: None if path.name == "__init__.py" else -1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import _ffi` names a module; `from ._ffi import forward` names its parent.
            found |= {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} if node.module else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.add("eqx_flash" + ast.literal_eval(node.args[0]))
    return {module.removeprefix("eqx_flash.") for module in found} & set(PYTHON_LAYERS)


def csrc_layer(path: str) -> str:
    return path.split("/")[0] + "/" if "/" in path else path


def csrc_files() -> dict[str, Path]:
    csrc = ROOT / "csrc"
    return {str(path.relative_to(csrc)): path for path in csrc.rglob("*") if path.suffix != ".py"}


def test_tables_have_no_cycles_and_nothing_stale():
    graphlib.TopologicalSorter(PYTHON_LAYERS).prepare()
    graphlib.TopologicalSorter({k: v - {k} for k, v in CSRC_LAYERS.items()}).prepare()
    assert set(PYTHON_LAYERS) - {"_C"} == set(python_files())
    in_csrc = {csrc_layer(name) for name, path in csrc_files().items() if path.is_file()}
    assert set(CSRC_LAYERS) == in_csrc


@pytest.mark.parametrize("name", sorted(python_files()))
def test_python_imports(name):
    assert imported_modules(name, python_files()[name]) <= PYTHON_LAYERS[name]


def test_examples_use_the_public_api():
    for path in ROOT.glob("examples/*.py"):
        private = re.findall(r"eqx_flash\._[a-z]\w*|from eqx_flash import _\w+", path.read_text())
        assert not private, path


@pytest.mark.parametrize("name", sorted(n for n, path in csrc_files().items() if path.is_file()))
def test_csrc_includes(name):
    text = csrc_files()[name].read_text()
    layer = csrc_layer(name)
    ours = re.findall(r'#include "([^"]+)"', text)
    foreign = {
        header: owner
        for header in [*re.findall(r"#include <([^>]+)>", text), *ours]
        for prefix, owner in FOREIGN_HEADERS.items()
        if header.startswith(prefix)
    }
    assert {csrc_layer(header) for header in ours if header not in foreign} <= CSRC_LAYERS[layer]
    assert set(foreign.values()) <= {layer}


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("_a", "import jax\nfrom ._spec import AttentionSpec", {"_spec"}),
        ("_a", "from . import _ffi, _spec", {"_ffi", "_spec"}),
        ("_a", "def f():\n    import eqx_flash._C", {"_C"}),
        ("_a", "importlib.import_module('._C', __package__)", {"_C"}),
        ("nn._a", "from .._spec import AttentionSpec\nfrom . import _ffi", {"_spec"}),
        ("nn._a", "from eqx_flash._ffi import forward", {"_ffi"}),
    ],
)
def test_imports_are_found(tmp_path, module, source, expected):
    path = tmp_path / "_a.py"
    path.write_text(source)
    assert imported_modules(module, path) == expected
