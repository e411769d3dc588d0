"""Turn what `low_bits.py` left in a folder into a Markdown table, a plot of bits against accuracy, and curves.

    python examples/low_bits_table.py FOLDER --out examples/results
    python examples/low_bits_table.py --table examples/results/low_bits.md        # the plot alone, of a table

Writes low_bits.md, low_bits.png and low_bits_curves.png. Means and standard deviations are over seeds.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

ORDER = ("8", "4", "3", "2", "1", "k-means 32")
PLACES = {bits: place for place, bits in enumerate(ORDER[:5])}  # of bits, from left to right
Groups = dict[tuple[str, str], list[dict[str, Any]]]


def grouped(folder: Path) -> Groups:
    """Read the runs, by task and bits, those of more bits first."""
    groups: Groups = defaultdict(list)
    for path in sorted(path for path in folder.glob("*.json") if "-float-" not in path.name):
        result = json.loads(path.read_text())
        groups[result["task"], result["bits"]].append(result)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], ORDER.index(item[0][1]))))


def percent(values: Sequence[float]) -> str:
    return f"{100 * mean(values):.2f} ± {100 * pstdev(values):.2f}"


def table(groups: Groups, command: str) -> str:
    """Return the table, with what was used."""
    first = next(iter(groups.values()))[0]
    lines = [
        "# Few bits, trained",
        "",
        f"`{command}`, then `python examples/low_bits_table.py FOLDER`.",
        "",
        f"jaxq {first['jaxq']}, JAX {first['jax']}, {first['device']}; test accuracy in percent, mean and standard "
        "deviation over seeds; points: quantized less float, the mean over seeds. Served logits are those of training "
        "bit for bit in every run, or the run fails.",
        "",
        "| task | bits | parameters | epochs, float + QAT | seeds | float | quantized | points |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for (task, bits), results in groups.items():
        before, after = ([r[key] for r in results] for key in ("float", "quantized"))
        points = 100 * mean(b - a for a, b in zip(before, after, strict=True))
        seeds = ", ".join(str(r["seed"]) for r in results)
        epochs = " + ".join(map(str, results[0]["epochs"]))
        cells = (
            task,
            bits,
            f"{results[0]['parameters']:,}",
            epochs,
            seeds,
            percent(before),
            percent(after),
            f"{points:+.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


class Row(NamedTuple):
    """A line of the table: percent, mean and standard deviation over seeds."""

    task: str
    bits: str
    float: tuple[float, float]
    quantized: tuple[float, float]


def rows_of(text: str) -> list[Row]:
    """Return the lines of a table of trained models; of lines of the same task and bits the last one."""
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "±" in line]
    found = {}
    for task, bits, *_, before, after, _ in lines:
        numbers = (tuple(float(number) for number in cell.split("±")) for cell in (before, after))
        found[task, bits] = Row(task, bits, *numbers)
    return list(found.values())


def pyplot() -> Any:
    """Return matplotlib's, which draws into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_bits(rows: Sequence[Row], out: Path) -> None:
    """Draw accuracy against bits, a panel for each task, the float model dotted."""
    plt = pyplot()
    tasks = list(dict.fromkeys(row.task for row in rows if row.bits in PLACES))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(2.4 * len(tasks), 2.8), layout="constrained", squeeze=False, sharex=True
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        own = [row for row in rows if row.task == task and row.bits in PLACES]
        means, spread = zip(*(row.quantized for row in own), strict=True)
        axis.errorbar([PLACES[row.bits] for row in own], means, spread, marker="o", capsize=3)
        for row in own:
            axis.axhline(row.float[0], ls=":", lw=1, color="gray")
        axis.set_xticks(list(PLACES.values()), list(PLACES))
        axis.set_title(task, fontsize=9)
    axes[0, 0].set_ylabel("test accuracy, %")
    figure.supxlabel("bits of weights and activations (dotted: float)", fontsize=9)
    figure.savefig(out / "low_bits.png", dpi=120)
    plt.close(figure)


def draw_curves(groups: Groups, out: Path) -> None:
    """Draw accuracy against epochs."""
    plt = pyplot()
    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), layout="constrained", squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        for (name, bits), results in groups.items():
            if name == task:
                curves = [r["curve"] if bits == "1" else r["float_curve"] + r["curve"] for r in results]
                values = [100 * mean(column) for column in zip(*curves, strict=True)]
                axis.plot(
                    range(1, len(values) + 1), values, marker=".", label=f"{bits} bits" if bits.isdigit() else bits
                )
        axis.set(title=task, xlabel="epoch", ylabel="test accuracy, %")
        axis.legend(fontsize=8)
    figure.savefig(out / "low_bits_curves.png", dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the table and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, metavar="FILE", help="draw the accuracies of a table, in its folder")
    parser.add_argument("--out", type=Path, default=Path("examples/results"))
    parser.add_argument(
        "--command", default="python examples/low_bits.py --out FOLDER", help="to be named in the table"
    )
    options = parser.parse_args(argv)
    if (options.folder is None) == (options.table is None):
        parser.error("name a FOLDER of runs or a --table, one of the two")
    if options.table:
        rows = rows_of(options.table.read_text())
        if not rows:
            parser.error(f"no lines of trained models in {options.table}")
        draw_bits(rows, options.table.parent)
        return
    groups = grouped(options.folder)
    if not groups:
        parser.error(f"no runs (*.json) in {options.folder}")
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(groups, options.command)
    (options.out / "low_bits.md").write_text(text)
    print(text)
    draw_bits(rows_of(text), options.out)
    draw_curves(groups, options.out)


if __name__ == "__main__":
    main()
