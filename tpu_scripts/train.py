"""Train a model with an int8 forward pass, on all devices there are, and serve it in int8.

    python tpu_scripts/train.py                        # an encoder, 50 steps
    python tpu_scripts/train.py --model mlp --steps 5

The batch is spread over the devices, the weights are on each of them; `jaxq.qat` goes around the loss and nothing else
changes. The targets are made up: a fixed batch is learned by heart. Runs on CPU, GPU and TPU.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jaxq
from bench_models import MODELS, training_step

LEARNING_RATE = 1e-2


def spread(batch: Any) -> tuple[Any, NamedSharding]:
    """Return a batch over all devices, as far as its size divides, and where weights go: everywhere."""
    devices = jax.devices()
    count = len(devices) if all(leaf.shape[0] % len(devices) == 0 for leaf in jax.tree.leaves(batch)) else 1
    mesh = jax.sharding.Mesh(devices[:count], ("batch",))
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("batch"))), NamedSharding(mesh, PartitionSpec())


def main() -> None:
    """Train, convert, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="encoder")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    model = MODELS[options.model]
    weights, data, goal = jax.random.split(jax.random.key(0), 3)
    (x, target), everywhere = spread((model.example_input(data), model.example_target(goal)))
    params = jax.device_put(model.init(weights), everywhere)
    print(f"{options.model} on {len(x.sharding.device_set)} of {jax.devices()}")

    step = training_step(jaxq.qat(model.apply, jaxq.w8a8()), model, LEARNING_RATE)
    for number in range(options.steps):
        params, loss = step(params, x, target)
        if number % max(1, options.steps // 10) == 0:
            print(f"step {number}: loss {loss:.4f}")

    trained = model.loss(jax.jit(jaxq.qat(model.apply, jaxq.w8a8()))(params, x), target)
    converted = jaxq.convert(model.apply, jaxq.w8a8())(params, x)
    served = model.loss(jax.jit(jaxq.quantize(model.apply, jaxq.w8a8()))(converted, x), target)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20 for tree in (params, converted)]
    print(
        f"loss {trained:.4f} in training, {served:.4f} served; weights {sizes[0]:.1f} MiB, in int8 {sizes[1]:.1f} MiB"
    )
    assert jnp.isfinite(served)


if __name__ == "__main__":
    main()
