"""Compile a quantized model for an accelerator that is not there, and show what the compiler made of it.

    pip install libtpu                                                   # for v4, v5e, v6e
    pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt              # for h100; 143 MB, no NVIDIA libraries
    python tpu_scripts/compile_for.py --target v5e --model mlp
    python tpu_scripts/compile_for.py --target h100 --model resnet18 --variant "int8 dynamic"
    python tpu_scripts/compile_for.py --target v5e --model mlp --exported
    python tpu_scripts/compile_for.py --target h100 --model resnet18 --integers

Prints the integer and float products of the optimized program, its memory, and its estimated time against the same
model in bfloat16. Ends with status 1 if a product that the plan quantizes came out in float. On a TPU the estimate is
the compiler's; on a GPU, whose compiler gives none, it is a bound: the products at the rate of the tensor cores, or all
arguments and results at that of the memory, whichever takes longer. Estimates promise nothing: measure where you can.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX looks for devices: this process compiles for one and needs none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import jaxq
from bench_models import MODELS, Model
from variants import VARIANTS, plan_of

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

from hlo import count_ops  # noqa: E402


@dataclass(frozen=True)
class Target:
    """An accelerator: what JAX calls it, and the speeds of a GPU, in products and bytes a second."""

    platform: str
    topology: str
    int8: float = 0.0
    bfloat16: float = 0.0
    memory: float = 0.0


TARGETS = {
    "v4": Target("tpu", "v4:2x2x1"),
    "v5e": Target("tpu", "v5e:2x2"),
    "v6e": Target("tpu", "v6e:2x2"),
    # NVIDIA H100 data sheet, SXM, without sparsity.
    "h100": Target("cuda", "h100", int8=1979e12, bfloat16=989e12, memory=3.35e12),
}


def device_of(target: Target) -> Any:
    """Return a device of a machine that is described, not present."""
    if target.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=target.topology).devices[0]
    config = (HERE / f"{target.topology}.textproto").read_text()
    options = {"target_config": config, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform=target.platform, topology_name=target.topology, **options).devices[0]


def compiled(f: Callable, device: Any, *shapes: Any) -> Any:
    """Compile a function for one device, ahead of time."""
    there = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(f, in_shardings=there, out_shardings=there).lower(*shapes).compile()


class Estimate(NamedTuple):
    """The time of a program, and how many of its parts the compiler has no estimate for."""

    seconds: float
    unknown: int


def estimate(program: Any, target: Target, speed: float, flops: int) -> Estimate:
    """Return the estimated time of a program."""
    if target.platform != "tpu":
        memory = program.memory_analysis()
        traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return Estimate(max(flops / speed, traffic / target.memory), 0)
    # The sum over the parts of the program, minus a second for each that is unknown.
    total = program.cost_analysis()["optimal_seconds"]
    return Estimate(total - math.floor(total), -math.floor(total))


def shapes_of(model: Model, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """Return the shapes of a model's weights and of its example batch, floats in `dtype`."""
    key = jax.random.key(0)

    def cast(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(cast, (jax.eval_shape(model.init, key), jax.eval_shape(model.example_input, key)))


def quantized(model: Model, variant: str, shapes: tuple[Any, Any]) -> tuple[Callable, tuple[Any, Any], jaxq.Plan]:
    """Return the quantized program, the shapes of its arguments, weights converted, and the plan."""
    plan = plan_of(model, variant, *shapes)
    converted = jax.eval_shape(lambda params: jaxq.convert(model.apply, plan)(params, shapes[1]), shapes[0])
    return jaxq.quantize(model.apply, plan), (converted, shapes[1]), plan


def exported(model: Model, variant: str) -> tuple[Callable, tuple[Any, ...]]:
    """Return the program of `jaxq.export`'s artifact, as a process without jaxq would load it, and its arguments."""
    params, x = model.init(jax.random.key(0)), model.example_input(jax.random.key(1))
    plan = plan_of(model, variant, params, x)
    artifact = jaxq.export(model.apply, plan, jaxq.convert(model.apply, plan)(params, x), x)
    return artifact.call, (jax.ShapeDtypeStruct(x.shape, x.dtype),)


def alone(model: Model) -> tuple[Callable, tuple[Any, ...], jaxq.Plan]:
    """Return the program of `jaxq.integer`, weights inside, its arguments, and the plan."""
    params, x = model.init(jax.random.key(0)), model.example_input(jax.random.key(1))
    plan = jaxq.calibrate(model.apply, jaxq.w8a8(static=True, symmetric=False), progress=False)(params, [x])
    return jaxq.integer(model.apply, plan)(params, x), (jax.ShapeDtypeStruct(x.shape, x.dtype),), plan


def strays(ops: dict[str, int], plan: jaxq.Plan) -> int:
    """Return how many products too many are in float: more than the plan leaves there."""
    left = sum(not d.is_integer and d.site.op != "embedding" for d in plan.decisions)
    return max(0, ops["float_dots"] + ops["float_convs"] - left)


def row(name: str, program: Any, time: Estimate) -> str:
    """Print one program."""
    ops, memory = count_ops(program.as_text()), program.memory_analysis()
    sizes = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
    counts = [ops["int8_dots"], ops["int8_convs"], ops["float_dots"], ops["float_convs"]]
    cells = [*(str(n) for n in counts), *(f"{size / 2**20:.2f}" for size in sizes)]
    unknown = f" + {time.unknown} unknown parts" if time.unknown else ""
    return f"| {name} | {' | '.join(cells)} | {1e6 * time.seconds:.1f}{unknown} |"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=list(TARGETS), required=True)
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument("--variant", choices=list(VARIANTS), default="int8 static")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--exported", action="store_true", help="compile what jaxq.export wrote, weights inside")
    kind.add_argument("--integers", action="store_true", help="compile what jaxq.integer makes, weights inside")
    parser.add_argument("--hlo", type=Path, metavar="FILE", help="write the optimized program there")
    return parser.parse_args()


def main() -> int:
    """Compile both programs, print, and say whether the integers stayed integers."""
    options = arguments()
    target, model = TARGETS[options.target], MODELS[options.model]
    device = device_of(target)
    f, shapes, plan = quantized(model, options.variant, shapes_of(model))
    if options.exported:
        f, shapes = exported(model, options.variant)
    if options.integers:
        f, shapes, plan = alone(model)
    flops = sum(d.site.flops for d in plan.decisions)
    reference = compiled(model.apply, device, *shapes_of(model, jnp.bfloat16))
    program = compiled(f, device, *shapes)
    times = [estimate(reference, target, target.bfloat16, flops), estimate(program, target, target.int8, flops)]
    print(f"{options.model} for {options.target}, jax {jax.__version__}, {plan!r}\n")
    print(
        "| program | int dots | int convs | float dots | float convs | arguments, MiB | scratch, MiB | estimate, us |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    print(row("bfloat16", reference, times[0]))
    print(row("integers alone" if options.integers else options.variant, program, times[1]))
    print(f"\nestimated speed over bfloat16, of what is known: {times[0].seconds / times[1].seconds:.2f}")
    if options.hlo:
        options.hlo.write_text(program.as_text())
    if wrong := strays(count_ops(program.as_text()), plan):
        print(f"\n{wrong} products of the plan came out in float", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
