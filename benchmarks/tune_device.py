# SPDX-License-Identifier: Apache-2.0
"""The libraries of `tune_build` on the GPU, through ctypes and without JAX.

As a program, `tune_device.py JOB.json` runs one of them for `tune_run` to judge: what hangs or
faults takes only its own process down.
"""

import ctypes
import dataclasses
import json
import math
import pathlib
import sys

import numpy as np

POINTERS = (
    "q", "k", "v", "out", "lse", "tile_counter", "dout", "dlse", "dq", "dk", "dv", "lse_log2",
    "dlse_minus_delta", "dq_accumulator",
)  # fmt: skip
SIZES = ("batch", "seq_q", "seq_k", "heads", "heads_k", "head_dim", "diagonal")

# The deterministic pass is the backward without an accumulator for dQ.
INPUTS = {"forward": ("q", "k", "v"), "backward": ("q", "k", "v", "out", "lse", "dout", "dlse")}
OUTPUTS = {"forward": ("out", "lse"), "backward": ("dq", "dk", "dv")}
GUARD = 4096  # bytes behind each buffer that must stay as they are


class Arguments(ctypes.Structure):
    """As in tune_arguments.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in SIZES),
        ("softmax_scale", ctypes.c_float),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    pass_: str  # forward, backward or deterministic
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    heads_k: int
    head_dim: int
    diagonal: int = 0
    has_dlse: bool = True  # without, the backward passes get null

    @property
    def kind(self) -> str:
        return "forward" if self.pass_ == "forward" else "backward"

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in INPUTS[self.kind] if self.has_dlse or name != "dlse")

    def shape(self, name: str) -> tuple[int, ...]:
        if name in ("lse", "dlse"):
            return self.batch, self.heads, self.seq_q
        if name in ("k", "v", "dk", "dv"):
            return self.batch, self.seq_k, self.heads_k, self.head_dim
        return self.batch, self.seq_q, self.heads, self.head_dim


class Library:
    """One kernel of one variant. CUDA's errors are raised."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._functions = ctypes.CDLL(str(path))
        self._functions.error_string.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments) -> None:
        if error := getattr(self._functions, name)(*arguments):
            text = self._functions.error_string(error).decode()
            raise RuntimeError(f"{name}: CUDA error {error}, {text}")

    def buffer_bytes(self, problem: Problem) -> dict[str, int]:
        """Of all buffers of the problem."""
        names = dict.fromkeys((*problem.inputs, *OUTPUTS[problem.kind]))
        found = {
            name: math.prod(problem.shape(name)) * (4 if name in ("lse", "dlse") else 2)
            for name in names
        }
        found["tile_counter"] = 4
        if problem.kind == "forward":
            return found
        row_stats, accumulator = ctypes.c_int64(), ctypes.c_int64()
        self._functions.scratch_sizes(
            ctypes.byref(_arguments(problem, {})),
            ctypes.byref(row_stats),
            ctypes.byref(accumulator),
        )
        found |= {"lse_log2": 4 * row_stats.value, "dlse_minus_delta": 4 * row_stats.value}
        if accumulator.value and problem.pass_ == "backward":
            found["dq_accumulator"] = 4 * accumulator.value
        return found

    def launch(self, arguments: Arguments) -> None:
        self._call("launch", ctypes.byref(arguments))

    def seconds(self, arguments: Arguments, launches: int) -> float:
        """The time of one, the GPU's."""
        milliseconds = ctypes.c_float()
        self._call("time_launches", ctypes.byref(arguments), launches, ctypes.byref(milliseconds))
        return milliseconds.value / 1e3 / launches

    def difference(self, actual: int, expected: int, shape: tuple[int, ...], scratch: int) -> float:
        """The largest relative difference of two rows."""
        result = ctypes.c_float()
        self._call(
            "compare", ctypes.c_void_p(actual), ctypes.c_void_p(expected),
            ctypes.c_int64(math.prod(shape[:-1])), shape[-1], ctypes.c_void_p(scratch),
            ctypes.byref(result),
        )  # fmt: skip
        return result.value

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("allocate", ctypes.byref(pointer), ctypes.c_size_t(size))
        assert pointer.value
        return pointer.value

    def copy(self, to: int, source: int, size: int) -> None:
        self._call("copy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size))

    def poison(self, pointer: int, size: int) -> None:
        self._call("poison", ctypes.c_void_p(pointer), ctypes.c_size_t(size))

    def synchronize(self) -> None:
        self._call("synchronize")


class Memory:
    """Buffers on the device by name, as large as the largest that was asked for."""

    def __init__(self, library: Library) -> None:
        self._library = library  # any: memory is the process's
        self._buffers: dict[str, tuple[int, int]] = {}

    def __getitem__(self, name: str) -> int:
        return self._buffers[name][0]

    def reserve(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            if size > self._buffers.get(name, (0, -1))[1]:
                self._buffers[name] = self._library.allocate(size + GUARD), size

    def upload(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._library.copy(self[name], array.ctypes.data, array.nbytes)

    def download(self, name: str, array: np.ndarray, offset: int = 0) -> np.ndarray:
        self._library.copy(array.ctypes.data, self[name] + offset, array.nbytes)
        return array

    def poison(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            self._library.poison(self[name], size + GUARD)

    def broken_guards(self, sizes: dict[str, int]) -> list[str]:
        guards = {n: self.download(n, np.empty(GUARD, np.uint8), size) for n, size in sizes.items()}
        return [name for name, guard in guards.items() if (guard != 0xFF).any()]


def bind(library: Library, memory: Memory, problem: Problem) -> Arguments:
    return _arguments(problem, {name: memory[name] for name in library.buffer_bytes(problem)})


def _arguments(problem: Problem, pointers: dict[str, int]) -> Arguments:
    sizes = {name: getattr(problem, name) for name in SIZES}
    return Arguments(**pointers, **sizes, softmax_scale=problem.head_dim**-0.5)


def written(library: Library, problem: Problem) -> dict[str, int]:
    """The bytes of each buffer that the kernels write."""
    sizes = library.buffer_bytes(problem)
    return {name: size for name, size in sizes.items() if name not in problem.inputs}


def run_poisoned(library: Library, memory: Memory, problem: Problem) -> None:
    """One launch, all that it writes being NaN before."""
    memory.poison(written(library, problem))
    library.launch(bind(library, memory, problem))
    library.synchronize()


# ---- A job ---------------------------------------------------------------------------------------


def run_case(
    library: Library, memory: Memory, problem: Problem, inputs, launches: int
) -> dict[str, np.ndarray]:
    """The results of all launches along a new first axis, 16-bit floats as integers."""
    sizes = library.buffer_bytes(problem)
    memory.reserve(sizes)
    for name in problem.inputs:
        memory.upload(name, inputs[name])
    types = {name: np.float32 if name == "lse" else np.uint16 for name in OUTPUTS[problem.kind]}
    results = {n: np.empty((launches, *problem.shape(n)), dtype) for n, dtype in types.items()}
    for i in range(launches):
        run_poisoned(library, memory, problem)
        if broken := memory.broken_guards(written(library, problem)):
            raise RuntimeError(f"writes behind the end of {', '.join(broken)}")
        for name, array in results.items():
            memory.download(name, array[i])
            summed_in_any_order = name == "dq" and "dq_accumulator" in sizes
            if not summed_in_any_order and array[i].tobytes() != array[0].tobytes():
                raise RuntimeError(f"{name} has other bits in launch {i}, for {problem}")
    return results


def main() -> None:
    job = json.loads(pathlib.Path(sys.argv[1]).read_text())
    library = Library(job["library"])
    memory = Memory(library)
    results = {}
    for i, case in enumerate(job["cases"]):
        with np.load(case["inputs"]) as inputs:
            problem = Problem(**case["problem"])
            found = run_case(library, memory, problem, inputs, case["launches"])
        results |= {f"{name}{i}": array for name, array in found.items()}
    np.savez(job["results"], **results)
    # The shapes that will be timed, with any numbers: only whether they end.
    for cell in job["cells"]:
        problem = Problem(**cell)
        memory.reserve(library.buffer_bytes(problem))
        for name in problem.inputs:
            if name in ("lse", "dlse"):
                memory.upload(name, np.zeros(problem.shape(name), np.float32))
            else:
                memory.upload(name, np.load(job["data"], mmap_mode="r"))
        run_poisoned(library, memory, problem)
        if broken := memory.broken_guards(written(library, problem)):
            raise RuntimeError(f"writes behind the end of {', '.join(broken)} for {problem}")


if __name__ == "__main__":
    main()
