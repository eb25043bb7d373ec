# SPDX-License-Identifier: Apache-2.0
"""Measurements to tables and figures. `python report.py results/*/bench.json` does it again."""

import argparse
import csv
import json
import math
import pathlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

OURS = "eqx_flash"
DETERMINISTIC = "eqx_flash deterministic"
THERMOMETER = "matmul 8192"  # not a competitor: says how fast the machine is at the moment
PASSES = {"fwd": "forward", "bwd": "backward"}
LABELS = {OURS: "ours", DETERMINISTIC: "det.", "fa3": "FA3", "cudnn": "cuDNN", "mosaic": "Mosaic"}

Row = dict[str, Any]  # one measurement: the fields of bench.rows_of


class Cell(NamedTuple):
    data: str
    pass_: str
    head_dim: int
    mask: str
    seq: int

    def __str__(self) -> str:
        return f"{self.pass_} d{self.head_dim} {self.mask} {self.seq}"


def by_cell(rows: Iterable[Row]) -> dict[Cell, dict[str, Row]]:
    cells: dict[Cell, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cell = Cell(row["data"], row["pass"], row["head_dim"], row["mask"], row["seq"])
        cells[cell][row["implementation"]] = row
    return dict(cells)


def competitors(rows: Iterable[Row]) -> list[str]:
    present = {row["implementation"] for row in rows} - {OURS}
    return [name for name in LABELS if name in present]


def ratios(cells: dict[Cell, dict[str, Row]], peer: str | None = None) -> dict[Cell, float]:
    """Our speed over a peer's, or over the best peer's, in each cell that has both."""
    found = {}
    for cell, rows in cells.items():
        rivals = [
            row["tflops"]
            for name, row in rows.items()
            if (name == peer if peer else name not in (OURS, DETERMINISTIC, THERMOMETER))
        ]
        if OURS in rows and rivals:
            found[cell] = rows[OURS]["tflops"] / max(rivals)
    return found


def geometric_mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(rows: list[Row]) -> str:
    """TFLOP/s and ratios by cell, then what they come to."""
    cells, peers = by_cell(rows), competitors(rows)
    to_best, to_cudnn = ratios(cells), ratios(cells, "cudnn")
    columns = [*(LABELS[name] for name in (OURS, *peers)), "/cuDNN", "/best", "matmul", "MHz", "W"]
    lines = []
    for data in dict.fromkeys(cell.data for cell in cells):
        lines.append(f"{data + ' data':24s}" + "".join(f"{name:>8s}" for name in columns))
        for cell, found in cells.items():
            if cell.data != data:
                continue
            speeds = {name: row["tflops"] for name, row in found.items()}
            state = next(iter(found.values()))  # the same for all
            lines.append(
                f"{cell!s:24s}"
                + "".join(_number(speeds.get(name), "8.0f") for name in (OURS, *peers))
                + "".join(_number(x.get(cell), "8.3f") for x in (to_cudnn, to_best))
                + _number(speeds.get(THERMOMETER), "8.0f")
                + "".join(_number(state.get(k), "8.0f") for k in ("clock_mhz", "power_w"))
            )
        lines.append("")
    return "\n".join([*lines, summary(rows)])


def summary(rows: list[Row]) -> str:
    """Wins and geometric means, for each kind of data and for all."""
    cells = by_cell(rows)
    rivals: dict[str, str | None] = {"the best peer": None}
    rivals |= {LABELS[peer]: peer for peer in competitors(rows)}
    lines = []
    for pass_, data in dict.fromkeys((cell.pass_, cell.data) for cell in cells):
        for label, peer in rivals.items():
            found = ratios(cells, peer).items()
            values = [x for cell, x in found if (cell.pass_, cell.data) == (pass_, data)]
            if not values:
                continue
            wins, lowest = sum(x >= 1 for x in values), min(values, default=math.nan)
            lines.append(
                f"{pass_} on {data} data, ours over {label}: {wins} of {len(values)} cells won, "
                f"geometric mean {geometric_mean(values):.3f}, lowest {lowest:.3f}"
            )
    return "\n".join(lines)


def _number(x: float | None, spec: str) -> str:
    return format(x, spec) if x is not None else " " * 7 + "-"


def write(folder: pathlib.Path, environment: dict[str, Any], rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment, "rows": rows}
    (folder / "bench.json").write_text(json.dumps(content, indent=1) + "\n")
    if rows:
        with open(folder / "bench.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def plot(path: pathlib.Path, environment: dict[str, Any], rows: list[Row]) -> None:
    """A figure for each pass at `path` + "_fwd.png", "_bwd.png"."""
    for pass_ in dict.fromkeys(row["pass"] for row in rows):
        found = [row for row in rows if row["pass"] == pass_]
        _plot_pass(path.with_name(f"{path.stem}_{pass_}.png"), pass_, environment, found)


def _plot_pass(path: pathlib.Path, pass_: str, environment: dict[str, Any], rows: list[Row]):
    """A panel for each mask (row) and head dim (column); bars by sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by_cell(rows)
    head_dims = sorted({cell.head_dim for cell in cells})
    lines = list(dict.fromkeys((cell.data, cell.mask) for cell in cells))
    series = [OURS, *competitors(rows)]
    colours = dict(
        zip(series, ["#d1495b", "#30638e", "#7aa95c", "#edae49", "#8d8d8d"], strict=False)
    )
    figure, axes = plt.subplots(
        len(lines), len(head_dims), figsize=(4.2 * len(head_dims), 2.5 * len(lines)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for (data, mask), axes_of_line in zip(lines, axes, strict=True):
        for head_dim, axis in zip(head_dims, axes_of_line, strict=True):
            panel = {c.seq: found for c, found in cells.items()
                     if (c.data, c.mask, c.head_dim) == (data, mask, head_dim)}  # fmt: skip
            for i, name in enumerate(series):
                width = 0.8 / len(series)
                heights = [found.get(name, {}).get("tflops", math.nan) for found in panel.values()]
                places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(panel))]
                axis.bar(places, heights, width, label=LABELS.get(name, name), color=colours[name])
            axis.set_xticks(range(len(panel)), [f"{n // 1024}k" if n >= 1024 else n for n in panel])
            axis.set_title(f"head dim {head_dim}, {mask}, {data} data", fontsize=9)
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        axes_of_line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"Attention {PASSES[pass_]}, bf16, 16k tokens, {environment.get('gpu', 'no GPU')}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "json", type=pathlib.Path, nargs="+", help="later files fill in cells that the first lacks"
    )
    paths = parser.parse_args().json
    contents = [json.loads(path.read_text()) for path in paths]
    rows: list[Row] = []
    for content in contents:
        present = set(by_cell(rows))
        rows += [row for cell, found in by_cell(content["rows"]).items() if cell not in present
                 for row in found.values()]  # fmt: skip
    print(table(rows))
    plot(paths[0].with_suffix(".png"), contents[0]["environment"], rows)


if __name__ == "__main__":
    main()
