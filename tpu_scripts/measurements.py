"""What the benchmark measures, each against its reference in the same process."""

import functools
import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq
import timing
from bench_large import large
from bench_models import DEEP, MODELS, Model, trained, training_step
from bench_peers import LEARNING_RATE, attempt, onnx_inference, qwix_inference, qwix_training
from bench_tables import Settings, Table, relative_size, relative_time, speed_up
from variants import VARIANTS, call_of, serving


def example(name: str) -> tuple[Model, Any, jax.Array, jax.Array]:
    """Return a model with weights, a batch and targets."""
    model = MODELS[name]
    weights, batch, target = jax.random.split(jax.random.key(0), 3)
    return model, model.init(weights), model.example_input(batch), model.example_target(target)


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


def forwards(model: Model) -> dict[str, Callable]:
    """Return what is trained: the float model, and with quantization in force."""
    int8 = jaxq.int8()
    schemes = {
        "int8 QAT dynamic": jaxq.Scheme(weight=int8, act=int8),
        "and SwitchBack": jaxq.Scheme(weight=int8, act=int8, grad=jaxq.Backward(act=int8)),
    }
    return {"float32": model.apply} | {variant: jaxq.qat(model.apply, s) for variant, s in schemes.items()}


def training(settings: Settings) -> Table:
    """Measure training steps: float32 and quantization-aware with dynamic ranges, without and with int8 gradients."""
    rows = []
    for name in settings.models:
        model, params, x, target = example(name)
        calls = {
            v: trained(training_step(f, model, LEARNING_RATE), params, x, target) for v, f in forwards(model).items()
        }
        if settings.peers:
            start = functools.partial(qwix_training, model, params, x, target)
            calls |= attempt("qwix int8 QAT dynamic", start)
        blocks = timing.interleave(calls, rounds=settings.rounds, block=settings.block)
        rows += [relative_time(name, variant, blocks, "float32") for variant in calls if variant != "float32"]
    return Table("Training step", "time / float32 time (less is better)", "float32", rows)


def memory(settings: Settings) -> Table:
    """Compile training steps and ask XLA what they hold at once: arguments, results and what is in between."""
    rows = []
    for name in settings.models:
        model, *arguments = example(name)
        sizes = {v: held(training_step(f, model, LEARNING_RATE), *arguments) for v, f in forwards(model).items()}
        rows += [relative_size(name, v, sizes[v], sizes["float32"]) for v in sizes if v != "float32"]
    return Table("Memory of a training step", "bytes / float32's bytes (less is better)", "float32", rows, "MiB")


def held(step: Callable, *arguments: Any) -> int:
    """Return the bytes that a compiled step holds."""
    found = step.lower(*arguments).compile().memory_analysis()
    whole = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return whole - found.alias_size_in_bytes


# Tracing and import


def compiling(settings: Settings) -> Table:
    """Measure how long XLA takes to compile a model's program for this device, with static ranges and without."""
    rows = []
    for name in settings.models:
        model, params, x, _ = example(name)
        programs = {"float32": (jax.jit(model.apply), params)}
        programs |= {v: serving(model, v, params, x) for v in ("int8 static", "int8 dynamic")}
        lowered = {}

        def lower(programs=programs, lowered=lowered, x=x) -> None:
            """Lower again: what was compiled once is not compiled again."""
            jax.clear_caches()
            lowered.update({v: program.lower(weights, x) for v, (program, weights) in programs.items()})

        calls = {v: lambda v=v, lowered=lowered: lowered[v].compile() for v in programs}
        blocks = timing.interleave(calls, rounds=settings.rounds, block=1, before=lower, warm_up=0)
        rows += [relative_time(name, v, blocks, "float32") for v in programs if v != "float32"]
    return Table("Compiling", "time / float32 time (less is better)", "float32", rows)


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


def convolution(layout: tuple[str, str, str], padding: Any = "SAME") -> Callable:
    """Return a convolution of `(kernel, x)` in a layout, with a stride of one."""

    def convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
        strides = (1,) * (x.ndim - 2)
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)

    return convolve


def operations(settings: Settings) -> Table:
    """Measure operations that compilers are slow at, with quantize and dequantize around them."""
    nhwc, nchw = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
    line, volume = ("NWC", "WIO", "NWC"), ("NDHWC", "DHWIO", "NDHWC")
    wide = [(4, 4), (4, 4)]
    programs = {
        "3x3, [8,32,32,64] to 64": (convolution(nhwc), (3, 3, 64, 64), (8, 32, 32, 64)),
        "3x3, [8,64,32,32] to 64, channels first": (convolution(nchw), (64, 64, 3, 3), (8, 64, 32, 32)),
        "3x3, [8,32,32,64] to 64, padded by 4": (convolution(nhwc, wide), (3, 3, 64, 64), (8, 32, 32, 64)),
        "of 5, [8,512,64] to 64": (convolution(line), (5, 64, 64), (8, 512, 64)),
        "3x3x3, [2,16,16,16,32] to 32": (convolution(volume), (3, 3, 3, 32, 32), (2, 16, 16, 16, 32)),
        "7x7, [8,96,96,3] to 32": (convolution(nhwc), (7, 7, 3, 32), (8, 96, 96, 3)),
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


MEASUREMENTS = {
    "inference": inference,
    "training": training,
    "memory": memory,
    "tracing": tracing,
    "compiling": compiling,
    "import": import_time,
    "arrays": arrays,
    "clustering": clustering,
    "operations": operations,
    "large": large,
}
