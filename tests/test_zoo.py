"""The zoo is sound before anything is quantized: each model runs, is finite and repeats itself.

What gradients it has is known to the laws, which look at those of floats too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import NAMES, Model, model


def _float_leaves(tree):
    """The float leaves of a tree, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def _gradient(entry: Model):
    """Return the gradient of the sum of squares of the float outputs by the float leaves of the weights."""
    leaves, treedef = jax.tree.flatten(entry.params)
    floats = {i: leaf for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)}

    def loss(floats):
        params = treedef.unflatten([floats.get(i, leaf) for i, leaf in enumerate(leaves)])
        return sum(jnp.sum(leaf.astype(jnp.float32) ** 2) for leaf in _float_leaves(entry.fn(params, *entry.args)))

    return jax.jit(jax.grad(loss))(floats)


def test_names_are_unique_and_those_of_the_models():
    assert len(set(NAMES)) == len(NAMES)
    assert [model(name).name for name in NAMES] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_finite_and_repeat(name):
    entry = model(name)
    run = jax.jit(entry.fn)
    first, second = (jax.tree.leaves(run(entry.params, *entry.args)) for _ in range(2))
    assert _float_leaves(first)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for leaf in _float_leaves(first):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", [name for name in NAMES if not model(name).reverse])
def test_loops_of_unknown_length_have_no_gradient(name):
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        _gradient(model(name))
