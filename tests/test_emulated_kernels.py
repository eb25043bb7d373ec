# SPDX-License-Identifier: Apache-2.0
"""The kernels on a CPU, by the emulator in tests/emulator, and whether it notices broken ones."""

import dataclasses
import os
import pathlib
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import emulated_kernels
import numpy as np
import pytest
from common import quick_compilation
from emulated_kernels import Case, Cases, Checker, Kernel
from emulator import translate

CSRC = emulated_kernels.ROOT / "csrc"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A mistake: what stands once in a file is replaced."""

    name: str
    file: str
    text: str
    replacement: str = ";  //"  # and what is left of the line is a comment
    message: str = ""  # a pattern; none: the results may be wrong instead
    mask: str = "full"  # and the case, which show it
    case: int = 0
    more_cases: tuple[Case, ...] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    pass_: str  # forward, backward or deterministic
    head_dim: int
    mask: str
    dtype: str = "bfloat16"
    mutation: Mutation | None = None
    more_cases: tuple[Case, ...] = ()

    def __str__(self) -> str:
        name = f"{self.pass_}-d{self.head_dim}-{self.mask}-{self.dtype}"
        return f"{self.mutation.name.replace(' ', '_')}-{name}" if self.mutation else name

    @property
    def kernel(self) -> Kernel:
        kind = "forward" if self.pass_ == "forward" else "backward"
        return Kernel(kind, self.head_dim, self.mask)

    @property
    def library(self) -> tuple[Kernel, str, Mutation | None]:
        return self.kernel, self.dtype, self.mutation

    @property
    def cases(self) -> Cases:
        cases = emulated_kernels.small_cases(self.head_dim)
        kept = cases.cases
        if self.mutation:
            case = cases.cases[self.mutation.case]
            kept = (dataclasses.replace(case, launches=emulated_kernels.EIGHT),)
        return dataclasses.replace(cases, cases=kept + self.more_cases)


@dataclasses.dataclass
class Outcome:
    problem: str  # empty: none
    results: dict[str, np.ndarray]
    checker: Checker
    pass_: str

    @property
    def worst_error(self) -> float:
        with quick_compilation():
            return self.checker.worst_error(self.pass_, self.results)


@pytest.fixture(scope="module")
def outcome_of(request, tmp_path_factory):
    """Gives what came of a run. Those of all selected tests start at once."""
    if sys.platform != "linux" or not shutil.which("c++"):
        pytest.skip("needs Linux and a C++ compiler")
    folder = tmp_path_factory.mktemp("emulated")
    try:
        headers = emulated_kernels.cuda_headers(folder)
    except SystemExit:
        pytest.skip("no CUDA headers: neither a toolkit nor NVIDIA's wheels are installed")
    runs = [
        item.callspec.params["run"]
        for item in request.session.items
        if item.module is request.module and "run" in getattr(item, "fixturenames", ())
    ]
    libraries, checkers, jobs = {}, {}, {}
    pool = ThreadPoolExecutor(os.cpu_count())  # first in, first out: a library before its runs
    for run in dict.fromkeys(runs):
        key = run.head_dim, run.mask, run.dtype, run.cases
        if key not in checkers:
            with quick_compilation():
                checkers[key] = Checker(
                    run.head_dim, run.mask, tmp_path_factory.mktemp("inputs"), run.cases, run.dtype
                )
        if run.library not in libraries:
            where = folder / str(len(libraries))
            libraries[run.library] = pool.submit(compiled, *run.library, where, headers)
        jobs[run] = pool.submit(outcome, run, libraries[run.library], checkers[key])
    yield lambda run: jobs[run].result()
    pool.shutdown(cancel_futures=True)


def compiled(
    kernel: Kernel, dtype: str, mutation: Mutation | None, folder: pathlib.Path,
    headers: list[str],
) -> pathlib.Path:  # fmt: skip
    csrc = folder / "changed"
    shutil.copytree(CSRC, csrc)
    if mutation:
        path = csrc / mutation.file
        text = path.read_text()
        found = text.count(mutation.text)
        assert found == 1, f"update the mutation: {found} times in {mutation.file}"
        path.write_text(text.replace(mutation.text, mutation.replacement))
    return emulated_kernels.compile_kernel(csrc, kernel, dtype, folder / "built", headers)


def outcome(run: Run, library: Future[pathlib.Path], checker: Checker) -> Outcome:
    problem, path = emulated_kernels.run_library(library.result(), run.pass_, checker)
    if problem:
        return Outcome(problem, {}, checker, run.pass_)
    with np.load(path) as results:
        return Outcome("", dict(results), checker, run.pass_)


# ---- The kernels ---------------------------------------------------------------------------------

KERNELS = [
    *(
        Run(pass_, head_dim, mask)
        for head_dim in (64, 128, 256)
        for pass_ in ("forward", "backward", "deterministic")
        for mask in ("full", "causal")
        if (pass_, head_dim) != ("backward", 256)  # there is but the deterministic one
    ),
    Run("forward", 128, "causal", "float16"),
    Run("backward", 64, "full", "float16"),
    Run("deterministic", 128, "causal", "float16"),
]


@pytest.mark.parametrize("run", KERNELS, ids=str)
def test_kernel_computes_attention(run, outcome_of):
    """By the oracle's measure, and the same bits in any order of events; only dQ of the fused
    kernels is summed as it comes."""
    found = outcome_of(run)
    assert not found.problem
    assert found.worst_error <= 1


@pytest.mark.parametrize(
    "run", [run for run in KERNELS if run.mask == "causal" and run.dtype == "bfloat16"], ids=str
)
def test_rows_that_see_nothing(run, outcome_of):
    """Of 260 queries and 130 keys, aligned at the end, the first 130."""
    results = outcome_of(run).results
    if run.pass_ == "forward":
        assert (results["lse1"][..., :130] == -np.inf).all()
        assert np.isfinite(results["lse1"][..., 130:]).all()
    gradient_or_output = results["out1" if run.pass_ == "forward" else "dq1"]
    assert not (gradient_or_output[:, :, :130] & 0x7FFF).any()
    assert (gradient_or_output[:, :, 131:] & 0x7FFF).any(axis=-1).all()


# Scores whose maximum rises a little, by more than 30 log2, and by what overflows, within a tile.
RISING = tuple(Case(70, 300, 1, query_factor=factor) for factor in (6.0, 30.0, 400.0))
# By what fits into the sum of a lane, but not into that of the four lanes of a row.
AT_THE_LIMIT = tuple(Case(200, 300, 1, spike=spike) for spike in (88.0, 90.0))

LAZY = [
    Run("forward", head_dim, mask, more_cases=RISING + AT_THE_LIMIT)
    for head_dim, mask in ((64, "full"), (64, "causal"), (128, "causal"), (256, "full"))
]


@pytest.mark.parametrize("run", LAZY, ids=str)
def test_scores_that_rise_within_a_tile(run, outcome_of):
    """The maximum of a row is not looked for in every block."""
    found = outcome_of(run)
    assert not found.problem
    assert found.worst_error <= 1


# Equal scores have nothing that 16 bits would round; the log-sum-exp is far from zero.
FAR = (Case(70, 256, 1, level=4096.0), Case(70, 256, 1, level=-4096.0))

FAR_FROM_ZERO = [
    Run("backward", 64, "full", more_cases=FAR + RISING),
    Run("backward", 128, "causal", more_cases=FAR + RISING),
    Run("deterministic", 256, "full", more_cases=FAR + RISING),
]


@pytest.mark.parametrize("run", FAR_FROM_ZERO, ids=str)
def test_gradients_far_from_zero(run, outcome_of):
    """S starts from -lse / scale, with all bits of a float."""
    found = outcome_of(run)
    assert not found.problem
    assert found.worst_error <= 1


# ---- The emulator --------------------------------------------------------------------------------

FORWARD, KEYS, STEPS, DKDV, DQ, FUSED = (
    f"kernels/{x}.cuh"
    for x in (
        "forward", "backward_keys", "backward_steps", "backward_dkdv", "backward_dq",
        "backward_fused",
    )
)  # fmt: skip

MUTATIONS = {
    ("forward", 64): (
        Mutation("S is not waited for", FORWARD, "sm90::wgmma_wait<1>();  // S(n) is done"),
        Mutation("V is not waited for", FORWARD, "smem.v.wait_full(v_at);  // V(n-1) has landed"),
        Mutation("a full stage is refilled", FORWARD, "ring.wait_empty(at);"),
        Mutation("O is stored before it is written", FORWARD, "sync_slab();  // the slab is"),
        Mutation(
            "O is written before the last one left", FORWARD,
            "if (thread == 0) sm90::tma_store_wait_read();  // the previous tile's",
        ),
        Mutation(
            "a block ends before its store", FORWARD,
            "if (thread == 0) sm90::tma_store_wait_read();  // shared memory must outlive",
            message=r"a bulk store outlives its block's shared memory; block 0, seed \d",
        ),
        Mutation(
            "a lane has not read what another releases", FORWARD,
            "__syncwarp();                       // every lane has read it", case=1,
        ),
        Mutation(
            "a release is missing", FORWARD,
            "smem.tile.empty(SlotCursor::after(index).stage).arrive_if(elected);",
            message=r"deadlock; warp 0 \(lanes: 1\) waits for phase 0 of the mbarrier at \d+ at "
            r"kernels/scheduler.cuh:\d+; .*; warp 4 \(lanes: 32\) waits for",
        ),
        Mutation(
            "one release too many", FORWARD,
            "smem.tile.empty(SlotCursor::after(index).stage).arrive_if(elected);",
            "smem.tile.empty(SlotCursor::after(index).stage).arrive();",
        ),
        Mutation("no fence in the epilogue", "kernels/epilogue.cuh", "sm90::fence_async_proxy();"),
        Mutation(
            "no fence before wgmma", "sm90/wgmma.cuh",
            'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', "",
            message="a wgmma without wgmma.fence",
        ),
        Mutation(
            "no fence after mbarriers", "sm90/barrier.cuh",
            'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");',
            message="no mbarrier is initialised, and fenced",
        ),
        Mutation(
            "a turn is left out", FORWARD, "wait_turn();\n      pass_turn();\n    };",
            "};", mask="causal", message="deadlock",
        ),
        Mutation(
            "scores computed anew are not masked", FORWARD,
            "if constexpr (kMasked) mask_scores(reader);", mask="causal", more_cases=RISING,
        ),
        Mutation(
            "four lanes overflow together", "kernels/lazy_softmax.cuh", "FLT_MAX / 8", "FLT_MAX",
            more_cases=AT_THE_LIMIT,
        ),
    ),
    ("forward", 128): (
        Mutation(
            "keys are loaded for a tile that is not decided on", FORWARD,
            "smem.tile.wait_full(slot_at);  // the tile has been decided",
        ),
        Mutation(
            "Q is given back while ldmatrix may read it", FORWARD,
            "sm90::load_operand<QSlab>(rQ, my_q.buffer(q_at.stage), thread);",
            "sm90::load_operand<QSlab>(rQ, my_q.buffer(q_at.stage), thread),\n"
            "my_q.empty(q_at.stage).arrive_if(elected);",
            message="a copy overwrites what ldmatrix may not have read yet",
        ),
    ),
    ("forward", 256): (
        Mutation(
            "a warpgroup without rows keeps Q", FORWARD,
            "my_q.empty(q_at.stage).arrive_if(elected);  // at once", message="deadlock",
        ),
        Mutation("O is read early", FORWARD, "sm90::wgmma_wait<0>();  // the last O"),
    ),
    ("backward", 64): (
        Mutation("S is not waited for", STEPS, "sm90::wgmma_wait<2>();  // S(i)"),
        Mutation("dP is not waited for", STEPS, "sm90::wgmma_wait<1>();  // dP(0)"),
        Mutation("Q is released early", STEPS, "sm90::wgmma_wait<1>();  // dP(i), dK(i-1)"),
        Mutation("dS is overwritten", FUSED, "ring.wait_empty(cursor);"),
        Mutation("dK overwrites K", FUSED, "smem.keys_read.wait(tile_index % 2);"),
        Mutation("keys overwrite gradients", FUSED, "sm90::tma_store_wait_read();\n          //"),
        Mutation("no fence after dS", FUSED, "sm90::fence_async_proxy();"),
        Mutation("queries overwrite queries", KEYS, "from.ring.wait_empty(cursor);"),
        Mutation(
            "S starts from 16 bits", "sm90/start_tile.cuh", "x - high - middle, 0.f", "0.f, 0.f",
            more_cases=FAR,
        ),
        Mutation(
            "a start is infinite", "sm90/start_tile.cuh",
            "split(first < -kMost ? -kMost : first > kMost ? kMost : first)", "split(first)",
        ),
        Mutation(
            "nothing lies behind the ones", KEYS, "smem.origin + Smem::kOnes",
            "smem.origin + (Smem::kBytes - Starts::kOnesBytes)", message="access to 2048 bytes",
        ),
        Mutation("starts overwrite starts", KEYS, "smem.q.wait_empty(cursor);"),
        Mutation(
            "no fence after the starts", KEYS, "sm90::fence_async_proxy();\n      smem", "smem"
        ),
        Mutation(
            "no fence after the ones", KEYS,
            "threadIdx.x);\n      sm90::fence_async_proxy();", "threadIdx.x);",
        ),
    ),
    ("backward", 128): (
        Mutation(
            "S is not waited for", STEPS,
            "sm90::wgmma_wait<1>();  // S(i)\n      me.probabilities(rS, m_block);\n"
            "      sm90::wgmma_wait<0>();  // dK",
            "me.probabilities(rS, m_block);\n      sm90::wgmma_wait<0>();  // dK",
        ),
        Mutation("dS overwrites P", STEPS, "sm90::wgmma_wait<0>();  // dP, dV"),
        Mutation("dP is added to P", STEPS, "me.at.steps < 0", "true"),
        Mutation(
            "a slot is not released", FUSED,
            "smem.tile.empty(slot_at.stage).arrive();  // the slot may",
            message="deadlock; warp 0 .* waits for",
        ),
    ),
    ("deterministic", 64): (
        Mutation(
            "more registers than there are", DKDV,
            "<kBackwardProducerRegisters>", "<kBackwardProducerRegisters + 8>",
            message=r"deadlock; .* waits for registers",
        ),
        Mutation("K is released early", DQ, "sm90::wgmma_wait<1>();  // dQ"),
    ),
    ("deterministic", 128): (
        Mutation("dP is not waited for", STEPS, "sm90::wgmma_wait<0>();  // dP\n"),
    ),
    ("deterministic", 256): (
        Mutation("P is not waited for", DKDV, "smem.probabilities.wait_full(slot);"),
    ),
}  # fmt: skip
MUTATED = [
    Run(pass_, head_dim, mutation.mask, mutation=mutation, more_cases=mutation.more_cases)
    for (pass_, head_dim), mutations in MUTATIONS.items()
    for mutation in mutations
]


@pytest.mark.parametrize("run", MUTATED, ids=str)
def test_mistakes_are_noticed(run, outcome_of):
    found = outcome_of(run)
    if run.mutation.message:
        assert re.search(run.mutation.message, found.problem)
    else:
        assert found.problem or found.worst_error > 1


# ---- The translation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, expected",
    [
        (
            'asm("mov.b64 %0, {%1, %2};" : "=l"(pair) : "r"(low), "n"(kHigh | f(1, 2)));',
            "::emulator::ptx::mov_b64(pair, low, kHigh | f(1, 2));",
        ),
        (  # operands in the order of the instruction, not of the list
            'asm volatile("a.b::c [%1], %0, %1;" ::"r"(x), "l"(&y) : "memory");',
            "::emulator::ptx::a_b_c(&y, x, &y);",
        ),
        (
            'asm("st.shared.b32 [%0 + 16], %1;" ::"r"(at), "r"(x));',
            "::emulator::ptx::st_shared_b32(at + 16, x);",
        ),
        (
            'asm("{.reg .pred P; setp.ne.b32 P, %1, 0; @P bar.arrive [%0];}" ::"r"(a), "r"(p));',
            "::emulator::ptx::bar_arrive_if(p, a);",
        ),
        (
            'asm("{\\n"\n"AGAIN: bar.try P, [%0];\\n"\n"@P bra.uni AGAIN; }" ::"r"(a));',
            "::emulator::ptx::bar_try(a)\n\n;",  # lines stay where they are
        ),
        ('asm volatile("" : "+f"(x)::"memory");', "static_cast<void>(0);"),
        (
            "run<T, f(1)>\n    <<<n, 2, 0, s>>>(a);",
            "::emulator::launch(run<T, f(1)>, n, 2, 0, s)(a);",
        ),
    ],
)  # fmt: skip
def test_translation(source, expected):
    assert translate.translate(source) == expected


@pytest.mark.parametrize(
    "source, message",
    [
        ('asm("nonsense");', "expected one instruction, found 0"),
        ('asm("a.b %0; c.d %0;" ::"r"(x));', "expected one instruction, found 2"),
        ('asm("a.b %0;" : [name] "=r"(x));', "not all of .* are operands"),
    ],
)
def test_unknown_assembly(source, message):
    with pytest.raises(ValueError, match=message):
        translate.translate(source)


def test_calls_are_noted():
    source = "EQX_DEVICE void f();\nEQX_DEVICE void f(int (&x)[g(1)]) const { h(x); }\n"
    place = "::emulator::Place place = ::emulator::Place::current()"
    assert translate.note_calls(source) == source.replace(
        "[g(1)]) const {", f"[g(1)], {place}) const {{ ::emulator::note_call(place);"
    )
