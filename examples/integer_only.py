"""Train a small Flax classifier in float and run it without float: int8 codes in, int32 sums out, nothing else between.

    python examples/integer_only.py                                            # digits, a CNN, half a minute
    python examples/integer_only.py --dataset mnist --data DIR --model resnet  # DIR as in examples/datasets.py

It ends in a table of three programs, in float, of the plan with float between its sites, and in integers: accuracy, how
often they predict what the first two do, and latency.
"""

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import jax
import numpy as np

import jaxq
from datasets import NAMES, load
from models import MODELS
from train_qat import (
    BATCH,
    CALIBRATION_BATCHES,
    EPOCHS,
    OTHER_BATCH,
    OTHER_EPOCHS,
    RATE,
    Phase,
    all_logits,
    batches,
    fit,
    linen_learner,
    median_seconds,
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a Flax classifier in float and run it in integers alone.")
    option = parser.add_argument
    option("--dataset", choices=NAMES, default="digits", help="default: digits, which scikit-learn brings along")
    option("--data", type=Path, metavar="DIR", help="folder with the files of the dataset; not needed for digits")
    option("--model", choices=[name for name in MODELS if name != "transformer"], default="cnn", help="default: cnn")
    option("--epochs", type=int, metavar="N", help="of the training in float")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the example and return accuracy, agreement with float and milliseconds of each program."""
    args = parser().parse_args(argv)
    data = load(args.dataset, args.data)
    epochs = EPOCHS.get(args.dataset, OTHER_EPOCHS)[0] if args.epochs is None else args.epochs
    phase = Phase("float", epochs, BATCH.get(args.dataset, OTHER_BATCH), RATE, 0)
    learner = linen_learner(args.model, data, 0)
    weights, predict = fit(learner, learner.weights, data, phase), learner.predict

    samples = [x for x, _ in islice(batches(data, phase), CALIBRATION_BATCHES)]
    plan = jaxq.calibrate(predict, jaxq.w8a8(static=True, symmetric=False))(weights, samples)
    converted = jaxq.convert(predict, plan)(weights, samples[0])
    program = jaxq.integer(predict, plan)(converted, samples[0])
    programs = {
        "float": (jax.jit(predict), weights),
        "int8": (jax.jit(jaxq.quantize(predict, plan)), converted),
        "integer": (jax.jit(lambda _, x: program(x)), None),
    }
    labels = {name: all_logits(*pair, data.test_x).argmax(-1) for name, pair in programs.items()}
    seconds = median_seconds(list(programs.values()), data.test_x[: phase.batch])
    print(f"\n{'':8}  accuracy  as float   as int8  latency of {phase.batch} images")
    result = {}
    for (name, label), time in zip(labels.items(), seconds, strict=True):
        others = {"accuracy": data.test_y, "as_float": labels["float"], "as_int8": labels["int8"]}
        result[name] = {key: float(np.mean(label == other)) for key, other in others.items()} | {"ms": 1e3 * time}
        print("{:8}  {accuracy:8.2%}  {as_float:8.2%}  {as_int8:8.2%}  {ms:.2f} ms".format(name, **result[name]))
    return result


if __name__ == "__main__":
    main()
