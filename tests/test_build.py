# SPDX-License-Identifier: Apache-2.0
"""What a build takes from its environment, and what the compiled module promises."""

import ast
import shutil
import subprocess
import sys
from importlib.resources import files

import build_settings
import pypi_nvcc
import pytest

from eqx_flash import _ffi


def make_nvcc(folder, release):
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Pretends to be a machine with this nvcc and this driver; returns its environment."""

    def pretend(nvcc: str | None = None, driver: bool = False, **environ: str) -> dict[str, str]:
        monkeypatch.setattr(build_settings, "DEFAULT_TOOLKIT", str(tmp_path / "absent"))
        monkeypatch.setattr(build_settings, "DRIVER", tmp_path / "driver")
        if nvcc:
            make_nvcc(tmp_path, nvcc)
        if driver:
            (tmp_path / "driver").touch()
        return {"PATH": str(tmp_path), **environ}

    return pretend


@pytest.mark.parametrize(
    "nvcc, driver, choice",
    [
        ("13.0", False, "system"),
        ("13.0", True, "system"),
        ("12.4", True, "pypi"),  # too old
        ("12.4", False, "off"),
        (None, True, "pypi"),
        (None, False, "off"),
    ],
)
def test_auto_takes_what_the_machine_has(machine, nvcc, driver, choice):
    assert build_settings.cuda_choice(machine(nvcc, driver)) == choice
    assert build_settings.cuda_choice(machine(nvcc, driver, EQX_FLASH_CUDA="auto")) == choice


@pytest.mark.parametrize("choice", ["off", "system", "pypi"])
def test_cuda_can_be_forced(machine, choice):
    environ = machine(nvcc="13.0", EQX_FLASH_CUDA=choice)
    assert build_settings.cuda_choice(environ) == choice


def test_nvcc_is_found_in_a_toolkit_folder(machine, tmp_path):
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    nvcc = make_nvcc(tmp_path / "toolkit" / "bin", "12.9")
    environ = machine(CUDA_HOME=str(tmp_path / "toolkit"))
    assert build_settings.system_nvcc(environ) == nvcc
    assert build_settings.nvcc_version(nvcc) == (12, 9)


@pytest.mark.parametrize("value, message", [("on", "EQX_FLASH_CUDA='on'"), ("system", "no nvcc")])
def test_bad_cuda_choice_names_the_choices(machine, value, message):
    with pytest.raises(SystemExit, match=message) as error:
        build_settings.cuda_choice(machine(EQX_FLASH_CUDA=value))
    assert {"auto", "off", "pypi"} <= set(str(error.value).replace(",", " ").strip(".").split())


@pytest.mark.parametrize(
    "text, head_dims",
    [("", [64, 128, 256]), ("128", [128]), ("256;64", [64, 256]), ("64, 128", [64, 128])],
)
def test_head_dims(text, head_dims):
    assert build_settings.head_dims({"EQX_FLASH_HEAD_DIMS": text}) == head_dims


@pytest.mark.parametrize("text", ["96", "64,x", "64;65;66"])
def test_bad_head_dims_name_the_choices(machine, text):
    environ = machine(EQX_FLASH_CUDA="off", EQX_FLASH_HEAD_DIMS=text)
    with pytest.raises(SystemExit, match=r"EQX_FLASH_HEAD_DIMS=.*choose among 64, 128, 256"):
        build_settings.build_requirements(environ)


def test_only_kernels_have_requirements(machine):
    def requirements(choice):
        return build_settings.build_requirements(machine(nvcc="13.0", EQX_FLASH_CUDA=choice))

    assert requirements("off") == []
    assert requirements("system") == [build_settings.FFI_HEADERS]
    assert requirements("pypi") == [build_settings.FFI_HEADERS, *pypi_nvcc.WHEELS]
    assert all("==" in requirement for requirement in requirements("pypi"))


def test_pypi_toolkit_has_the_layout_nvcc_expects(tmp_path):
    wheels, root = tmp_path / "cu13", tmp_path / "toolkit"
    for folder in ("bin", "include", "lib", "nvvm"):
        (wheels / folder).mkdir(parents=True)
    (wheels / "bin" / "nvcc").touch()
    (wheels / "lib" / "libcudart_static.a").touch()
    for _ in range(2):  # a configured build folder may be configured again
        assert pypi_nvcc.make_toolkit(root, wheels) == str(root / "bin" / "nvcc")
    assert (root / "bin").is_dir() and not (root / "bin").is_symlink()
    assert (root / "bin" / "nvcc").is_file()
    assert (root / "lib64" / "libcudart_static.a").is_file()
    assert (root / "nvvm").is_dir()


@pytest.fixture
def module():
    if _ffi._C is None:
        pytest.skip("eqx_flash._C was not built: pip install -e .")
    return _ffi._C


def test_module_says_how_it_was_built(module):
    info = module.build_info()
    assert info.keys() == {"cuda", "architectures", "head_dims"}
    with_kernels = info["cuda"] != "off"
    assert info["architectures"] == ("sm_90a" if with_kernels else "")
    assert bool(info["head_dims"]) == with_kernels
    registrations = module.registrations()
    assert (_ffi.FORWARD in registrations) == with_kernels
    for capsule in registrations.values():
        assert '"xla._CUSTOM_CALL_TARGET"' in repr(capsule)


def test_stub_names_what_the_module_has(module):
    stub = ast.parse(files("eqx_flash").joinpath("_C.pyi").read_text())
    declared = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert declared == {name for name in dir(module) if not name.startswith("_")}
    assert files("eqx_flash").joinpath("py.typed").is_file()


def test_one_module_serves_every_newer_python(module):
    expected = "_C.abi3.so" if sys.version_info >= (3, 12) else "_C.cpython-311"
    assert module.__file__.split("/")[-1].startswith(expected)


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf, of binutils")
def test_module_keeps_cuda_to_itself(module):
    """It must import without a driver, and beside the CUDA libraries that JAX loads."""

    def readelf(*options):
        command = ["readelf", "--wide", *options, module.__file__]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = [line for line in readelf("--dynamic").splitlines() if "(NEEDED)" in line]
    assert needed and not [line for line in needed if "cuda" in line]
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines() if "DEFAULT" in line]
    exported = {fields[-1] for fields in symbols if fields[3] == "FUNC" and "UND" not in fields}
    # libstdc++ exports its inline functions from whatever uses them.
    assert {name for name in exported if not name.startswith("_ZNSt")} == {"PyInit__C"}
