"""Run trained models in integers alone, from the codes of their inputs to the logits: no float operation in between.

    python examples/integer_only.py                                    # digits, a CNN and an LSTM, half a minute
    python examples/integer_only.py --task resnet20,rows --data DIR --models FOLDER --out examples/results
    python examples/integer_only.py --task mobilenet --data DIR --epochs 3 --qat-epochs 1

The models are those of `low_bits.py`, trained in float; `--models` is a folder that it left them in, and what is not
there is trained. Static ranges come from the first images of the training set, and nothing is learned after that, or,
with `--qat-epochs`, weights and BatchNorm are trained further with these ranges in force. It ends in a table of three
programs for each model, in float, of the plan with float between its sites (`jaxq.quantize`), and in integers
(`jaxq.integer`): accuracy, on how many images the last two agree, and latency.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jaxq
from low_bits import SAMPLES, TASKS, Data, Run, accuracy, bytes_of, float_model, logits_of, real, trainers
from train_qat import median_seconds

BATCH, TRAINED = 64, 128  # images at a time, when served and when trained
POLICY = jaxq.w8a8(static=True, symmetric=False)


class Result(NamedTuple):
    """Of the program in float, of that with float between its sites, and of that in integers: accuracies from 0 to 1,
    seconds of a batch. epochs: in float and of QAT; agreement: of the last two."""

    task: str
    epochs: tuple[int, int]
    accuracies: tuple[float, ...]
    agreement: float
    seconds: tuple[float, ...]


def compare(task: str, data: Data, epochs: tuple[int, int], models: Path | None) -> Result:
    """Return what a task's model does in float, with floats between its sites, and in integers."""
    trainer, after, _ = trainers(task, "8", len(data.train_x) // TRAINED, (*epochs, TRAINED))
    keys = jax.random.split(jax.random.key(0), 3)
    variables, _ = float_model(trainer, Run(task, "8", 0), data, keys, models)
    samples = real(data.train_x[:SAMPLES])
    plan, trained = jaxq.calibrate(trainer.predict, POLICY)(variables, [samples]), variables
    if epochs[1]:
        _, trained, _ = after.train(plan, variables, data, keys[2])
    converted = jaxq.convert(trainer.predict, plan)(trained, samples)
    integers = jaxq.integer(trainer.predict, plan)(converted, samples)
    programs = [
        (jax.jit(trainer.predict), variables),
        (jax.jit(jaxq.quantize(trainer.predict, plan)), converted),
        (jax.jit(lambda _, x: integers(x)), None),
    ]
    logits = [logits_of(*program, data) for program in programs]
    return Result(
        task,
        epochs,
        tuple(accuracy(out, data) for out in logits),
        float(np.mean(logits[1].argmax(-1) == logits[2].argmax(-1))),
        tuple(median_seconds(programs, samples[:BATCH])),
    )


HEADER = (
    "| task | epochs, float + QAT | float | int8, float between | integers alone | points | agree "
    "| float ms | int8 ms | integers ms |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row(result: Result) -> str:
    """Return a line of the table."""
    floats, imitated, integers = (100 * a for a in result.accuracies)
    times = " | ".join(f"{1e3 * t:.2f}" for t in result.seconds)
    return (
        f"| {result.task} | {result.epochs[0]} + {result.epochs[1]} | {floats:.2f} | {imitated:.2f} "
        f"| {integers:.2f} | {integers - floats:+.2f} | {100 * result.agreement:.2f} | {times} |"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--task", default="digits,digits_rows", help=f"some of {','.join(TASKS)}; default: digits,digits_rows")
    option("--data", type=Path, metavar="DIR", help="folder with the files of the datasets; not needed for digits")
    option("--models", type=Path, metavar="FOLDER", help="where float models are, or are left")
    option("--epochs", type=int, default=6, metavar="N", help="of training in float; default: 6")
    option("--qat-epochs", type=int, default=0, metavar="N", help="of training with the ranges in force; default: 0")
    option("--out", type=Path, metavar="FOLDER", help="where integer_only.md is written")
    return parser


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Compare the models that the command line asks for, print the table, and return it."""
    options = parser().parse_args(argv)
    tasks = options.task.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser().error(f"--task: no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    data = {name: bytes_of(name, options.data) for name in dict.fromkeys(TASKS[task].dataset for task in tasks)}
    epochs = options.epochs, options.qat_epochs
    results = [compare(task, data[TASKS[task].dataset], epochs, options.models) for task in tasks]
    lines = [
        f"jaxq {jaxq.__version__}, JAX {jax.__version__}, {jax.devices()[0].device_kind}; accuracy on the test set and "
        f"agreement in percent, points: integers alone less float; times of {BATCH} images, medians, in turns.",
        "",
        HEADER,
        *map(row, results),
    ]
    print("\n".join(lines))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        title = f"# Integers alone, after training\n\n`python examples/integer_only.py --task {options.task} "
        more = f"--epochs {epochs[0]} --qat-epochs {epochs[1]} --data DIR --models FOLDER --out examples/results"
        command = f"{title}{more}`\n\n"
        (options.out / "integer_only.md").write_text(command + "\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    main()
