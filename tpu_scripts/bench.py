"""Measure jaxq against float32: inference, training step, tracing and import time.

    python tpu_scripts/bench.py                                  # everything
    python tpu_scripts/bench.py --only mlp --what training --quick
    python tpu_scripts/bench.py --peers --json bench.json --markdown bench.md

Runs unchanged on CPU, GPU and TPU: on whatever device JAX finds first. All programs of one comparison run interleaved
in one process (see `timing.py`), and each table starts with the ratio. float32 means JAX's default precision, which
multiplies in TF32 on recent GPUs and in bfloat16 on TPUs.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
import timing
from bench_models import DEEP, MODELS, Model, training_step
from variants import VARIANTS, call_of

LEARNING_RATE = 1e-4
PACKAGES = ("jax", "jaxlib", "numpy", "jaxq", "qwix", "onnxruntime")


@dataclass(frozen=True)
class Row:
    """One variant of one model, against its reference."""

    model: str
    variant: str
    ratio: timing.Ratio
    milliseconds: float
    reference_milliseconds: float


@dataclass(frozen=True)
class Table:
    """Rows that share a title and a meaning of `ratio`."""

    title: str
    ratio: str
    reference: str
    rows: list[Row]


@dataclass(frozen=True)
class Settings:
    """What to run and how long."""

    models: Sequence[str]
    rounds: int
    block: int
    peers: bool


# Inference


def bfloat16_call(model: Model, params: Any, x: jax.Array) -> timing.Call:
    """Return a call of the float program with weights and data in bfloat16."""
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (params, x))
    return functools.partial(jax.jit(model.apply), *narrow)


def inference(settings: Settings) -> Table:
    """Measure forward passes: float32, bfloat16, int8 with calibrated and with dynamic ranges, int4 weights."""
    rows = []
    for name in settings.models:
        model, params, x, _ = example(name)
        calls = {
            "float32": functools.partial(jax.jit(model.apply), params, x),
            "bfloat16": bfloat16_call(model, params, x),
            **{variant: call_of(model, variant, params, x) for variant in VARIANTS},
        }
        if settings.peers:
            calls |= attempt("qwix int8 dynamic", functools.partial(qwix_inference, model, params, x))
            calls |= attempt("ONNX Runtime int8 static", functools.partial(onnx_inference, name, params, x))
        blocks = timing.interleave(calls, rounds=settings.rounds, block=settings.block)
        rows += [speed_up(name, variant, blocks) for variant in calls if variant != "float32"]
    return Table("Inference", "float32 time / time (more is better)", "float32", rows)


# Training


def trained(step: Callable, params: Any, x: jax.Array, target: jax.Array) -> timing.Call:
    """Return a call that takes the next step of one training run."""

    def steps() -> Iterator[Any]:
        weights = jax.tree.map(jnp.copy, params)
        while True:
            weights, loss = step(weights, x, target)
            yield weights, loss

    return steps().__next__


def training(settings: Settings) -> Table:
    """Measure training steps: float32 and quantization-aware with dynamic ranges, without and with int8 gradients."""
    rows = []
    for name in settings.models:
        model, params, x, target = example(name)
        schemes = {
            "int8 QAT dynamic": jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8()),
            "and SwitchBack": jaxq.Scheme(weight=jaxq.int8(), act=jaxq.int8(), grad=jaxq.Backward(act=jaxq.int8())),
        }
        forwards = {"float32": model.apply} | {v: jaxq.qat(model.apply, s) for v, s in schemes.items()}
        calls = {v: trained(training_step(f, model, LEARNING_RATE), params, x, target) for v, f in forwards.items()}
        if settings.peers:
            start = functools.partial(qwix_training, model, params, x, target)
            calls |= attempt("qwix int8 QAT dynamic", start)
        blocks = timing.interleave(calls, rounds=settings.rounds, block=settings.block)
        rows += [relative_time(name, variant, blocks, "float32") for variant in calls if variant != "float32"]
    return Table("Training step", "time / float32 time (less is better)", "float32", rows)


# Tracing and import


def tracing(settings: Settings) -> Table:
    """Measure `make_jaxpr` of 48 unrolled layers: a new function and empty caches for every repetition."""
    key = jax.random.key(0)
    shapes = jax.eval_shape(DEEP.init, key), jax.eval_shape(DEEP.example_input, key)

    def fresh() -> Callable:
        return lambda params, x: DEEP.apply(params, x)

    def forget() -> None:
        jax.clear_caches()
        gc.collect()

    calls = {
        "float32": lambda: jax.make_jaxpr(fresh())(*shapes),
        "int8 dynamic": lambda: jax.make_jaxpr(jaxq.quantize(fresh(), jaxq.w8a8()))(*shapes),
    }
    blocks = timing.interleave(calls, rounds=settings.rounds, block=1, before=forget, warm_up=1)
    row = relative_time("encoder, 48 layers", "int8 dynamic", blocks, "float32")
    return Table("Tracing", "make_jaxpr(quantize(f)) / make_jaxpr(f) (less is better)", "float32", [row])


IMPORT_PROBE = """
import time
start = time.perf_counter(); import jax
middle = time.perf_counter(); import jaxq
print(middle - start, time.perf_counter() - middle)
"""


def import_time(settings: Settings) -> Table:
    """Measure, in new processes, what `import jaxq` adds to `import jax`."""

    def probe() -> list[float]:
        command = [sys.executable, "-c", IMPORT_PROBE]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return [float(word) for word in printed.split()]

    probe()  # compiles the bytecode
    times = [probe() for _ in range(settings.rounds)]
    blocks = {"import jax": [first for first, _ in times], "import jaxq": [second for _, second in times]}
    row = relative_time("package", "import jaxq", blocks, "import jax")
    return Table("Import", "import jaxq after jax / import jax (less is better)", "import jax", [row])


# Arrays


def arrays(settings: Settings) -> Table:
    """Measure quantizing and dequantizing 16 M float32 numbers, against a copy of them."""
    x = jax.random.normal(jax.random.key(0), (4096, 4096))
    quantizers = {
        "int8 per channel": jaxq.int8(),
        "int8 per tensor": jaxq.int8(per_tensor=True),
        "int4 per channel, packed": jaxq.int4(),
        "int4 in groups of 128, packed": jaxq.int4(group=128),
    }
    calls = {"copy": functools.partial(jax.jit(jnp.copy), x)}
    calls |= {name: functools.partial(jax.jit(lambda x, q=q: q(x).decode()), x) for name, q in quantizers.items()}
    blocks = timing.interleave(calls, rounds=settings.rounds, block=3)
    rows = [relative_time("float32[4096,4096]", name, blocks, "copy") for name in quantizers]
    return Table("Quantize and dequantize", "time / time of a copy (less is better)", "copy", rows)


def clustering(settings: Settings) -> Table:
    """Measure exact 1-D k-means of a million numbers into 16 clusters, against sorting them."""
    values = np.random.default_rng(0).normal(size=10**6).astype(np.float32)
    calls = {
        "sort": functools.partial(np.sort, values),
        "exact k-means": functools.partial(jaxq.k_means_quantize, values, 16),
    }
    blocks = timing.interleave(calls, rounds=settings.rounds, block=1, warm_up=1)
    row = relative_time("float32[1000000], 16 clusters", "exact k-means", blocks, "sort")
    return Table("Clustering", "time / time of a sort (less is better)", "sort", [row])


# Single operations


def depthwise(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Convolve every channel by itself; x: [n, h, w, channels], kernel: [3, 3, 1, channels]."""
    layout = ("NHWC", "HWIO", "NHWC")
    groups = x.shape[-1]
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups)


def operations(settings: Settings) -> Table:
    """Measure operations that compilers are slow at, with quantize and dequantize around them."""
    programs = {
        "depthwise 3x3, [8,48,48,48]": (depthwise, (3, 3, 1, 48), (8, 48, 48, 48)),
        "depthwise 3x3, [8,12,12,192]": (depthwise, (3, 3, 1, 192), (8, 12, 12, 192)),
        "one row, [1,4096] x [4096,4096]": (lambda w, x: x @ w, (4096, 4096), (1, 4096)),
    }
    rows = []
    for name, (f, weight, data) in programs.items():
        params, x = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate((weight, data)))
        model = Model(None, f, None, None, None)
        calls = {
            "float32": functools.partial(jax.jit(f), params, x),
            "int8 static": call_of(model, "int8 static", params, x),
        }
        blocks = timing.interleave(calls, rounds=settings.rounds, block=settings.block)
        rows.append(speed_up(name, "int8 static", blocks))
    return Table("Operations", "float32 time / time (more is better)", "float32", rows)


# Peers


def attempt(name: str, build: Callable[[], timing.Call]) -> dict[str, timing.Call]:
    """Return a peer's call under its name; where it does not run, say so and return nothing."""
    try:
        call = build()
        jax.block_until_ready(call())
    except Exception as error:
        reason = str(error).partition("\n")[0]
        print(f"{name} skipped: {type(error).__name__}: {reason}")
        return {}
    return {name: call}


def qwix_module(model: Model, params: Any, provider: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Wrap a plain function for qwix, which takes Flax modules only; return the module and its flat weights."""
    import qwix
    from flax import linen

    leaves, treedef = jax.tree.flatten(params)
    flat = {f"leaf{index}": leaf for index, leaf in enumerate(leaves)}

    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            weights = [self.param(name, lambda _, leaf=leaf: leaf) for name, leaf in flat.items()]
            return model.apply(treedef.unflatten(weights), x)

    return qwix.quantize_model(Plain(), provider), flat


def qwix_inference(model: Model, params: Any, x: jax.Array) -> timing.Call:
    """Return a call of qwix's int8 program, with weights quantized ahead and dynamic ranges."""
    import qwix

    rule = qwix.QuantizationRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    module, flat = qwix_module(model, params, qwix.PtqProvider([rule]))
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    converted = qwix.quantize_params(flat, shapes)
    serve = jax.jit(lambda p, x: module.apply({"params": p}, x))
    return lambda: serve(converted, x)


def qwix_training(model: Model, params: Any, x: jax.Array, target: jax.Array) -> timing.Call:
    """Return a call of qwix's next training step, with an int8 forward and a float backward pass."""
    import qwix

    rule = qwix.QtRule(weight_qtype=jnp.int8, act_qtype=jnp.int8)
    module, flat = qwix_module(model, params, qwix.QtProvider([rule]))
    return trained(training_step(lambda p, x: module.apply({"params": p}, x), model, LEARNING_RATE), flat, x, target)


def onnx_inference(name: str, params: Any, x: jax.Array) -> timing.Call:
    """Return a call of ONNX Runtime's int8 program, for the models that have a graph, on a CPU."""
    from onnx_peer import GRAPHS, int8_call

    if name not in GRAPHS:
        raise NotImplementedError(f"no graph for {name}; there are {', '.join(GRAPHS)}")
    return int8_call(name, params, x)


# Results


def example(name: str) -> tuple[Model, Any, jax.Array, jax.Array]:
    """Return a model with weights, a batch and targets."""
    model = MODELS[name]
    weights, batch, target = jax.random.split(jax.random.key(0), 3)
    return model, model.init(weights), model.example_input(batch), model.example_target(target)


def speed_up(model: str, variant: str, blocks: timing.Blocks) -> Row:
    """Compare with float32: how many times as fast."""
    ratio = timing.ratio(blocks, "float32", variant)
    return Row(model, variant, ratio, timing.milliseconds(blocks, variant), timing.milliseconds(blocks, "float32"))


def relative_time(model: str, variant: str, blocks: timing.Blocks, reference: str) -> Row:
    """Compare with the reference: which part of its time."""
    ratio = timing.ratio(blocks, variant, reference)
    return Row(model, variant, ratio, timing.milliseconds(blocks, variant), timing.milliseconds(blocks, reference))


def processor() -> str:
    """Return the name of the CPU, or of its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def surroundings() -> dict[str, str]:
    """Return device and versions."""
    devices = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "host": f"{processor()}, {cores} cores",
        "python": platform.python_version(),
        **versions,
    }


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(table: Table) -> str:
    """Print a table, ratios first."""
    lines = [
        f"## {table.title}",
        "",
        f"Ratio: {table.ratio}; median of block pairs, quartiles in brackets.",
        "",
        f"| ratio | quartiles | model | variant | ms | {table.reference}, ms |",
        "|---:|:---:|---|---|---:|---:|",
    ]
    for row in table.rows:
        median, low, high = row.ratio
        times = f"{row.milliseconds:.2f} | {row.reference_milliseconds:.2f}"
        lines.append(f"| **{median:.2f}** | [{low:.2f}, {high:.2f}] | {row.model} | {row.variant} | {times} |")
    return "\n".join(lines) + "\n"


def heading(facts: dict[str, str]) -> str:
    """Print device and versions."""
    return "\n".join(f"* {name}: {value}" for name, value in facts.items()) + "\n"


MEASUREMENTS = {
    "inference": inference,
    "training": training,
    "tracing": tracing,
    "import": import_time,
    "arrays": arrays,
    "clustering": clustering,
    "operations": operations,
}


def choice(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return names

    return parse


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=choice(list(MODELS)), default=list(MODELS), metavar="MODELS", help="mlp,encoder")
    parser.add_argument(
        "--what", type=choice(list(MEASUREMENTS)), default=list(MEASUREMENTS), help=",".join(MEASUREMENTS)
    )
    parser.add_argument("--quick", action="store_true", help="three rounds instead of ten")
    parser.add_argument("--peers", action="store_true", help="measure qwix and ONNX Runtime too, if installed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = arguments()
    settings = Settings(options.only, rounds=3 if options.quick else 10, block=10, peers=options.peers)
    facts = surroundings()
    pages, tables = [heading(facts)], []
    print(pages[0])
    for name in options.what:
        tables.append(MEASUREMENTS[name](settings))
        pages.append(markdown(tables[-1]))
        print(pages[-1], flush=True)
    if options.json:
        report = {"surroundings": facts, "tables": [asdict(table) for table in tables]}
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(pages))


if __name__ == "__main__":
    main()
