"""Train image classifiers at 8, 4, 2 and 1 bits, weights and activations, and compare them with their float models.

    python examples/low_bits.py                                        # scikit-learn's digits, 8 and 2 bits, one seed
    python examples/low_bits.py --task mnist --data DIR --bits 8,4,2,1 --seeds 3 --out FOLDER
    python examples/low_bits.py --task mnist,fashion_mnist,perceptron,lenet --data DIR --seeds 3 --out FOLDER

Every run is three programs: a float model, the same weights trained further with `jaxq.qat` in force, and the converted
weights served by `jaxq.quantize`, whose logits must be those of training, bit for bit. Steps are learned (LSQ), from
the optimum for the float model. As usual in the literature the first and the last layer have 8 bits where the others
have 4 or 2; at 1 bit all weights and all activations but the image are signs (Hubara et al. 2016). A whole training is
one compiled program, a scan over epochs and steps. Each run leaves a JSON file in FOLDER, which `low_bits_table.py`
turns into a table and pictures; a run that is there already is not run again.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxq
from datasets import load
from train_qat import cross_entropy

RATE, QAT_RATE, STEP_RATE = 3e-3, 3e-4, 1e-4  # of weights in float, in QAT; of learned steps, relative to a step
EVALUATION_BATCH = 500
SAMPLES = 256  # that learned steps start from
FLOAT = "float"


# --- models ----------------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    """Three convolutions and two dense layers, BatchNorm after each; 94 k parameters on 28 x 28 pixels."""

    activate: Callable

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def normed(x: jax.Array) -> jax.Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        for i, width in enumerate((32, 64, 64)):
            x = nn.Conv(width, (3, 3), padding="VALID" if x.shape[1] > 4 else "SAME", use_bias=False, name=f"conv_{i}")(
                x
            )
            x = nn.avg_pool(x, (2, 2), (2, 2)) if i < 2 else x
            x = self.activate(normed(x))
        x = self.activate(normed(nn.Dense(64, use_bias=False, name="dense")(x.reshape(len(x), -1))))
        return nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(10, use_bias=False, name="head")(x))


class Perceptron(nn.Module):
    """Dense layers, BatchNorm after each if asked for."""

    widths: tuple[int, ...]
    activate: Callable
    normalized: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = x.reshape(len(x), -1)
        for i, width in enumerate((*self.widths, 10)):
            x = nn.Dense(width, use_bias=not self.normalized, name="head" if i == len(self.widths) else f"dense_{i}")(x)
            if self.normalized:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = self.activate(x) if i < len(self.widths) else x
        return x


def sign_like(x: jax.Array) -> jax.Array:
    """Return hard tanh: a sign's gradient, passed straight through between -1 and 1."""
    return jnp.clip(x, -1, 1)


# --- methods ---------------------------------------------------------------------------------------------------------


def weights_of(bits: int) -> jaxq.Quantizer:
    """Return signed integers with a learned step per output channel."""
    return jaxq.Quantizer(jaxq.Int(bits), calibrator=jaxq.learned(), narrow=bits == 8)


def activations_of(bits: int) -> jaxq.Quantizer:
    """Return unsigned integers, for what comes out of a ReLU, with one learned step."""
    return jaxq.Quantizer(jaxq.Int(bits, signed=False), per_tensor=True, calibrator=jaxq.learned())


def policy_of(bits: str, first: str) -> dict[str, Any]:
    """Return what is quantized at so many bits; `first` is the name of the first layer."""
    if bits == "1":
        signs = jaxq.Scheme(weight=jaxq.binary(), act=jaxq.binary())
        return {first: jaxq.Scheme(weight=jaxq.binary(), act=activations_of(8)), "*": signs}
    if bits == "k-means 32":
        return {"*": jaxq.weight_only(jaxq.kmeans(32, calibrator=jaxq.learned()))}
    inner = jaxq.Scheme(weight=weights_of(int(bits)), act=activations_of(int(bits)))
    edge = jaxq.Scheme(weight=weights_of(8), act=activations_of(int(bits)))
    return {first: jaxq.Scheme(weight=weights_of(8), act=activations_of(8)), "head": edge, "*": inner}


class Task(NamedTuple):
    """A dataset, a model of an activation function, the name of its first layer, what it is trained at."""

    dataset: str
    model: Callable[[Callable], nn.Module]
    first: str
    bits: tuple[str, ...]


CONV = (ConvNet, "conv_0", ("8", "4", "2", "1"))
TASKS = {
    "digits": Task("digits", *CONV),
    "mnist": Task("mnist", *CONV),
    "fashion_mnist": Task("fashion_mnist", *CONV),
    "perceptron": Task("mnist", lambda a: Perceptron((64, 64, 64), a, normalized=True), "dense_0", ("2", "1")),
    "lenet": Task("mnist", lambda a: Perceptron((300, 100), a, normalized=False), "dense_0", ("k-means 32",)),
}


# --- training --------------------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Images as bytes, on the device."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def bytes_of(name: str, folder: Path | None) -> Data:
    """Load a dataset and put it on the device."""
    data = load(name, folder)
    images = (np.round(x * 255).astype(np.uint8) for x in (data.train_x, data.test_x))
    train_x, test_x = (jax.device_put(x) for x in images)
    return Data(train_x, jax.device_put(data.train_y), test_x, jax.device_put(data.test_y))


def real(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255


def correct(predict: Callable, weights: Any, data: Data) -> tuple[jax.Array, jax.Array]:
    """Return the share of test images that are classified right, and the logits [n, 10]."""
    size = min(EVALUATION_BATCH, len(data.test_x))
    count = len(data.test_x) // size
    x = data.test_x[: count * size].reshape(count, size, *data.test_x.shape[1:])
    logits = jax.lax.map(lambda part: predict(weights, real(part)), x).reshape(count * size, -1)
    return jnp.mean(logits.argmax(-1) == data.test_y[: count * size]), logits


@dataclass(frozen=True)
class Trainer:
    """How a model is trained: in float (`plan` is None then) or with quantization in force."""

    model: nn.Module
    epochs: int
    batch: int
    rate: float

    @partial(jax.jit, static_argnums=0)
    def fresh(self, key: jax.Array, data: Data) -> Any:
        """Return variables to start from."""
        return self.model.init(key, real(data.train_x[:1]))

    def predict(self, variables: Any, x: jax.Array) -> jax.Array:
        """Return logits in evaluation mode."""
        return self.model.apply(variables, x)

    def forward(self, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Return logits and BatchNorm's new statistics."""
        return self.model.apply(variables, x, train=True, mutable=["batch_stats"])

    def loss(self, trained: tuple, stats: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        """Return the loss and the new statistics. trained: the plan, or None, and the parameters."""
        plan, params = trained
        forward = self.forward if plan is None else jaxq.qat(self.forward, plan)
        logits, new = forward({"params": params, **stats}, x)
        return cross_entropy(logits, y), new

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Return Adam for the parameters and, relative to their size, for what is learned of the plan."""
        schedule = optax.cosine_decay_schedule(1.0, steps)

        def adam(rate: float, *more: optax.GradientTransformation) -> optax.GradientTransformation:
            return optax.chain(optax.scale_by_adam(), *more, optax.scale_by_schedule(schedule), optax.scale(-rate))

        kinds = {"plan": adam(STEP_RATE, optax.scale_by_trust_ratio()), "weights": adam(self.rate)}
        return optax.multi_transform(kinds, lambda trained: ("plan", "weights"))

    @partial(jax.jit, static_argnums=0)
    def train(self, plan: Any, variables: Any, data: Data, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        """Return the trained plan and variables, and the accuracy after every epoch."""
        steps = len(data.train_x) // self.batch
        optimizer = self.optimizer(steps * self.epochs)
        params = variables["params"]
        stats = {name: values for name, values in variables.items() if name != "params"}

        def step(state: Any, chosen: jax.Array) -> tuple[Any, None]:
            trained, stats, memory = state
            batch = real(data.train_x[chosen]), data.train_y[chosen]
            gradient, new = jax.grad(self.loss, has_aux=True)(trained, stats, *batch)
            updates, memory = optimizer.update(gradient, memory, trained)
            return (optax.apply_updates(trained, updates), new, memory), None

        def epoch(state: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            order = jax.random.permutation(key, len(data.train_x))[: steps * self.batch]
            state, _ = jax.lax.scan(step, state, order.reshape(steps, self.batch))
            (plan, params), stats, _ = state
            predict = self.predict if plan is None else jaxq.qat(self.predict, plan)
            return state, correct(predict, {"params": params, **stats}, data)[0]

        trained = plan, params
        start = trained, stats, optimizer.init(trained)
        ((plan, params), stats, _), accuracies = jax.lax.scan(epoch, start, jax.random.split(key, self.epochs))
        return plan, {"params": params, **stats}, accuracies

    @partial(jax.jit, static_argnums=0)
    def scores(self, plan: Any, variables: Any, converted: Any, data: Data) -> tuple[jax.Array, jax.Array]:
        """Return the accuracy of the converted weights, and whether their logits are training's, bit for bit."""
        accuracy, logits = correct(jaxq.quantize(self.predict, plan), converted, data)
        return accuracy, jnp.all(logits == correct(jaxq.qat(self.predict, plan), variables, data)[1])


@cache
def trainers(task: str, bits: str, epochs: int, qat_epochs: int, batch: int) -> tuple[Trainer, Trainer, Callable]:
    """Return how the float and the quantized model are trained, and what makes a plan: one of each for all seeds."""
    signs = bits == "1"
    make, first = TASKS[task].model, TASKS[task].first
    # Signs are another model than ReLUs: trained from the start, for as long as both trainings of the others.
    before = Trainer(make(nn.relu), epochs, batch, RATE)
    after = Trainer(
        make(sign_like if signs else nn.relu), qat_epochs + signs * epochs, batch, RATE if signs else QAT_RATE
    )
    return before, after, jax.jit(jaxq.observe(after.predict, policy_of(bits, first)))


class Run(NamedTuple):
    """One float model and one of its quantized ones."""

    task: str
    bits: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}-{self.bits.replace(' ', '')}-{self.seed}.json"


def run(chosen: Run, data: Data, floats: dict, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in float, unless `floats` has it, then quantized; return what came out."""
    before, after, observe = trainers(chosen.task, chosen.bits, options.epochs, options.qat_epochs, options.batch)
    keys = jax.random.split(jax.random.key(chosen.seed), 3)
    start = time.perf_counter()
    if (chosen.task, chosen.seed) not in floats:
        floats[chosen.task, chosen.seed] = before.train(None, before.fresh(keys[0], data), data, keys[1])[1:]
    variables, float_curve = floats[chosen.task, chosen.seed]
    if chosen.bits == "1":
        variables = after.fresh(keys[0], data)
    samples = real(data.train_x[:SAMPLES])
    _, plan = observe(variables, samples)
    plan, trained, curve = after.train(plan, variables, data, keys[2])
    converted = jaxq.convert(after.predict, plan)(trained, samples)
    accuracy, same = after.scores(plan, trained, converted, data)
    if not same:
        raise AssertionError(f"{chosen.file}: served logits are not those of training")
    return {
        **chosen._asdict(),
        "float": float(float_curve[-1]),
        "quantized": float(accuracy),
        "float_curve": float_curve.tolist(),
        "curve": curve.tolist(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained["params"])),
        "epochs": [before.epochs, after.epochs],
        "batch": options.batch,
        "seconds": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
        "jaxq": jaxq.__version__,
        "device": jax.devices()[0].device_kind,
    }


# --- the command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--task", default="digits", help=f"some of {','.join(TASKS)}; default: digits")
    option("--data", type=Path, metavar="DIR", help="folder with the files of the datasets; not needed for digits")
    option("--bits", help="some of 8,4,2,1; default: all that a task has, 8,2 of digits")
    option("--seeds", type=int, default=1, metavar="N", help="default: 1")
    option("--epochs", type=int, default=6, metavar="N", help="in float; default: 6")
    option("--qat-epochs", type=int, default=3, metavar="N", help="of quantization-aware training; default: 3")
    option("--batch", type=int, default=128, metavar="N", help="default: 128")
    option("--out", type=Path, metavar="FOLDER", help="where each run leaves its JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run what the command line asks for, seed by seed, and return the results."""
    options = parser().parse_args(argv)
    tasks = options.task.split(",")
    if unknown := set(tasks) - set(TASKS):
        parser().error(f"--task: no {', '.join(sorted(unknown))}; there are {', '.join(TASKS)}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    results, floats, data = [], {}, {}
    for seed in range(options.seeds):
        for name in tasks:
            offered = TASKS[name].bits
            asked = options.bits or ("8,2" if name == "digits" else ",".join(offered))
            for bits in (b for b in offered if b in asked.split(",")):
                chosen = Run(name, bits, seed)
                path = options.out and options.out / chosen.file
                if path and path.exists():
                    results.append(json.loads(path.read_text()))
                    continue
                dataset = TASKS[name].dataset
                if dataset not in data:
                    data[dataset] = bytes_of(dataset, options.data)
                result = run(chosen, data[dataset], floats, options)
                results.append(result)
                if path:
                    path.write_text(json.dumps(result, indent=1) + "\n")
                print(
                    f"{name:14s} {bits:>10s} bits, seed {seed}: float {100 * result['float']:.2f} %, "
                    f"quantized {100 * result['quantized']:.2f} %, {result['seconds']:.0f} s",
                    flush=True,
                )
    return results


if __name__ == "__main__":
    main()
