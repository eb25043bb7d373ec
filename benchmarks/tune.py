# SPDX-License-Identifier: Apache-2.0
"""Tries variants of the kernels: builds them side by side, checks and times them in one go.

`build` needs nvcc and no GPU; `run` needs a GPU and no nvcc, and the folder that `build` wrote.
`emulate` checks on the CPU what `build` would compile.

    python tune.py emulate --kernels forward-d128 --set wide=forward_tile.block_n=144
    python tune.py build --kernels forward-d128 --set wide=forward_tile.block_n=144
    python tune.py run --peers fa3,cudnn
"""

import argparse
import importlib
import pathlib
import re
import sys

import tune_build

FOLDER = tune_build.ROOT / "build" / "tune"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=pathlib.Path, default=FOLDER)
    shared.add_argument(
        "--kernels", type=words, default=[], help="words: forward-d128,d64-causal; default: all"
    )
    shared.add_argument(
        "--set", action="append", type=named, default=[], metavar="NAME=CHANGE",
        help="forward_tile.block_n=144, or kernels/forward.cuh:kDynamicTiles=true; repeat for more",
    )  # fmt: skip
    shared.add_argument(
        "--patch", action="append", type=named, default=[], metavar="NAME=FILE",
        help="the output of git diff -- csrc",
    )  # fmt: skip
    shared.add_argument(
        "--tree", action="append", type=named, default=[], metavar="NAME=FOLDER",
        help="another csrc/ to start from",
    )  # fmt: skip
    shared.add_argument(
        "--only", action="append", type=named, default=[], metavar="NAME=WORDS",
        help="the kernels that this variant concerns",
    )  # fmt: skip
    shared.add_argument("--csrc", type=pathlib.Path, default=tune_build.ROOT / "csrc")
    shared.add_argument("--jobs", type=int, default=2)

    commands.add_parser(
        "build", parents=[shared], help="compile variants and read their machine code"
    )
    commands.add_parser("emulate", parents=[shared], help="run variants on the CPU")

    run = commands.add_parser("run", help="check and time what was built")
    run.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    run.add_argument("--out", type=pathlib.Path, default=FOLDER / "results")
    run.add_argument("--variants", type=words, default=[], help="default: all")
    run.add_argument(
        "--cells", type=words, default=[], help="words: forward-d128,causal-2048; default: all"
    )
    run.add_argument("--passes", type=words, default=["forward", "backward"],
                     help="forward,backward,deterministic")  # fmt: skip
    run.add_argument("--data", type=words, default=["normal", "peaky"])
    run.add_argument("--peers", type=words, default=[], help="names that bench.py knows")
    run.add_argument("--rounds", type=int, default=5)
    run.add_argument("--batch", type=float, default=0.012, help="seconds of one measurement")
    run.add_argument("--budget", type=float, default=1e9, help="seconds, then stop early")
    run.add_argument("--check-timeout", type=float, default=40, help="seconds for one library")
    run.add_argument("--check-jobs", type=int, default=8)
    run.add_argument(
        "--unchecked",
        action="store_true",
        help="only compare variants with each other, in the shapes that are timed",
    )
    run.add_argument("--commit", help="of the installed package")
    return parser.parse_args()


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not re.fullmatch(r"[\w-]+", name) or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=..., with a name of [a-zA-Z0-9_-]")
    return name, value


def variants(args: argparse.Namespace) -> list[tune_build.Variant]:
    """In the order of the command line's kinds of change; "shipped" comes first."""
    given = [*args.tree, *args.patch, *args.set]
    names = dict.fromkeys([tune_build.SHIPPED, *(name for name, _ in given)])
    found = {name: tune_build.Variant(name, args.csrc) for name in names}
    if unknown := {name for name, _ in args.only} - names.keys():
        sys.exit(f"--only names what is no variant: {', '.join(sorted(unknown))}")
    for name, tree in args.tree:
        found[name].tree = pathlib.Path(tree)
    for name, patch in args.patch:
        found[name].patches.append(pathlib.Path(patch))
    for name, change in args.set:
        found[name].changes.append(change)
    for name, text in args.only:
        found[name].words += words(text)
    if any(name == tune_build.SHIPPED for name, _ in given):
        sys.exit(f'"{tune_build.SHIPPED}" has no changes: choose other names, or --csrc')
    return list(found.values())


def main() -> None:
    args = arguments()
    if args.command == "run":
        importlib.import_module("tune_run").run(args)  # only here and in `emulate` is JAX needed
    else:
        kernels = [k for k in tune_build.KERNELS if tune_build.matches(str(k), args.kernels)]
        if not kernels:
            sys.exit(f"no kernel matches; there are {', '.join(map(str, tune_build.KERNELS))}")
        if args.command == "build":
            entries = tune_build.build(variants(args), kernels, args.out, args.jobs)
            print(tune_build.table(entries))
        else:
            sys.path.append(str(tune_build.ROOT / "tests"))
            emulated_kernels = importlib.import_module("emulated_kernels")
            folder = args.out / "emulated"
            print(emulated_kernels.emulate(variants(args), kernels, folder, args.jobs))


if __name__ == "__main__":
    main()
