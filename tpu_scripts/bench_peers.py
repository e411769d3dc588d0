"""The peers of the benchmarks, where they are installed: qwix on every device, ONNX Runtime on a CPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import timing
from bench_models import Model, trained, training_step

LEARNING_RATE = 1e-4


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
