"""Train a character transformer at W8A8, W4A8 and b1.58, and compare their losses with the float model's.

    python examples/char_transformer.py                     # texts that scikit-learn brings along, one seed
    python examples/char_transformer.py --data DIR --steps 3000 --qat-steps 600 --seeds 3 --out FOLDER

DIR/moby/package/data/data.txt is Moby-Dick; any text serves, as `--text FILE`. The last tenth of the text is for
testing. Every method starts from the float model's weights and trains further with `jaxq.qat` in force; b1.58 (Ma et
al. 2024) changes weights most and so trains longest. Served logits must be those of training, bit for bit. With FOLDER
each run leaves a JSON file there, beside a table and curves of all of them.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxq
from train_qat import cross_entropy

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 128, 4, 3, 96, 32
TESTED = 64  # windows of a test
EVERY = 100  # steps between two tests
WARMUP = 0.1  # of all steps
MOBY = Path("moby/package/data/data.txt")


# --- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention and a layer of four times the width, each behind a norm."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, name=name)

        h = nn.RMSNorm(name="norm_attention")(x)
        q, k, v = (dense(WIDTH, name)(h).reshape(*h.shape[:2], HEADS, -1) for name in ("query", "key", "value"))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / jnp.sqrt(q.shape[-1]).astype(q.dtype)
        seen = jnp.tril(jnp.ones((1, 1, *scores.shape[-2:]), bool))
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), v)
        x = x + dense(WIDTH, "out")(mixed.reshape(h.shape))
        h = dense(4 * WIDTH, "up")(nn.RMSNorm(name="norm_mlp")(x))
        return x + dense(WIDTH, "down")(jax.nn.gelu(h))


class Transformer(nn.Module):
    """Tokens [n, length] to logits [n, length, characters]."""

    characters: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        places = self.param("places", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x = nn.Embed(self.characters, WIDTH, name="embed")(tokens) + places[None, : tokens.shape[1]]
        for n in range(LAYERS):
            x = Block(name=f"block_{n}")(x)
        return nn.Dense(self.characters, name="head")(nn.RMSNorm(name="norm")(x))


# --- methods ---------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A policy, the learning rate to train under it with, and how many times the steps."""

    policy: dict[str, Any]
    rate: float
    longer: int = 1


def bitnet() -> dict[str, Any]:
    """Return b1.58 in the blocks, and 8 bits before and after them."""
    ternary = jaxq.Scheme(weight=jaxq.b158(), act=jaxq.int8())
    return {"block_*/qk": jaxq.w8a8(), "block_*/pv": jaxq.w8a8(), "block_*": ternary, "*": jaxq.w8a8()}


RATE = 2e-3
METHODS = {
    "W8A8": Method({"*": jaxq.w8a8()}, RATE / 10),
    "W4A8": Method({"*": jaxq.Scheme(weight=jaxq.int4(fit=jaxq.mse()), act=jaxq.int8())}, RATE / 4),
    "b1.58": Method(bitnet(), RATE, longer=5),
}


# --- data ------------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Characters as numbers, the first nine tenths and the last one, and how many different ones there are."""

    train: np.ndarray
    test: np.ndarray
    characters: int


def read(options: argparse.Namespace) -> Text:
    """Read a text: the file that was named, Moby-Dick under DIR, or what scikit-learn says of its datasets."""
    if options.text or options.data:
        path = options.text or options.data / MOBY
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        text = path.read_text(encoding="utf-8")
    else:
        from sklearn import datasets

        folder = Path(datasets.__file__).parent / "descr"
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    known = sorted(set(text))
    codes = np.searchsorted(known, list(text)).astype(np.int32)
    cut = len(codes) * 9 // 10
    if len(codes) - cut <= CONTEXT + 1:
        raise ValueError(f"the text has {len(codes)} characters; take one of at least {11 * CONTEXT}")
    return Text(codes[:cut], codes[cut:], len(known))


def windows(codes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pieces of the text and what follows each of their characters: [n, CONTEXT] both."""
    chosen = codes[starts[:, None] + np.arange(CONTEXT + 1)]
    return chosen[:, :-1], chosen[:, 1:]


# --- training --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trainer:
    """How a model is trained; `policy` is None for float."""

    model: Transformer
    policy: Any
    rate: float
    steps: int

    @property
    def predict(self) -> Callable:
        return self.model.apply if self.policy is None else jaxq.qat(self.model.apply, self.policy)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.rate, int(WARMUP * self.steps), self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))

    def train(self, variables: Any, text: Text, seed: int, label: str) -> tuple[Any, list[float]]:
        """Return the trained variables and the test loss, in nats, after every hundred steps and the last one."""
        optimizer = self.optimizer

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
            variables, memory = state
            loss, gradient = jax.value_and_grad(lambda v: cross_entropy(self.predict(v, x), y))(variables)
            updates, memory = optimizer.update(gradient, memory, variables)
            return (optax.apply_updates(variables, updates), memory), loss

        predict, rng, curve = jax.jit(self.predict), np.random.default_rng(seed), []
        variables = jax.tree.map(jnp.array, variables)  # the steps donate what they are given
        state = variables, optimizer.init(variables)
        with tqdm(range(self.steps), desc=label, unit="step", leave=False, mininterval=1) as bar:
            for n in bar:
                starts = rng.integers(0, len(text.train) - CONTEXT, BATCH)
                state, loss = step(state, *windows(text.train, starts))
                if (n + 1) % EVERY == 0 or n + 1 == self.steps:
                    curve.append(tested(predict, state[0], text))
                    bar.set_postfix(loss=f"{float(loss):.3f}", test=f"{curve[-1]:.4f}")
        return state[0], curve


def tests(text: Text) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the test text in windows, as many at a time as a batch of a test."""
    starts = np.arange(0, len(text.test) - CONTEXT - 1, CONTEXT)
    starts = starts[: max(1, len(starts) // TESTED) * TESTED]
    return [windows(text.test, part) for part in np.split(starts, range(TESTED, len(starts), TESTED))]


def tested(predict: Callable, variables: Any, text: Text) -> float:
    """Return the mean loss over the test text in nats."""
    losses = [(float(cross_entropy(predict(variables, x), jnp.asarray(y))), len(x)) for x, y in tests(text)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def run(name: str, seed: int, text: Text, floats: tuple[Any, list[float]], options: argparse.Namespace) -> dict:
    """Train under one method from the float model, convert, serve; return what came out."""
    method, (variables, float_curve) = METHODS[name], floats
    model, start = Transformer(text.characters), time.perf_counter()
    example = jnp.zeros((BATCH, CONTEXT), jnp.int32)
    plan = jaxq.make_plan(model.apply, method.policy)(variables, example)
    trainer = Trainer(model, plan, method.rate, method.longer * options.qat_steps)
    trained, curve = trainer.train(variables, text, seed + 1000, name)
    converted = jaxq.convert(model.apply, plan)(trained, example)
    serve, (x, _) = jax.jit(jaxq.quantize(model.apply, plan)), tests(text)[0]
    if not np.array_equal(serve(converted, x), jax.jit(trainer.predict)(trained, x)):
        raise AssertionError(f"{name}, seed {seed}: served logits are not those of training")
    return {
        "method": name,
        "seed": seed,
        "float": float_curve[-1],
        "quantized": tested(serve, converted, text),
        "float_curve": float_curve,
        "curve": curve,
        "bytes": [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (variables, converted)],
        "steps": [options.steps, trainer.steps],
        "characters": len(text.train) + len(text.test),
        "seconds": round(time.perf_counter() - start, 1),
        "jax": jax.__version__,
        "jaxq": jaxq.__version__,
        "device": jax.devices()[0].device_kind,
    }


# --- results ---------------------------------------------------------------------------------------------------------


def grouped(results: Sequence[dict]) -> dict[str, list[dict]]:
    groups = defaultdict(list)
    for result in results:
        groups[result["method"]].append(result)
    return {name: groups[name] for name in METHODS if name in groups}


def spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4f} ± {pstdev(values):.4f}"


def table(results: Sequence[dict], command: str) -> str:
    """Return a Markdown table of the losses."""
    first = results[0]
    lines = [
        "# A character transformer in low precision",
        "",
        f"`{command}`",
        "",
        f"jaxq {first['jaxq']}, JAX {first['jax']}, {first['device']}; {LAYERS} layers of width {WIDTH}, windows of "
        f"{CONTEXT} of {first['characters']:,} characters; test loss in nats per character, mean and standard "
        "deviation over seeds. Served logits are those of training bit for bit in every run, or the run fails.",
        "",
        "| method | steps, float + QAT | seeds | float | quantized | nats more | bytes |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, group in grouped(results).items():
        before, after = ([r[key] for r in group] for key in ("float", "quantized"))
        more = mean(b - a for a, b in zip(before, after, strict=True))
        cells = (
            name,
            " + ".join(f"{n:,}" for n in group[0]["steps"]),
            ", ".join(str(r["seed"]) for r in group),
            spread(before),
            spread(after),
            f"{more:+.4f}",
            f"{group[0]['bytes'][1]:,} of {group[0]['bytes'][0]:,}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict], path: Path) -> None:
    """Draw the test loss over the steps, float first and then every method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    curve = [mean(column) for column in zip(*(r["float_curve"] for r in results), strict=True)]
    axis.plot(EVERY * np.arange(1, len(curve) + 1), curve, color="black", label="float")
    for name, group in grouped(results).items():
        values = [mean(column) for column in zip(*(r["curve"] for r in group), strict=True)]
        axis.plot(EVERY * (len(curve) + np.arange(1, len(values) + 1)), values, label=name)
    axis.set(xlabel="steps", ylabel="test loss, nats per character")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--data", type=Path, metavar="DIR", help=f"folder with {MOBY}")
    option("--text", type=Path, metavar="FILE", help="another text, in UTF-8")
    option("--methods", default=",".join(METHODS), help=f"some of {','.join(METHODS)}; default: all")
    option("--seeds", type=int, default=1, metavar="N", help="default: 1")
    option("--steps", type=int, default=200, metavar="N", help="in float; default: 200")
    option("--qat-steps", type=int, default=40, metavar="N", help="of training under a method; default: 40")
    option("--out", type=Path, metavar="FOLDER", help="where runs, table and curves are left")
    return parser


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Run what the command line asks for, seed by seed, print the table and return the results."""
    options = parser().parse_args(argv)
    names = options.methods.split(",")
    if unknown := set(names) - set(METHODS):
        parser().error(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    try:
        text = read(options)
    except (OSError, ValueError) as error:
        parser().error(str(error))
    results = []
    for seed in range(options.seeds):
        model = Transformer(text.characters)
        start = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, CONTEXT), jnp.int32))
        floats = Trainer(model, None, RATE, options.steps).train(start, text, seed, "float")
        for name in names:
            results.append(run(name, seed, text, floats, options))
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                file = options.out / f"char-{name}-{seed}.json"
                file.write_text(json.dumps(results[-1], indent=1) + "\n")
            more = results[-1]["quantized"] - results[-1]["float"]
            print(f"seed {seed}, {name}: {results[-1]['quantized']:.4f} nats, {more:+.4f}", flush=True)
    where = "--data DIR " if options.data else ""
    command = f"python examples/char_transformer.py {where}--steps {options.steps} --qat-steps {options.qat_steps}"
    text_of_table = table(results, f"{command} --seeds {options.seeds}")
    print(f"\n{text_of_table}")
    if options.out:
        (options.out / "char_transformer.md").write_text(text_of_table)
        draw(results, options.out / "char_transformer.png")
    return results


if __name__ == "__main__":
    main()
