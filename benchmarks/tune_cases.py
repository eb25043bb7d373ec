# SPDX-License-Identifier: Apache-2.0
"""Small problems for one kernel, and what the tests' oracle says of its results. Part of `tune.py`.

`tests/emulated_kernels.py` has its problems judged here, too.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import tune_build
import tune_device
from tune_device import Problem

# The oracle imports eqx_flash: the installed one, else the source tree's.
sys.path += [str(tune_build.ROOT / "tests" / "gpu"), str(tune_build.ROOT)]

import gradient_oracle
import jax
import jax.numpy as jnp
import ml_dtypes
import oracle


@dataclasses.dataclass(frozen=True)
class Case:
    seq_q: int
    seq_k: int
    heads_k: int
    missing_columns: int = 0  # of the tile's head dim
    alignment: str = "bottom_right"
    query_factor: float = 1.0
    spike: float = 0.0  # added to the scores of keys 128 to 134, one in each lane of a row
    level: float = 0.0  # all scores
    has_dlse: bool = True
    launches: int = 2  # whose results must agree


@dataclasses.dataclass(frozen=True)
class Cases:
    batch: int
    heads: int
    length: int  # the longest: the oracle sees all cases padded to it, and is compiled once
    cases: tuple[Case, ...]


class Checker:
    """The cases of one head dim and mask, with what the oracle needs to judge results."""

    def __init__(
        self, head_dim: int, mask: str, folder: pathlib.Path, cases: Cases, dtype: str = "bfloat16"
    ) -> None:
        self._head_dim, self._mask, self._sizes, self._dtype = head_dim, mask, cases, dtype
        self._inputs = [self._make_inputs(case) for case in cases.cases]
        self._files = [
            folder / f"case{i}-d{head_dim}-{mask}-{dtype}.npz" for i in range(len(cases.cases))
        ]
        for path, inputs in zip(self._files, self._inputs, strict=True):
            np.savez(path, **{name: plain(array) for name, array in inputs.items()})

    def job_cases(self, pass_: str) -> list[dict[str, Any]]:
        return [
            {
                "problem": dataclasses.asdict(self.problem(case, pass_)), "inputs": str(path),
                "launches": case.launches,
            }
            for case, path in zip(self._sizes.cases, self._files, strict=True)
        ]  # fmt: skip

    def worst_error(self, pass_: str, results: dict[str, np.ndarray]) -> float:
        """In units of what is allowed, of all launches."""
        names = tune_device.OUTPUTS["forward" if pass_ == "forward" else "backward"]
        ratios = []
        for i, (case, inputs) in enumerate(zip(self._sizes.cases, self._inputs, strict=True)):
            q, k, v, *cotangents = self._padded(inputs)
            facts = self._variants(case, 1), self._scale(case), case.seq_q, case.seq_k
            seen = set()
            for arrays in zip(*(results[f"{name}{i}"] for name in names), strict=True):
                bits = b"".join(array.tobytes() for array in arrays)
                if bits in seen:
                    continue
                seen.add(bits)
                found = [
                    self._pad(name, array if name == "lse" else array.view(q.dtype))[None]
                    for name, array in zip(names, arrays, strict=True)
                ]
                if pass_ == "forward":
                    errors = oracle.measure(q, k, v, *found, *facts)
                    ratios += [errors.out / errors.bound, errors.lse / oracle.LSE_ABSOLUTE]
                else:
                    errors = gradient_oracle.measure(q, k, v, *cotangents, tuple(found), *facts)
                    ratios.append(errors.error / errors.bound)
        return max(float(jnp.max(ratio)) for ratio in ratios)

    def problem(self, case: Case, pass_: str) -> Problem:
        diagonal = 0
        if self._mask == "causal" and case.alignment == "bottom_right":
            diagonal = case.seq_k - case.seq_q
        head_dim = self._head_dim - case.missing_columns
        batch, heads = self._sizes.batch, self._sizes.heads
        return Problem(
            pass_, batch, case.seq_q, case.seq_k, heads, case.heads_k, head_dim, diagonal,
            case.has_dlse,
        )  # fmt: skip

    def _make_inputs(self, case: Case) -> dict[str, np.ndarray]:
        head_dim = self._head_dim - case.missing_columns
        batch, heads = self._sizes.batch, self._sizes.heads
        q, k, v = oracle.random_qkv(
            self._dtype, batch, case.seq_q, case.seq_k, heads, case.heads_k, head_dim
        )
        q = (q.astype(np.float32) * case.query_factor).astype(q.dtype)
        if case.spike:
            q[..., 0], k[..., 0] = 8, 0
            k[:, 128:135:2, :, 0] = case.spike / 8 / self._scale(case)
        if case.level:
            q[...] = 0
            q[..., 0], k[..., 0] = 8, case.level / 8 / self._scale(case)
        dout, dlse = gradient_oracle.random_cotangents(
            self._dtype, batch, case.seq_q, heads, head_dim
        )
        inputs = {"q": q, "k": k, "v": v, "dout": dout, "dlse": dlse * case.has_dlse}
        padded = self._padded(inputs)[:3]
        out, lse = _formula(
            *padded, self._scale(case), self._variants(case), case.seq_q, case.seq_k
        )
        out = np.asarray(out)[:, : case.seq_q, :, :head_dim].astype(q.dtype)
        return inputs | {"out": out, "lse": np.asarray(lse)[:, :, : case.seq_q]}

    def _scale(self, case: Case) -> np.float32:
        return np.float32((self._head_dim - case.missing_columns) ** -0.5)

    def _variants(self, case: Case, count: int = 0) -> oracle.Variant:
        mask = "full" if self._mask == "full" else case.alignment
        variant = oracle.Variant.of(self._sizes.heads, case.heads_k, mask, case.seq_q, case.seq_k)
        return jax.tree.map(lambda x: x[None], variant) if count else variant

    # Zeros in new rows and columns change nothing.
    def _padded(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self._pad(name, inputs[name]) for name in ("q", "k", "v", "dout", "dlse")]

    def _pad(self, name: str, array: np.ndarray) -> np.ndarray:
        batch, heads, length = self._sizes.batch, self._sizes.heads, self._sizes.length
        whole = (
            (batch, heads, length)
            if name in ("lse", "dlse")
            else (batch, length, heads, self._head_dim)
        )
        widths = [(0, n - m) for n, m in zip(whole, array.shape, strict=True)]
        return np.pad(array, widths)


_formula = jax.jit(oracle.formula)


def plain(array: np.ndarray) -> np.ndarray:
    """What npz can hold."""
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def check(job: dict[str, Any], path: str, limit: float) -> str:
    """Runs a job, written to `path`; empty, or what went wrong."""
    pathlib.Path(path).write_text(json.dumps(job))
    command = [sys.executable, tune_build.ROOT / "benchmarks" / "tune_device.py", path]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"hangs: killed after {limit:.0f} s"
    lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
    return lines[-1] if run.returncode else ""


# By kernel, variant and pass: "error", in units of what is allowed, and "problem", a text.
Checks = dict[tuple[str, str, str], dict[str, Any]]


def check_table(checks: Checks) -> str:
    lines = [f"{'pass':28s}{'variant':20s}{'error / bound':>14s}"]
    for (kernel, variant, pass_), found in checks.items():
        title = pass_ + kernel[kernel.index("-") :]
        error = "-" if found["error"] is None else f"{found['error']:.3f}"
        lines.append(f"{title:28s}{variant:20s}{error:>14s}  {found['problem'] or 'ok'}")
    return "\n".join(lines)
