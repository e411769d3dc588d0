"""Train a small Flax classifier in float, train it further for int8, convert it, and serve it in int8.

    python examples/train_qat.py                               # scikit-learn's digits, a CNN, well under a minute
    python examples/train_qat.py --dataset mnist --data DIR    # DIR as described in examples/datasets.py
    python examples/train_qat.py --model transformer --framework nnx --static

Everything that has to do with quantization stands in `train_quantized`; the rest is ordinary Flax and optax. It ends
in a table: accuracy, bytes and latency in float and in int8, and what products the programs are made of.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jaxq
from datasets import NAMES, Dataset, load
from hlo import count_ops
from models import MODELS, init_linen, init_nnx

RATE = 3e-3
QAT_RATE = RATE / 10  # the weights are good already; they only have to find their way to the grid
WARMUP = 0.1  # of all steps
CALIBRATION_BATCHES = 8
EVALUATION_BATCH = 500
BLOCKS, CALLS = 10, 10  # of the measurement of latency
EPOCHS = {"digits": (20, 5)}  # float, QAT
OTHER_EPOCHS = (6, 2)
BATCH = {"digits": 64}
OTHER_BATCH = 128


class Learner(NamedTuple):
    """One model in one framework.

    `weights` are Linen variables or an NNX module; `predict(weights, x)` returns logits in evaluation mode;
    `start(weights, optimizer, transform)` returns `(state, step)`, where `step(state, x, y)` returns `(state, loss)`,
    `state[0]` are the weights being trained, and `transform` is applied to the forward pass in training mode.
    """

    weights: Any
    predict: Callable
    start: Callable


class Programs(NamedTuple):
    """The three programs to compare, each with the weights that it takes."""

    float: tuple[Callable, Any]
    qat: tuple[Callable, Any]
    int8: tuple[Callable, Any]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- the two frameworks ----------------------------------------------------------------------------------------------


def linen_learner(name: str, data: Dataset, seed: int) -> Learner:
    """Variables are a pytree; BatchNorm's new statistics come back as a second output."""
    model, variables = init_linen(name, data.train_x.shape[1:], data.n_classes, seed)

    def predict(variables: Any, x: jax.Array) -> jax.Array:
        return model.apply(variables, x)

    def forward(variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    def start(variables: Any, optimizer: optax.GradientTransformation, transform: Callable) -> tuple[Any, Callable]:
        trained = transform(forward)

        def loss_fn(params: Any, others: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
            logits, updates = trained({"params": params, **others}, x)
            return cross_entropy(logits, y), updates

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
            variables, opt_state = state
            params = variables["params"]
            others = {name: collection for name, collection in variables.items() if name != "params"}
            (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, others, x, y)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            return ({"params": optax.apply_updates(params, changes), **updates}, opt_state), loss

        return (variables, optimizer.init(variables["params"])), step

    return Learner(variables, predict, start)


def nnx_learner(name: str, data: Dataset, seed: int) -> Learner:
    """The module itself holds the weights; BatchNorm updates its statistics in place."""
    module = init_nnx(name, data.train_x.shape[1:], data.n_classes, seed)

    def predict(module: nnx.Module, x: jax.Array) -> jax.Array:
        return module(x)

    def forward(module: nnx.Module, x: jax.Array) -> jax.Array:
        return module(x, train=True)

    def start(module: nnx.Module, optimizer: optax.GradientTransformation, transform: Callable) -> tuple[Any, Callable]:
        trained = transform(forward)

        @partial(nnx.jit, donate_argnums=(0, 1))
        def update(module: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
            loss, grads = nnx.value_and_grad(lambda module: cross_entropy(trained(module, x), y))(module)
            optimizer.update(module, grads)
            return loss

        def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
            return state, update(*state, x, y)

        return (module, nnx.Optimizer(module, optimizer, wrt=nnx.Param)), step

    return Learner(module, predict, start)


LEARNERS = {"linen": linen_learner, "nnx": nnx_learner}


# --- training --------------------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """One training: its name, and how."""

    label: str
    epochs: int
    batch: int
    rate: float
    seed: int


def batches(data: Dataset, phase: Phase) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled minibatches of one size; what does not fill a batch waits for the next epoch's shuffle."""
    rng = np.random.default_rng(phase.seed)
    for _ in range(phase.epochs):
        order = rng.permutation(len(data.train_x))
        count = len(order) // phase.batch
        for chosen in np.split(order[: count * phase.batch], count):
            yield data.train_x[chosen], data.train_y[chosen]


def unchanged(forward: Callable) -> Callable:
    return forward


def fit(learner: Learner, weights: Any, data: Dataset, phase: Phase, transform: Callable = unchanged) -> Any:
    """Train a copy of `weights` with Adam and a cosine schedule, and return it."""
    weights = jax.tree.map(jnp.copy, weights)  # the steps donate what they are given
    steps = phase.epochs * (len(data.train_x) // phase.batch)
    if not steps:
        return weights
    schedule = optax.warmup_cosine_decay_schedule(0.0, phase.rate, int(WARMUP * steps), steps)
    state, step = learner.start(weights, optax.adam(schedule), transform)
    start = time.perf_counter()
    with tqdm(batches(data, phase), desc=phase.label, total=steps, unit="step") as bar:
        for i, (x, y) in enumerate(bar):
            state, loss = step(state, x, y)
            if i % 20 == 0 or i == steps - 1:
                bar.set_postfix(loss=f"{float(loss):.4f}")
    print(f"{phase.label}: {steps} steps in {time.perf_counter() - start:.1f} s, last loss {float(loss):.4f}")
    return state[0]


def train_quantized(learner: Learner, weights: Any, data: Dataset, phase: Phase, *, static: bool) -> Programs:
    """All of jaxq: make a plan, train under it, convert the weights, and return the programs to compare.

    One plan serves throughout. With `static` the activation ranges are measured on the float model, before QAT: the
    weights are then trained for the very ranges that serve, and measuring anew afterwards would undo part of that.
    """
    predict = learner.predict
    samples = [x for x, _ in islice(batches(data, phase._replace(epochs=1)), CALIBRATION_BATCHES)]

    plan = jaxq.make_plan(predict, jaxq.w8a8(static=static))(weights, samples[0])
    if static:
        plan = jaxq.calibrate(predict, plan)(weights, samples)
    print(plan)

    trained = fit(learner, weights, data, phase, lambda forward: jaxq.qat(forward, plan))
    converted = jaxq.convert(predict, plan)(trained, samples[0])
    return Programs(
        float=(jax.jit(predict), weights),
        qat=(jax.jit(jaxq.qat(predict, plan)), trained),
        int8=(jax.jit(jaxq.quantize(predict, plan)), converted),
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def all_logits(program: Callable, weights: Any, x: np.ndarray) -> np.ndarray:
    """Logits [n, n_classes], computed in batches of one size; the last one is filled up with the first samples."""
    batch = min(EVALUATION_BATCH, len(x))
    filled = np.concatenate([x, x[: -len(x) % batch]])
    return np.concatenate([program(weights, part) for part in np.split(filled, len(filled) // batch)])[: len(x)]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays that the pytree holds."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def median_seconds(programs: Sequence[tuple[Callable, Any]], x: jax.Array) -> list[float]:
    """Median time per call of each program, in alternating blocks of calls: a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(1 + BLOCKS):
        for (program, weights), seconds in zip(programs, times, strict=True):
            for _ in range(CALLS):
                start = time.perf_counter()
                jax.block_until_ready(program(weights, x))
                seconds.append(time.perf_counter() - start)
    return [median(seconds[CALLS:]) for seconds in times]  # the first block warms up


def products(program: Callable, weights: Any, x: jax.Array) -> dict[str, dict[str, int]]:
    """Products in what JAX hands to the compiler, and in what the compiler made of it."""
    lowered = program.lower(weights, x)
    return {"lowered": count_ops(lowered.as_text()), "compiled": count_ops(lowered.compile().as_text())}


def measure(programs: Programs, data: Dataset, batch: int) -> dict[str, Any]:
    """Compare the three programs on the test set; times are milliseconds per batch."""
    logits = {name: all_logits(*program, data.test_x) for name, program in programs._asdict().items()}
    served = {"float": programs.float, "int8": programs.int8}
    x = jnp.asarray(data.test_x[:batch])
    seconds = median_seconds(list(served.values()), x)
    labels = {name: values.argmax(-1) for name, values in logits.items()}
    return {
        "accuracy": {name: float(np.mean(label == data.test_y)) for name, label in labels.items()},
        "test_samples": len(data.test_y),
        "int8_differs_from_qat": int(np.sum(labels["int8"] != labels["qat"])),
        "largest_logit_difference": float(np.max(np.abs(logits["int8"] - logits["qat"]))),
        "bytes": {name: tree_bytes(weights) for name, (_, weights) in served.items()},
        "latency_ms": dict(zip(served, [1e3 * s for s in seconds], strict=True)),
        "latency_batch": len(x),
        "products": {name: products(*program, x) for name, program in served.items()},
    }


def rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """Cells: what is measured, in float, in QAT, in int8, float compared to int8."""
    accuracy, size, latency, counts = (result[key] for key in ("accuracy", "bytes", "latency_ms", "products"))
    size_ratio, speed_ratio = (both["float"] / both["int8"] for both in (size, latency))
    yield "", "float", "QAT", "int8", ""
    yield "accuracy", *(f"{100 * accuracy[name]:.2f} %" for name in ("float", "qat", "int8")), ""
    yield "bytes", f"{size['float']:,}", "", f"{size['int8']:,}", f"{size_ratio:.2f}x smaller"
    times = (f"{latency[name]:.2f} ms" for name in ("float", "int8"))
    yield f"latency of {result['latency_batch']} images", next(times), "", next(times), f"{speed_ratio:.2f}x as fast"
    for product in counts["int8"]["compiled"]:
        found = (" / ".join(str(stage[product]) for stage in counts[name].values()) for name in ("float", "int8"))
        yield f"{product.replace('_', ' ')}, lowered / compiled", next(found), "", next(found), ""


def table(result: dict[str, Any]) -> str:
    """The measurements as one table, and a sentence on whether int8 and QAT agree."""
    cells = list(rows(result))
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]).rstrip() for row in cells]
    return "\n".join([*lines, "", agreement(result)])


def agreement(result: dict[str, Any]) -> str:
    return (
        f"int8 and QAT predict differently for {result['int8_differs_from_qat']} of {result['test_samples']} test"
        f" samples; largest difference of a logit: {result['largest_logit_difference']:.3g}"
    )


# --- the command line ------------------------------------------------------------------------------------------------


def at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return integer


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a Flax classifier in float, then for int8, convert it and serve it in int8 with jaxq.",
        epilog="MNIST, Fashion-MNIST and CIFAR-10 are read from files under DIR: examples/datasets.py says which.",
    )
    digits, others = EPOCHS["digits"], OTHER_EPOCHS
    option = parser.add_argument
    option("--dataset", choices=NAMES, default="digits", help="default: digits, which scikit-learn brings along")
    option("--data", type=Path, metavar="DIR", help="folder with the files of the dataset; not needed for digits")
    option("--model", choices=MODELS, default="cnn", help="default: cnn")
    option("--framework", choices=LEARNERS, default="linen", help="default: linen")
    option("--epochs", type=at_least(0), metavar="N", help=f"default: {digits[0]} on digits, else {others[0]}")
    option(
        "--qat-epochs",
        type=at_least(0),
        metavar="N",
        help=f"epochs of quantization-aware training after those in float; default: {digits[1]} on digits,"
        f" else {others[1]}; 0 quantizes the float model as it is",
    )
    option("--batch", type=at_least(1), metavar="N", help=f"default: {BATCH['digits']} on digits, else {OTHER_BATCH}")
    option("--static", action="store_true", help="calibrated activation ranges instead of dynamic ones per token")
    option("--seed", type=at_least(0), default=0, metavar="N", help="of the weights and the shuffling; default: 0")
    option("--json", type=Path, metavar="FILE", help="also write the results there")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Dataset]:
    """Options with their defaults filled in, and the data; exits with status 2 and a message where they do not fit."""
    options = parser()
    args = options.parse_args(argv)
    epochs, qat_epochs = EPOCHS.get(args.dataset, OTHER_EPOCHS)
    args.epochs = epochs if args.epochs is None else args.epochs
    args.qat_epochs = qat_epochs if args.qat_epochs is None else args.qat_epochs
    args.batch = BATCH.get(args.dataset, OTHER_BATCH) if args.batch is None else args.batch
    if args.json and not args.json.parent.is_dir():
        options.error(f"--json: no such folder: {args.json.parent}")
    try:
        data = load(args.dataset, args.data)
    except (OSError, ValueError, ImportError) as error:
        options.error(str(error))
    if args.batch > len(data.train_x):
        options.error(f"--batch {args.batch} is more than the {len(data.train_x)} training images")
    return args, data


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the example with the given command line and return what `--json` writes."""
    args, data = parse(argv)
    start = time.perf_counter()
    learner = LEARNERS[args.framework](args.model, data, args.seed)
    weights = fit(learner, learner.weights, data, Phase("float", args.epochs, args.batch, RATE, args.seed))
    phase = Phase("QAT", args.qat_epochs, args.batch, QAT_RATE, args.seed + 1)
    result = measure(train_quantized(learner, weights, data, phase, static=args.static), data, args.batch)
    print(f"\n{args.model} on {args.dataset}, {args.framework}, {time.perf_counter() - start:.1f} s\n\n{table(result)}")
    options = {name: value for name, value in vars(args).items() if name not in ("data", "json")}
    result = {**options, **result, "jax": jax.__version__, "backend": jax.default_backend()}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
