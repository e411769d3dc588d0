"""Measure what is on disk: sizes of one model in several formats, time to load, peak memory of save and load.

    python tpu_scripts/storage.py
    python tpu_scripts/storage.py --json storage.json

Every figure stands beside the limit it should keep. Times and memory are of a new process each, which has imported JAX
and started its CPU backend where the line says so; the memory of a mapped file counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxq

MB = 10**6
SIZES = {
    "int8": (jaxq.int8(), 10.1),
    "int4 in groups of 128": (jaxq.int4(group=128), 5.4),
    "2 bits": (jaxq.int2(), 2.9),
}


@dataclass(frozen=True)
class Figure:
    """One measured number and the most it should be."""

    name: str
    value: float
    limit: float
    unit: str


# Models


def zeros(shape: Any, q: jaxq.Quantizer) -> jaxq.QArray:
    """Return a converted weight [inputs, outputs] of random codes, without ever making the float one."""
    codes = np.random.default_rng(0).integers(-1, 2, shape, np.int8)
    scale = jnp.ones(q.grid(shape, (0,)))
    return jaxq.QArray(jax.device_put(codes), scale, None, q.format, jnp.dtype("float32")).packed()


def layers(params: dict[str, Any], x: jax.Array) -> list[jax.Array]:
    """Multiply by every weight."""
    return [x @ w for w in params.values()]


def made(shapes: dict[str, tuple[int, int]], q: jaxq.Quantizer) -> tuple[dict[str, jaxq.QArray], jaxq.Plan]:
    """Return converted weights of these shapes, and the plan of the products by them."""
    floats = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((1, next(iter(shapes.values()))[0]), jnp.float32)
    plan = jaxq.make_plan(layers, jaxq.Uniform(jaxq.Scheme(weight=q)))(floats, x)
    return {name: zeros(shape, q) for name, shape in shapes.items()}, plan


def forty() -> dict[str, tuple[int, int]]:
    """Return shapes of 40 MB in float32."""
    return {**{f"layer{n}": (1024, 1024) for n in range(9)}, "head": (1024, 549)}


MINILM_LAYERS, WIDTH, INNER, WORDS, POSITIONS, HEADS = 6, 384, 1536, 30522, 512, 12


def minilm_shapes() -> dict[str, Any]:
    """Return the parameters of all-MiniLM-L6-v2 as shapes."""

    def dense(inputs: int, outputs: int) -> dict[str, tuple]:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    norm = {"scale": (WIDTH,), "bias": (WIDTH,)}
    attention = {name: dense(WIDTH, WIDTH) for name in ("query", "key", "value", "out")}
    layer = {
        "attention": attention,
        "up": dense(WIDTH, INNER),
        "down": dense(INNER, WIDTH),
        "norm1": norm,
        "norm2": norm,
    }
    tables = {"words": (WORDS, WIDTH), "positions": (POSITIONS, WIDTH), "types": (2, WIDTH), "norm": norm}
    return {"embeddings": tables, **{f"layer{n}": layer for n in range(MINILM_LAYERS)}}


def minilm(params: Any, tokens: jax.Array) -> jax.Array:
    """Embed sentences; tokens: [batch, length] int32; result: [batch, 384]."""
    tables = params["embeddings"]
    x = jnp.take(tables["words"], tokens, axis=0) + tables["positions"][: tokens.shape[1]] + tables["types"][0]
    x = normalize(tables["norm"], x)
    for n in range(MINILM_LAYERS):
        layer = params[f"layer{n}"]
        x = normalize(layer["norm1"], x + attend(layer["attention"], x))
        x = normalize(layer["norm2"], x + affine(layer["down"], jax.nn.gelu(affine(layer["up"], x))))
    return x.mean(1)


def affine(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


def normalize(norm: Any, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, axis=-1, epsilon=1e-12) * norm["scale"] + norm["bias"]


def attend(layer: Any, x: jax.Array) -> jax.Array:
    query, key, value = (affine(layer[n], x).reshape(*x.shape[:2], HEADS, -1) for n in ("query", "key", "value"))
    return affine(layer["out"], jax.nn.dot_product_attention(query, key, value).reshape(x.shape))


# Measurements


def sizes() -> Iterator[Figure]:
    """Measure files of a 40 MB float32 model."""
    for name, (q, limit) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            jaxq.save(path, *made(forty(), q))
            yield Figure(f"40 MB of float32 in {name}", path.stat().st_size / MB, limit, "MB")


PROBE = """
import json, sys, time, jax
def clocks():
    return time.perf_counter(), time.process_time()
start = clocks()
import jaxq
imported = clocks()
{prepare}
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before, middle = peak(), clocks()
result = {measured}
jax.block_until_ready(jax.tree.leaves(result))
end = clocks()
seconds, processor = (sum(ends) - sum(starts) for ends, starts in zip(zip(end, imported), zip(middle, start)))
print(json.dumps({{"seconds": seconds, "processor": processor, "bytes": peak() - before}}))
"""


def probe(measured: str, path: Path, prepare: str = "") -> dict[str, float]:
    """Return seconds (`import jaxq` included) and growth of peak memory of an expression, in a new process.

    seconds: on the wall; processor: of this process, which what else runs on the machine does not lengthen.
    """
    code = PROBE.format(measured=measured, prepare=prepare)
    command = [sys.executable, "-c", code, str(path)]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def loading() -> Iterator[Figure]:
    """Measure the time from `import jax` to parameters of MiniLM in int8 that are ready to run."""
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), minilm_shapes(), is_leaf=lambda s: isinstance(s, tuple)
    )
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    params = jax.tree.map(lambda s: jnp.asarray(np.random.default_rng(0).normal(size=s.shape), s.dtype), shapes)
    plan = jaxq.make_plan(minilm, jaxq.w8a8())(shapes, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "minilm.safetensors"
        jaxq.save(path, jaxq.convert(minilm, plan)(params, tokens), plan)
        probe("jaxq", path)  # compiles the bytecode
        runs = [probe("jaxq.load(sys.argv[1])[0]", path) for _ in range(7)]
        name = f"MiniLM in int8 ({path.stat().st_size / MB:.1f} MB), import jaxq and load"
        yield Figure(f"{name}: least of {len(runs)}", min(run["seconds"] for run in runs), 0.3, "s")
        yield Figure(f"{name}: median", statistics.median(run["seconds"] for run in runs), 0.3, "s")
        yield Figure(f"{name}: processor, median", statistics.median(run["processor"] for run in runs), 0.3, "s")


def memory() -> Iterator[Figure]:
    """Measure the peak memory of save and load of 134 MB, above that of the process before."""
    qparams, plan = made({f"layer{n}": (2048, 4096) for n in range(16)}, jaxq.int8())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        jaxq.save(path, qparams, plan)
        size = path.stat().st_size
        load = probe("jaxq.load(sys.argv[1])[0]", path, "jax.devices()")["bytes"]
        held = "jax.devices(); qparams, plan = jaxq.load(sys.argv[1])"
        save = probe("jaxq.save(sys.argv[1] + '.copy', qparams, plan)", path, held)["bytes"]
        yield Figure("peak memory of load, of the file's size", load / size, 1.2, "x")
        yield Figure("peak memory of save, of the file's size", save / size, 1.2, "x")


def figures() -> Iterator[Figure]:
    """Yield all figures as they are measured."""
    yield from sizes()
    yield from loading()
    yield from memory()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found = []
    for figure in figures():
        found.append(figure)
        print(f"{figure.value:8.3f} {figure.unit:3} (at most {figure.limit:g})  {figure.name}", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(figure) for figure in found], indent=2) + "\n")


if __name__ == "__main__":
    main()
