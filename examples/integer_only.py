"""Run trained models in integers alone, from the quantized input to the logits, and compare them with their floats.

    python examples/integer_only.py --task digits                       # trains a small float model first
    python examples/integer_only.py --task resnet20,rows --data DIR --models FOLDER --out examples/results

Post-training: static ranges from the first images of the training set, nothing else is learned. `--models` is a folder
that `low_bits.py --out FOLDER` left its float models in; what is not there is trained. For each model: accuracy in
float, in int8 with float between the products (`jaxq.quantize`), and in integers alone (`jaxq.integer`), which holds no
float operation; on how many images the two agree; and times of a batch, taken in turns.
"""

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxq
from low_bits import SAMPLES, TASKS, Data, Run, accuracy, bytes_of, float_model, logits_of, real, trainers

BATCH, BLOCKS = 64, 15
POLICY = jaxq.w8a8(static=True, symmetric=False)


class Result(NamedTuple):
    """Accuracies and agreement from 0 to 1; seconds of a batch in float, int8 with floats between, integers."""

    task: str
    accuracies: tuple[float, float, float]
    agreement: float
    seconds: tuple[float, float, float]


def in_turns(programs: Sequence[Any], x: jax.Array) -> tuple[float, ...]:
    """Return the median time of every program, one block of calls after the other."""
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(BLOCKS):
        for program, own in zip(programs, times, strict=True):
            start = time.perf_counter()
            for _ in range(3):
                jax.block_until_ready(program(x))
            own.append((time.perf_counter() - start) / 3)
    return tuple(median(own) for own in times)


def compare(task: str, data: Data, options: argparse.Namespace) -> Result:
    """Return what a task's model does in float, in int8, and in integers."""
    trainer = trainers(task, "8", len(data.train_x) // 128, (options.epochs, 1, 128))[0]
    keys = jax.random.split(jax.random.key(0), 3)
    variables, _ = float_model(trainer, Run(task, "8", 0), data, keys, options.models)
    samples = real(data.train_x[:SAMPLES])
    plan = jaxq.calibrate(trainer.predict, POLICY)(variables, [samples])
    converted = jaxq.convert(trainer.predict, plan)(variables, samples)
    integers = jaxq.integer(trainer.predict, plan)(converted, samples)
    programs = [jax.jit(trainer.predict), jax.jit(jaxq.quantize(trainer.predict, plan)), jax.jit(integers)]
    calls = [partial(programs[0], variables), partial(programs[1], converted), programs[2]]
    logits = [logits_of(lambda _, x, call=call: call(x), None, data) for call in calls]
    agreement = float(np.mean(logits[1].argmax(-1) == logits[2].argmax(-1)))
    return Result(task, tuple(accuracy(out, data) for out in logits), agreement, in_turns(calls, samples[:BATCH]))


HEADER = (
    "| task | float | int8, float between | integers alone | points | agree | float ms | int8 ms | integers ms |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def row(result: Result) -> str:
    """Return a line of the table."""
    floats, imitated, integers = (100 * a for a in result.accuracies)
    times = " | ".join(f"{1e3 * t:.2f}" for t in result.seconds)
    return (
        f"| {result.task} | {floats:.2f} | {imitated:.2f} | {integers:.2f} | {integers - floats:+.2f} "
        f"| {100 * result.agreement:.2f} | {times} |"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--task", default="digits", help=f"some of {','.join(TASKS)}; default: digits")
    option("--data", type=Path, metavar="DIR", help="folder with the files of the datasets; not needed for digits")
    option("--models", type=Path, metavar="FOLDER", help="where float models are, or are left")
    option("--epochs", type=int, default=6, metavar="N", help="of training in float; default: 6")
    option("--out", type=Path, metavar="FOLDER", help="where integer_only.md is written")
    return parser


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Compare the models that the command line asks for, print the table, and return it."""
    options = parser().parse_args(argv)
    tasks = options.task.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser().error(f"--task: no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    results = [compare(task, bytes_of(TASKS[task].dataset, options.data), options) for task in tasks]
    lines = [
        f"jaxq {jaxq.__version__}, JAX {jax.__version__}, {jax.devices()[0].device_kind}; accuracy on the test set and "
        f"agreement in percent, points: integers alone less float; times of {BATCH} images, medians of {BLOCKS} blocks "
        "in turns.",
        "",
        HEADER,
        *map(row, results),
    ]
    print("\n".join(lines))
    if options.out:
        title = f"# Integers alone, after training\n\n`python examples/integer_only.py --task {options.task} "
        command = f"{title}--data DIR --models FOLDER --out examples/results`\n\n"
        (options.out / "integer_only.md").write_text(command + "\n".join(lines) + "\n")
    return results


if __name__ == "__main__":
    main()
