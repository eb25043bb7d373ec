# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a Hopper GPU, in one go: smoke test, test suite, sanitizer, benchmark.

Needs eqx_flash installed (not the source tree: that has no kernels), pytest and matplotlib. Each
stage is a process with a time limit of its own, so that a hanging kernel costs one stage. Results
go to --out, the stages' output to log.txt there; what is printed is the summary.
"""

import argparse
import contextlib
import csv
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"
HEAD_DIMS = (64, 128, 256)
GRADIENTS = ("dq", "dk", "dv")
LIMITS = {"smoke": 60, "tests": 290, "sanitize": 270, "bench": 330}  # seconds
TEST_LIMITS = {"tests": 100, "sanitize": 250}  # seconds, for one test
LOG_BYTES = 8 << 20
NO_TESTS = 5  # pytest's exit code
SHARED_GPU = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # not most of its memory for one process


class Session:
    """The output folder, the deadline, and what the summary will say."""

    def __init__(self, out: pathlib.Path, deadline: float) -> None:
        self.out = out
        self.record = pathlib.Path(tempfile.mkdtemp(prefix="eqx_flash_record_"))
        self.deadline = time.monotonic() + deadline
        self.summary: list[str] = []
        self.evidence: list[str] = []
        self.failed = False
        out.mkdir(parents=True, exist_ok=True)

    def say(self, line: str) -> None:
        self.summary.append(line)
        print(line, flush=True)
        self._write()

    def keep_evidence(self, title: str, text: str) -> None:
        """Puts into summary.txt what is too long to print."""
        self.evidence += ["", f"######## {title}", text]
        self._write()

    def _write(self) -> None:
        text = "\n".join([*self.summary, *self.evidence])
        (self.out / "summary.txt").write_text(text + "\n")

    def start(self, *command: object, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "EQX_FLASH_RECORD": str(self.record),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def finish(
        self, title: str, run: subprocess.Popen, limit: float, right: tuple[int, ...] = (0,)
    ) -> tuple[str, str]:
        """`(verdict, output)`; the output is logged, too. `right` are exit codes."""
        begin = time.monotonic()
        limit = max(5.0, min(limit, self.deadline - begin))
        verdict = ""
        try:
            output, _ = run.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            verdict = f"KILLED after {limit:.0f} s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # and its children
            output, _ = run.communicate()
        if not verdict:
            verdict = "ok" if run.returncode in right else f"FAILED (exit code {run.returncode})"
        self.failed |= verdict != "ok"
        verdict += f" [{time.monotonic() - begin:.0f} s]"
        with open(self.out / "log.txt", "a") as log:
            if log.tell() < LOG_BYTES:
                log.write(f"\n######## {title}: {verdict}\n{output}")
        return verdict, output


# ---- Stages --------------------------------------------------------------------------------------


def machine(session: Session) -> None:
    """What this runs on, and whether the package under test is the one with kernels."""
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,compute_cap,power.limit,clocks.max.sm,memory.total"
        run = session.start("nvidia-smi", query, "--format=csv,noheader")
        session.say(session.finish("nvidia-smi", run, 20)[1].strip())
    # -P: not the folder that we are in, which holds the sources.
    run = session.start(sys.executable, "-P", "-m", "eqx_flash", **SHARED_GPU)
    verdict, output = session.finish("python -m eqx_flash", run, 60)
    session.say(output.strip()[-3000:])
    session.say(f"python -m eqx_flash: {verdict}")
    if "a plain call uses flash" not in output:
        session.failed = True
        session.say("no eqx_flash with kernels is installed for this GPU: expect failures")


def smoke(session: Session) -> None:
    """All head dims at once, in a process each."""
    runs = {
        head_dim: session.start(sys.executable, GPU_TESTS / "smoke.py", head_dim, **SHARED_GPU)
        for head_dim in HEAD_DIMS
    }
    for head_dim, run in runs.items():
        verdict, output = session.finish(f"smoke {head_dim}", run, LIMITS["smoke"])
        right, wrong = output.count(" ok\n"), output.count(" WRONG\n")
        session.say(f"smoke d{head_dim}: {verdict}, {right} right, {wrong} wrong")
        if wrong or not verdict.startswith("ok"):
            session.say(output[-1500:])


def tests(session: Session, jobs: int, quick: bool, keyword: str) -> None:
    selection = "gpu and not slow" if quick else "gpu"
    some = ["-k", keyword] if keyword else []
    elsewhere = [
        f"--ignore={GPU_TESTS / f'test_{name}.py'}" for name in ("primitives", "sanitizer")
    ]
    has_xdist = importlib.util.find_spec("xdist") is not None
    parallel = ["-n", jobs, "--dist", "worksteal"] if has_xdist else []

    def start(path: pathlib.Path, selection: str, *arguments: object) -> subprocess.Popen:
        return _start_pytest(session, "tests", path, "-m", selection, *some, *arguments)

    def finish(title: str, run: subprocess.Popen) -> None:
        # A keyword may select nothing here.
        right = (0, NO_TESTS) if keyword else (0,)
        verdict, output = session.finish(title, run, LIMITS["tests"], right)
        session.say(f"{title}: {verdict}, {_last_line(output)}")
        for line in failures(output)[:25]:
            session.say(f"  {line[:220]}")

    # The primitives are compiled first, once, while the others run.
    primitives = start(GPU_TESTS / "test_primitives.py", selection)
    others = start(GPU_TESTS, f"{selection} and not large", *elsewhere, *parallel)
    finish("tests", others)
    finish("primitives", primitives)
    if not quick:
        finish("large", start(GPU_TESTS, "large", *elsewhere))
    collect_sweep(session)
    witness = session.record / "command_buffer.txt"
    if witness.exists():
        session.keep_evidence("command buffer", witness.read_text())
        session.say(f"command buffer: {witness.read_text().splitlines()[0]}")


def collect_sweep(session: Session) -> None:
    """The tests' records of cases, as one table for each pass."""
    for title, patterns, pairs in (
        ("sweep", ("sweep_*.csv", "odd_dims_*.csv"), [("max_error", "bound")]),
        ("backward", ("backward_*.csv",), [(f"{d}_error", f"{d}_bound") for d in GRADIENTS]),
    ):
        lines: list[dict[str, str]] = []
        for path in sorted(path for p in patterns for path in session.record.glob(p)):
            with open(path, newline="") as file:
                lines += csv.DictReader(file)
        if not lines:
            continue
        with open(session.out / f"{title}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        failed = [line for line in lines if line["passed"] != "True"]
        worst = max(
            float(line[error]) / max(float(line[bound]), 1e-30)
            for line in lines
            for error, bound in pairs
        )
        session.say(
            f"{title}: {len(lines)} cases, {len(failed)} failed, largest error {worst:.2f} of its "
            f"bound"
        )


def sanitize(session: Session) -> None:
    run = _start_pytest(
        session, "sanitize", GPU_TESTS / "test_sanitizer.py", "-m", "gpu", "--tb=line"
    )
    verdict, output = session.finish("sanitize", run, LIMITS["sanitize"])
    session.say(f"sanitize: {verdict}, {_last_line(output)}")
    found = session.record / "sanitizer.txt"
    if found.exists():
        session.keep_evidence("compute-sanitizer", found.read_text())
        for line in found.read_text().split("\n\n")[0].splitlines():
            session.say(f"  {line}")


def bench(session: Session, arguments: list[str]) -> None:
    limit = min(LIMITS["bench"], session.deadline - time.monotonic())
    run = session.start(
        sys.executable, ROOT / "benchmarks" / "bench.py", "--out", session.out,
        "--budget", max(10, limit - 20), *arguments,
    )  # fmt: skip
    verdict, output = session.finish("bench", run, limit)
    for line in output.splitlines():
        if "left out" in line or "out of time" in line or line.startswith("compiled"):
            session.say(f"  {line}")
    start = output.find("normal data  ")
    session.say(output[start:].strip() if start >= 0 else output[-3000:])
    session.say(f"bench: {verdict}")


def _start_pytest(session: Session, stage: str, *arguments: object) -> subprocess.Popen:
    # The package versions of this machine are not ours to choose: their warnings are no errors.
    # The suite puts the source tree on the path, for those who installed it editable; not here.
    common = [
        "-o",
        "pythonpath=cmake tools",
        "-v",  # names what has run by the time limit
        "-W",
        "default",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        "-ra",
    ]
    if importlib.util.find_spec("pytest_timeout"):  # ends a worker that hangs, not the stage
        common += ["--timeout", str(TEST_LIMITS[stage]), "--timeout-method", "thread"]
    return session.start(
        sys.executable, "-P", "-m", "pytest", *common, *arguments, **SHARED_GPU
    )  # fmt: skip


def failures(output: str) -> list[str]:
    """From the report at the end or, if the time ended before it, from the tests' own lines."""
    at_end = re.findall(r"^(?:FAILED|ERROR) .*", output, re.MULTILINE)
    return at_end or re.findall(r"(?:^\[gw\d+\].* FAILED .*|^\S+ FAILED .*)", output, re.MULTILINE)


def _last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "no output")[:200]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--stages", default="smoke,tests,sanitize,bench")
    parser.add_argument("--deadline", type=float, default=570, help="seconds for all stages")
    parser.add_argument("--jobs", type=int, default=4, help="test processes (pytest-xdist)")
    parser.add_argument("--quick", action="store_true", help="without the tests marked slow")
    parser.add_argument("-k", dest="keyword", default="", help="only tests that match, as pytest")
    args, bench_arguments = parser.parse_known_args()  # what is left goes to bench.py
    session = Session(args.out.resolve(), args.deadline)
    stages = {
        "smoke": smoke,
        "tests": lambda session: tests(session, args.jobs, args.quick, args.keyword),
        "sanitize": sanitize,
        "bench": lambda session: bench(session, bench_arguments),
    }
    machine(session)
    for stage in args.stages.split(","):
        stages[stage](session)
    sys.exit(session.failed)


if __name__ == "__main__":
    main()
