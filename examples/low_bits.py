"""Train image classifiers at 8 bits to 1 bit, weights and activations, and compare them with their float models.

    python examples/low_bits.py                                        # scikit-learn's digits, 8 and 2 bits, one seed
    python examples/low_bits.py --task mnist --data DIR --bits 8,4,2,1 --seeds 3 --out FOLDER
    python examples/low_bits.py --task resnet20 --data DIR --epochs 20 --qat-epochs 5 --out FOLDER

Every run is three programs: a float model, the same weights trained further with `jaxq.qat` in force, and the converted
weights served by `jaxq.quantize`, whose logits must be those of training, bit for bit. Steps are learned (LSQ), from
the optimum for the float model. As usual in the literature the first and the last layer have 8 bits where the others
have 4, 3 or 2; at 1 bit all weights and all activations but the image are signs (Hubara et al. 2016). Each run leaves a
JSON file in FOLDER, which `low_bits_table.py` turns into a table and pictures, and float models stay there too; what is
there already is not run again.
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
from tqdm import tqdm

import jaxq
from datasets import load
from low_bits_models import ConvNet, MobileNetV2, Perceptron, ResNet20, Rows, sign_like
from train_qat import all_logits, cross_entropy

RATE, QAT_RATE, STEP_RATE = 3e-3, 3e-4, 1e-4  # of weights in float, in QAT; of learned steps, relative to a step
# The same two of QAT for a model that is not done with training in float.
HIGH_RATE, HIGH_STEP_RATE = 1e-3, 1e-3
SAMPLES = 256  # that learned steps start from
SHIFT = 4  # pixels that an augmented image is moved by, at most


# --- methods ---------------------------------------------------------------------------------------------------------


def weights_of(bits: int) -> jaxq.Quantizer:
    """Return signed integers with a learned step per output channel."""
    return jaxq.Quantizer(jaxq.Int(bits), calibrator=jaxq.learned(), narrow=bits == 8)


def activations_of(bits: int, *, signed: bool = False) -> jaxq.Quantizer:
    """Return integers with one learned step, unsigned for what comes out of a ReLU."""
    return jaxq.Quantizer(jaxq.Int(bits, signed=signed), per_tensor=True, calibrator=jaxq.learned())


def policy_of(bits: str, first: str | None) -> dict[str, Any]:
    """Return what is quantized at so many bits; `first`: the first layer, None where activations are signed."""
    if bits == "1":
        signs = jaxq.Scheme(weight=jaxq.binary(), act=jaxq.binary())
        return {first: jaxq.Scheme(weight=jaxq.binary(), act=activations_of(8)), "*": signs}
    if bits == "k-means 32":
        return {"*": jaxq.weight_only(jaxq.kmeans(32, calibrator=jaxq.learned()))}
    weight, count = weights_of(int(bits)), int(bits)
    if first is None:
        return {"*": jaxq.Scheme(weight=weight, act=activations_of(count, signed=True))}
    inner = jaxq.Scheme(weight=weight, act=activations_of(count))
    edge = jaxq.Scheme(weight=weights_of(8), act=activations_of(count))
    return {first: jaxq.Scheme(weight=weights_of(8), act=activations_of(8)), "head": edge, "*": inner}


class Task(NamedTuple):
    """A dataset, a model of an activation function, the name of its first layer, what it is trained at, and how.

    distilled: QAT learns from the float model as much as from the labels (Hinton et al. 2015, at temperature one).
    """

    dataset: str
    model: Callable[[Callable], nn.Module]
    first: str | None
    bits: tuple[str, ...]
    augmented: bool = False
    distilled: bool = False
    rates: tuple[float, float] = (QAT_RATE, STEP_RATE)  # of weights in QAT, of learned steps


CONV = (ConvNet, "conv_0", ("8", "4", "2", "1"))
RESIDUAL = ("stem", ("4", "3", "2"), True, True, (HIGH_RATE, HIGH_STEP_RATE))
TASKS = {
    "digits": Task("digits", *CONV),
    "mnist": Task("mnist", *CONV),
    "fashion_mnist": Task("fashion_mnist", *CONV),
    "perceptron": Task("mnist", partial(Perceptron, widths=(64, 64, 64), normalized=True), "dense_0", ("2", "1")),
    "lenet": Task("mnist", partial(Perceptron, widths=(300, 100), normalized=False), "dense_0", ("k-means 32",)),
    "rows": Task("mnist", Rows, None, ("8", "4")),
    "mobilenet": Task("mnist", MobileNetV2, None, ("8",)),
    "digits_mobilenet": Task("digits", MobileNetV2, None, ("8",)),
    "digits_rows": Task("digits", Rows, None, ("8", "4")),
    # Half the published width, for CPUs, and all of it.
    "resnet20": Task("cifar10", partial(ResNet20, width=8), *RESIDUAL),
    "resnet20_wide": Task("cifar10", ResNet20, *RESIDUAL),
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


def moved(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift every image by a few pixels and mirror half of them (He et al. 2016, section 4.2)."""
    across, over = jax.random.split(key)
    around = ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0))
    starts = jax.random.randint(across, (len(images), 2), 0, 2 * SHIFT + 1)
    size = images.shape[1:]
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), size))(jnp.pad(images, around), starts)
    return jnp.where(jax.random.bernoulli(over, shape=(len(images), 1, 1, 1)), cut[:, :, ::-1], cut)


def logits_of(predict: Callable, weights: Any, data: Data) -> np.ndarray:
    """Return the logits of the test images, [n, 10]."""
    return all_logits(lambda weights, x: predict(weights, real(x)), weights, data.test_x)


def accuracy(logits: np.ndarray, data: Data) -> float:
    return float(np.mean(logits.argmax(-1) == np.asarray(data.test_y)))


@dataclass(frozen=True)
class Trainer:
    """How a model is trained: in float (`plan` is None then) or with quantization in force."""

    model: nn.Module
    epochs: int
    steps: int  # of an epoch
    batch: int
    rate: float
    step_rate: float
    augmented: bool

    @partial(jax.jit, static_argnums=0)
    def fresh(self, key: jax.Array, data: Data) -> Any:
        """Return variables to start from."""
        return self.model.init(key, real(data.train_x[:1]))

    def predict(self, variables: Any, x: jax.Array) -> jax.Array:
        """Return logits in evaluation mode."""
        return self.model.apply(variables, x)

    @partial(jax.jit, static_argnums=0)
    def evaluate(self, plan: Any, variables: Any, x: jax.Array) -> jax.Array:
        """Return the logits of the program that is trained."""
        predict = self.predict if plan is None else jaxq.qat(self.predict, plan)
        return predict(variables, x)

    @partial(jax.jit, static_argnums=0)
    def serve(self, plan: Any, converted: Any, x: jax.Array) -> jax.Array:
        """Return the logits of the converted weights."""
        return jaxq.quantize(self.predict, plan)(converted, x)

    def forward(self, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        """Return logits and BatchNorm's new statistics."""
        return self.model.apply(variables, x, train=True, mutable=["batch_stats"])

    def loss(self, trained: tuple, stats: Any, teacher: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        """Return the loss and the new statistics. trained: the plan, or None, and the parameters.

        teacher: variables of the float model that it is to agree with as much as with the labels, or None.
        """
        plan, params = trained
        forward = self.forward if plan is None else jaxq.qat(self.forward, plan)
        logits, new = forward({"params": params, **stats}, x)
        loss = cross_entropy(logits, y)
        if teacher is not None:
            taught = jax.nn.softmax(self.predict(teacher, x))
            loss = (loss + optax.softmax_cross_entropy(logits, taught).mean()) / 2
        return loss, new

    def optimizer(self) -> optax.GradientTransformation:
        """Return Adam for the parameters and, relative to their size, for what is learned of the plan."""

        def adam(rate: float, *more: optax.GradientTransformation) -> optax.GradientTransformation:
            return optax.chain(optax.scale_by_adam(), *more, optax.scale(-rate))

        kinds = {"plan": adam(self.step_rate, optax.scale_by_trust_ratio()), "weights": adam(self.rate)}
        return optax.multi_transform(kinds, lambda trained: ("plan", "weights"))

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: Any, teacher: Any, data: Data, chosen: jax.Array, key: jax.Array, scale: jax.Array
    ) -> tuple[Any, jax.Array]:
        """Return the state after the batch of the `chosen` images, and the loss on it. scale: of all rates."""
        trained, stats, memory = state
        x = real(data.train_x[chosen])
        x = moved(x, key) if self.augmented else x
        gradient_of = jax.value_and_grad(self.loss, has_aux=True)
        (loss, new), gradient = gradient_of(trained, stats, teacher, x, data.train_y[chosen])
        updates, memory = self.optimizer().update(gradient, memory, trained)
        updates = jax.tree.map(lambda update: scale * update, updates)
        return (optax.apply_updates(trained, updates), new, memory), loss

    def train(
        self, plan: Any, variables: Any, data: Data, key: jax.Array, teacher: Any = None
    ) -> tuple[Any, Any, list[float]]:
        """Return the trained plan and variables, and the accuracy after every epoch. teacher: as in `loss`."""
        plan, variables = jax.tree.map(jnp.array, (plan, variables))  # the steps donate what they are given
        stats = {name: values for name, values in variables.items() if name != "params"}
        trained, curve = (plan, variables["params"]), []
        state = trained, stats, self.optimizer().init(trained)
        label = "float" if plan is None else "QAT"
        scales = iter((1 + np.cos(np.linspace(0, np.pi, self.epochs * self.steps, endpoint=False))) / 2)
        with tqdm(total=self.epochs * self.steps, desc=label, unit="step", leave=False, mininterval=1) as bar:
            for epoch in jax.random.split(key, self.epochs):
                order = jax.random.permutation(epoch, len(data.train_x))[: self.steps * self.batch]
                for i, chosen in enumerate(np.asarray(order).reshape(self.steps, self.batch)):
                    key = jax.random.fold_in(epoch, i)
                    state, loss = self.step(state, teacher, data, chosen, key, np.float32(next(scales)))
                    bar.update()
                plan, variables = state[0][0], {"params": state[0][1], **state[1]}
                curve.append(accuracy(logits_of(partial(self.evaluate, plan), variables, data), data))
                bar.set_postfix(loss=f"{float(loss):.4f}", accuracy=f"{curve[-1]:.4f}")
        return plan, variables, curve


@cache
def trainers(task: str, bits: str, steps: int, options: tuple[int, int, int]) -> tuple[Trainer, Trainer, Callable]:
    """Return how the float and the quantized model are trained, and what makes a plan: one of each for all seeds."""
    epochs, qat_epochs, batch = options
    signs = bits == "1"
    _, make, first, _, augmented, _, (qat_rate, step_rate) = TASKS[task]
    # Signs are another model than ReLUs: trained from the start, for as long as both trainings of the others.
    after = Trainer(
        make(sign_like if signs else nn.relu),
        qat_epochs + signs * epochs,
        steps,
        batch,
        RATE if signs else qat_rate,
        step_rate,
        augmented,
    )
    before = Trainer(make(nn.relu), epochs, steps, batch, RATE, step_rate, augmented)
    return before, after, jax.jit(jaxq.observe(after.predict, policy_of(bits, first)))


class Run(NamedTuple):
    """One float model and one of its quantized ones."""

    task: str
    bits: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}-{self.bits.replace(' ', '')}-{self.seed}.json"


def float_model(trainer: Trainer, chosen: Run, data: Data, keys: jax.Array, folder: Path | None) -> tuple[Any, Any]:
    """Return the variables of a trained float model and its curve, from FOLDER where they are there."""
    path = folder and folder / f"{chosen.task}-float-{chosen.seed}"
    if path and path.with_suffix(".json").exists():
        return jaxq.load(path.with_suffix(".safetensors"))[0], json.loads(path.with_suffix(".json").read_text())
    _, variables, curve = trainer.train(None, trainer.fresh(keys[0], data), data, keys[1])
    if path:
        float_plan = jaxq.make_plan(trainer.predict, {})(variables, real(data.train_x[:1]))
        jaxq.save(path.with_suffix(".safetensors"), variables, float_plan)
        path.with_suffix(".json").write_text(json.dumps(curve))
    return variables, curve


def run(chosen: Run, data: Data, floats: dict, options: argparse.Namespace) -> dict[str, Any]:
    """Train one model in float, unless `floats` has it, then quantized; return what came out."""
    numbers = options.epochs, options.qat_epochs, options.batch
    before, after, observe = trainers(chosen.task, chosen.bits, len(data.train_x) // options.batch, numbers)
    keys = jax.random.split(jax.random.key(chosen.seed), 3)
    start = time.perf_counter()
    if (chosen.task, chosen.seed) not in floats:
        floats[chosen.task, chosen.seed] = float_model(before, chosen, data, keys, options.out)
    variables, float_curve = floats[chosen.task, chosen.seed]
    if chosen.bits == "1":
        variables = after.fresh(keys[0], data)
    samples = real(data.train_x[:SAMPLES])
    _, plan = observe(variables, samples)
    teacher = variables if TASKS[chosen.task].distilled else None
    plan, trained, curve = after.train(plan, variables, data, keys[2], teacher)
    converted = jaxq.convert(after.predict, plan)(trained, samples)
    served = logits_of(partial(after.serve, plan), converted, data)
    if not np.array_equal(served, logits_of(partial(after.evaluate, plan), trained, data)):
        raise AssertionError(f"{chosen.file}: served logits are not those of training")
    return {
        **chosen._asdict(),
        "float": float_curve[-1],
        "quantized": accuracy(served, data),
        "float_curve": float_curve,
        "curve": curve,
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
    option("--bits", help="some of 8,4,3,2,1; default: all that a task has, 8,2 of digits")
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
