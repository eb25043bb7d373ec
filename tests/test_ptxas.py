# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels: no spill, no serialised wgmma, and the instructions that make them fast."""

import importlib
import sys
from typing import Any

import check_ptxas
import pytest
import sass

from eqx_flash import _ffi

FORWARD = (
    "_ZN9eqx_flash14forward_kernelI6__halfLi64ELNS_4MaskE0EEEvNS_16ForwardArgumentsE",
    "eqx_flash::forward_kernel<__half, 64, (eqx_flash::Mask)0>",
)
BACKWARD = (
    "_ZN9eqx_flash15backward_kernelI6__halfLi64ELNS_4MaskE0EEEvNS_17BackwardArgumentsE",
    "eqx_flash::backward_kernel<__half, 64, (eqx_flash::Mask)0>",
)


def ptxas_report(name: str, spill_stores: int = 0, spill_loads: int = 0) -> str:
    return f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{name}' for 'sm_90a'
ptxas info    : Function properties for {name}
    {spill_stores} bytes stack frame, {spill_stores} bytes spill stores, {spill_loads} bytes spill loads
ptxas info    : Used 128 registers, used 16 barriers
ptxas info    : Compile time = 142.134 ms
"""  # noqa: E501


SERIALISED = (
    "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
    f"serialized due to insufficient register resources for the function '{FORWARD[0]}'\n"
)
FENCE_ADDED = (
    "ptxas info    : (C7519) warpgroup.arrive is injected in around line 298 by compiler to allow "
    f"use of registers in GMMA in function '{FORWARD[0]}'\n"
)


def test_report_is_read():
    text = ptxas_report(FORWARD[0], 96, 144) + ptxas_report(BACKWARD[0])
    assert check_ptxas.read_report(text) == [
        check_ptxas.Function(FORWARD[0], registers=128, spilled_bytes=144),
        check_ptxas.Function(BACKWARD[0], registers=128, spilled_bytes=0),
    ]


@pytest.mark.parametrize(
    "text",
    [
        ptxas_report(FORWARD[0]),
        ptxas_report(BACKWARD[0], 64, 48),
        "nvcc warning : something else\n" + ptxas_report(FORWARD[0]),
    ],
)
def test_clean_report_passes(text):
    assert check_ptxas.find_problems(text) == []


@pytest.mark.parametrize("warning", [SERIALISED, FENCE_ADDED])
def test_wgmma_warning_fails(warning):
    (problem,) = check_ptxas.find_problems(warning + ptxas_report(FORWARD[0]))
    assert warning[17:22] in problem
    assert FORWARD[1] in problem


@pytest.mark.parametrize(
    "kernel, stores, loads, limit",
    [(FORWARD, 4, 0, 0), (FORWARD, 0, 4, 0), (BACKWARD, 68, 8, 64), (BACKWARD, 8, 68, 64)],
)
def test_spill_fails(kernel, stores, loads, limit):
    mangled, name = kernel
    (problem,) = check_ptxas.find_problems(ptxas_report(mangled, stores, loads))
    assert problem == f"{name} spills {max(stores, loads)} bytes, allowed are {limit}"


def test_missing_report_fails():
    (problem,) = check_ptxas.find_problems("")
    assert "-Xptxas=-v" in problem


@pytest.mark.parametrize(
    "report, exit_code",
    [(ptxas_report(FORWARD[0]), 0), (SERIALISED + ptxas_report(FORWARD[0]), 1), (None, 3)],
)
def test_bad_kernels_are_not_left_behind(tmp_path, capsys, report, exit_code):
    """The launcher, on a stand-in for the compiler that prints `report` or fails by itself."""
    compiled = tmp_path / "kernel.o"
    fake_compiler = tmp_path / "compiler.py"
    fake_compiler.write_text(
        "import pathlib, sys\n"
        f"report = {report!r}\n"
        "if report is None: sys.exit(3)\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "print(report, file=sys.stderr)\n"
    )
    command = [sys.executable, str(fake_compiler), "-o", str(compiled)]
    assert check_ptxas.main(command) == exit_code
    assert compiled.exists() == (exit_code == 0)
    printed = capsys.readouterr().out
    assert ("128 registers, 0 bytes spilled" in printed) == (report is not None)
    assert ("error: wgmma warning (C7512)" in printed) == (exit_code == 1)


def module_path() -> str:
    return importlib.import_module("eqx_flash._C").__file__


LOOP = """\
BAR.SYNC.DEFER_BLOCKING R11, 0x100
HGMMA.64x128x16.F32.BF16 R88, gdesc[UR20], RZ, !UPT
HGMMA.64x128x16.F32.BF16 R88, gdesc[UR20], R88, gsb0
HGMMA.64x64x16.F32.BF16 R24, R188, gdesc[UR20].tnspB, R24, gsb0
MUFU.EX2 R17, R17
WARPGROUP.DEPBAR.LE gsb0, 0x1
MUFU.EX2 R88, R88
FFMA R88, R88, R6.reuse, -R3.reuse
MUFU.EX2 R89, R89
WARPGROUP.DEPBAR.LE gsb0, 0x0
STS.128 [R6+0x24800], R152
STSM.16.MT88.4 [R7], R184
UMOV UR22, UR12
BRA 0x29c0""".splitlines()


def test_what_a_loop_is_made_of():
    assert sass.order(LOOP) == "barrier 2mma 1mma 1exp wait1 2exp wait0"
    counts = {"mma": 3, "exp": 3, "fp32": 1, "shared": 2, "sync": 3, "uniform": 1, "other": 1}
    assert {kind: n for kind, n in sass.count_kinds(LOOP).items() if n} == counts
    products = 2 * (64 + 128) * 16 * 2 + 64 * 16 * 2  # the last has A in registers
    assert sass.shared_memory_bytes(LOOP) == products + 128 * 16 + 128 * 16


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    if not _ffi.built_head_dims():
        pytest.skip("eqx_flash._C has no kernels: built with EQX_FLASH_CUDA=off, or not at all")
    return sass.read_kernels(module_path())


@pytest.mark.parametrize(
    "name, head_dims",
    [
        ("forward_kernel", {64, 128, 256}),
        ("backward_dkdv_kernel", {64, 128, 256}),
        ("backward_dq_kernel", {64, 128, 256}),
        ("backward_fused_kernel", {64, 128}),
    ],
)
def test_every_kernel_is_there(kernels, name, head_dims):
    head_dims = head_dims & set(_ffi.built_head_dims())
    built = len(head_dims) * len(["bf16", "f16"]) * len(["full", "causal"])
    assert sum(name in kernel.name for kernel in kernels) == built


def test_no_ptx_is_embedded(kernels):
    assert sass.embedded_ptx(module_path()) == []


def test_products_run_on_tensor_cores_and_loads_through_tma(kernels):
    elementwise = ("backward_prep_kernel", "backward_finish_dq_kernel")
    for kernel in kernels:
        if not any(name in kernel.name for name in elementwise):
            assert {"HGMMA", "UTMALDG"} <= kernel.opcodes.keys(), kernel.name


@pytest.fixture(scope="module")
def forward_kernels(kernels) -> list[tuple[sass.Kernel, dict[str, Any]]]:
    """With a row of the tile table; what is used of it does not depend on the mask."""
    rows = {row["head_dim"]: row for row in _ffi.tile_config()}
    return [
        (kernel, row)
        for kernel in kernels
        for head_dim, row in rows.items()
        if "forward_kernel" in kernel.name and f"Li{head_dim}E" in kernel.name
    ]


def test_output_leaves_in_large_pieces(forward_kernels):
    """By TMA from a buffer of its own, or 16 bytes a lane."""
    for kernel, tile in forward_kernels:
        assert ("UTMASTG" in kernel.opcodes) == tile["own_output_buffer"], kernel.name
        stores = [text for _, text in kernel.instructions if text.startswith("STG")]
        pieces = sum(".128 " in text for text in stores)
        assert tile["own_output_buffer"] or pieces >= 14, kernel.name  # ptxas cuts up 2 of 16


def test_forward_kernels_keep_everything_in_registers(forward_kernels):
    for kernel, _ in forward_kernels:
        assert kernel.stack_bytes == 0, kernel.name
        assert not {"LDL", "STL"} & kernel.opcodes.keys(), kernel.name


def test_hot_loops_neither_spill_nor_wait_for_the_whole_gpu(kernels):
    """A fence of the block's own shared memory (MEMBAR.ALL.CTA) is cheap, a wider one is not."""
    for kernel in kernels:
        loop = kernel.hot_loop
        assert not {"LDL", "STL", "CCTL"} & sass.count_opcodes(loop).keys(), kernel.name
        assert {text for text in loop if text.startswith("MEMBAR")} <= {"MEMBAR.ALL.CTA"}


def test_forward_hot_loop_is_one_step(forward_kernels):
    """It has as many wgmmas as the tile needs: it is the loop that the others are about."""
    for kernel, tile in forward_kernels:
        wgmmas = (tile["head_dim"] + tile["block_n"]) // 16
        assert sass.count_opcodes(kernel.hot_loop)["HGMMA"] == wgmmas, kernel.name


def test_descriptors_of_the_forward_hot_loop_are_uniform(forward_kernels):
    """Where ptxas takes a stage's number for divergent, each wgmma waits for R2UR: 8 % slower."""
    for kernel, _ in forward_kernels:
        assert "R2UR" not in sass.count_opcodes(kernel.hot_loop), kernel.name
