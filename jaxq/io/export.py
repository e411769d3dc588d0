"""`export`: the quantized program with its weights as StableHLO, which runs where jaxq is not installed.

Weights inside the program enter behind a barrier, so that a compiler rounds with them as it does with arguments; those
beside it are arguments. What is written, and where, is in `artifact`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxq.decisions.plan import Plan
from jaxq.interpretation.arguments import Argnums, place
from jaxq.interpretation.transforms import quantize
from jaxq.io import checkpoint, tree
from jaxq.io.artifact import Artifact, described
from jaxq.io.safetensors import Container
from jaxq.numbers.blocks import hide


def export(
    f: Callable,
    plan: Plan,
    qparams: Any,
    *args: Any,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    argnums: Argnums = 0,
    inside: bool = True,
    verify: Any = None,
) -> Artifact:
    """Return `quantize(f, plan)` with its weights, as StableHLO for all `platforms`.

    args: what follows the weights. The leading axis of the first array is the batch: it is symbolic, in all arrays that
    have it; a `ShapeDtypeStruct` is taken as it is, symbolic axes or not. Arguments without arrays (`train=False`) are
    fixed, and left out of the exported signature. argnums: which arguments the weights are, as for `convert`. inside:
    False leaves the weights out of the program, which may take 2 GB: its first argument is then the dict of the arrays
    that `jaxq.save` writes, by name, and `Artifact.save` writes that file beside its own. verify: arguments to run the
    artifact on, a tuple or the one there is: it must give on the CPU what `quantize` gives, bit for bit, or
    `ValueError` is raised. Raises `TypeError` for weights beside without a `Plan`, `ValueError` for programs that
    change state, and JAX's errors for those that depend on the size of the batch.

    >>> import jax.numpy as jnp, jaxq
    >>> f, params, x = (lambda p, x: x @ p["w"]), {"w": jnp.eye(4)}, jnp.ones((2, 4))
    >>> plan = jaxq.make_plan(f, jaxq.w8a8())(params, x)
    >>> artifact = jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, verify=x)
    >>> artifact.about["platforms"], artifact.about["inputs"]
    (['cpu', 'cuda', 'tpu'], ['float32[batch,4]'])
    >>> jaxq.export(f, plan, jaxq.convert(f, plan)(params, x), x, inside=False).about["weights"]
    {'w.scale': 'float32[1,4]', 'w.stored': 'int8[4,4]'}
    """
    if not inside and not isinstance(plan, Plan):
        raise TypeError("weights beside a program are saved with their plan: give the Plan that jaxq.make_plan returns")
    run = quantize(f, plan, argnums=argnums)
    shapes = _symbolic(args)
    dynamic = [n for n, arg in enumerate(args) if any(_is_array(leaf) for leaf in jax.tree.leaves(arg))]

    def serve(params, arrays):
        whole = list(shapes)
        for n, array in zip(dynamic, arrays, strict=True):
            whole[n] = array
        return _pure(run, params, whole, argnums)

    def closed(*arrays):
        return serve(_hidden(qparams), arrays)

    def opened(weights, *arrays):
        return serve(_rebuilt(qparams, saved, weights), arrays)

    saved = None if inside else checkpoint.contents(qparams, plan)
    program, first = (closed, ()) if saved is None else (opened, (saved.arrays,))
    given = (*first, *(shapes[n] for n in dynamic))
    artifact = described(jax.export.export(jax.jit(program), platforms=tuple(platforms))(*given), saved)
    if verify is not None:
        _verify(artifact, run, qparams, verify if type(verify) is tuple else (verify,), argnums, dynamic)
    return artifact


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _symbolic(args: tuple) -> tuple:
    """Return the arguments as shapes, with a symbolic batch wherever the first array's leading axis is."""
    arrays = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, (jax.Array, np.ndarray)) and leaf.ndim]
    (batch,) = jax.export.symbolic_shape("batch")

    def shape(leaf: Any) -> Any:
        if not _is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        batched = leaf.ndim > 0 and leaf.shape[0] == arrays[0].shape[0]
        return jax.ShapeDtypeStruct((batch, *leaf.shape[1:]) if batched else leaf.shape, leaf.dtype)

    return jax.tree.map(shape, args)


def _hidden(params: Any) -> Any:
    """Return parameters that XLA takes for arguments: constants it folds, and rounds differently."""

    def veil(leaf: Any) -> Any:
        plain = isinstance(leaf, (jax.Array, np.ndarray)) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return hide(jnp.asarray(leaf)) if plain else leaf

    return jax.tree.map(veil, params)


def _rebuilt(qparams: Any, saved: Container | None, weights: dict[str, Any]) -> Any:
    """Return parameters with the arrays of their file, given by name, in their places."""
    assert saved is not None, "weights come with what they were saved from"
    built, _ = tree.build(json.loads(saved.metadata["tree"]), weights)
    return tree.fill(qparams, built)


def _pure(run: Callable, params: Any, args: list, argnums: Argnums) -> Any:
    """Run, and raise where the call changed its parameters: an exported program has no state."""
    before = jax.tree.leaves(params)
    out = run(*place(params, tuple(args), argnums))
    if any(old is not new for old, new in zip(before, jax.tree.leaves(params), strict=True)):
        raise ValueError("the call changes its module, which an exported program cannot: call module.eval() first")
    return out


def _verify(artifact: Artifact, run: Callable, qparams: Any, inputs: tuple, argnums: Argnums, dynamic: list) -> None:
    """Raise `ValueError` unless the artifact gives what `quantize` gives, bit for bit, on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        want = run(*place(qparams, inputs, argnums))
        got = artifact.call(*(inputs[n] for n in dynamic))
    for number, pair in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)):
        a, b = (np.asarray(x) for x in pair)
        if a.dtype != b.dtype or a.tobytes() != b.tobytes():
            where = "" if a.shape != b.shape else f": {int((a != b).sum())} of {a.size} numbers differ"
            raise ValueError(f"output {number} of the exported program is not that of jaxq.quantize{where}")
